# SPDX-License-Identifier: MIT
"""What the role's variables may hold: checked before anything else, as Compose, Docker and vLLM would find out later.

Each problem is a sentence that names the variable and what to type instead.
"""

from __future__ import annotations

import ipaddress
import math
import re
import shlex
from typing import Any, Dict, Iterator, List, Mapping, Sequence, Union

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import outgoing
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

# The role's variable behind each key of .env that the role decides.
VARIABLES: Dict[str, str] = {
    "GPU_DEVICE_ID": "gpu_device_id",
    "VLLM_IMAGE": "vllm_gpu_image",
    "VLLM_MODEL": "vllm_gpu_model",
    "VLLM_GPU_MEMORY_UTILIZATION": "vllm_gpu_memory_utilization",
    "VLLM_EXTRA_ARGS": "vllm_gpu_extra_args",
    "VLLM_BIND_ADDRESS": "vllm_gpu_bind_address",
    "VLLM_PORT": "vllm_gpu_port",
    "VLLM_API_KEY": "vllm_gpu_api_key",
    "HF_TOKEN": "vllm_gpu_hf_token",
    "HF_CACHE": "vllm_gpu_hf_cache",
    "VLLM_CACHE": "vllm_gpu_compile_cache",
    "VLLM_MODELS": "vllm_gpu_models",
    "VLLM_SHM_SIZE": "vllm_gpu_shm_size",
    "VLLM_RESTART": "vllm_gpu_restart",
    "VLLM_STOP_GRACE_PERIOD": "vllm_gpu_stop_grace_period",
}
# Ansible hides a secret wherever it occurs in what a module returns; a short one occurs in anything.
SHORTEST_SECRET = 8
_MAY_BE_EMPTY = ("VLLM_EXTRA_ARGS",)
_CACHES = ("HF_CACHE", "VLLM_CACHE", "VLLM_MODELS")

# Options of vLLM that the role decides or relies on, and what to set instead.
_OWN_OPTIONS: Dict[str, str] = {
    "--model": "vllm_gpu_model",
    "--host": "vllm_gpu_bind_address",
    "--port": "vllm_gpu_port",
    "--uds": "vllm_gpu_bind_address and vllm_gpu_port",
    "--gpu-memory-utilization": "vllm_gpu_memory_utilization",
    "--api-key": "vllm_gpu_api_key (arguments show in every process list)",
    "--hf-token": "vllm_gpu_hf_token (arguments show in every process list)",
    "--download-dir": "vllm_gpu_hf_cache",
    "--headless": "nothing: the API is what proves the server",
    "--config": "vllm_gpu_extra_args itself: a file could set any other option unseen",
    "--ssl-keyfile": "a proxy in front of the server for TLS: its health is asked for by HTTP",
    "--ssl-certfile": "a proxy in front of the server for TLS: its health is asked for by HTTP",
    "--root-path": "a proxy in front of the server for another path",
}
# These spread a model over several GPUs; the server is given one.
_ONE_GPU = {
    "--tensor-parallel-size": "-tp",
    "--pipeline-parallel-size": "-pp",
    "--data-parallel-size": "-dp",
}

# Environment variables that would break what the role promises, and why.
_CARD = "gpu_device_id alone decides which GPU the server gets"
_MOUNTED = "it would move a cache off its mount; use vllm_gpu_hf_cache and vllm_gpu_compile_cache"
_RESERVED: Dict[str, str] = {
    "VLLM_PORT": "vLLM takes it for its internal ports; the API's port is vllm_gpu_port",
    "CUDA_VISIBLE_DEVICES": _CARD,
    "NVIDIA_VISIBLE_DEVICES": _CARD,
    "NVIDIA_DRIVER_CAPABILITIES": "the image sets what vLLM needs",
    "HUGGING_FACE_HUB_TOKEN": "use vllm_gpu_hf_token",
    "HF_HOME": _MOUNTED,
    "HF_HUB_CACHE": _MOUNTED,
    "HUGGINGFACE_HUB_CACHE": _MOUNTED,
    "TRANSFORMERS_CACHE": _MOUNTED,
    "VLLM_CACHE_ROOT": _MOUNTED,
    "XDG_CACHE_HOME": _MOUNTED,
    "HOME": _MOUNTED,
    "PATH": "the image sets it",
}


def secrets(wanted: Mapping[str, Any]) -> Dict[str, str]:
    """Return the keys of .env whose values nobody may see."""
    return {key: str(value) for key, value in {**wanted["secrets"], **wanted["secret_env"]}.items()}


def env_keys(wanted: Mapping[str, Any]) -> Dict[str, str]:
    """Return all keys of .env that the role decides, with their values."""
    return {
        key: str(value) for key, value in {**wanted["env"], **wanted["server_env"], **secrets(wanted)}.items()
    }


def weak_secrets(wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each secret that can't be hidden without hiding something that the role needs."""
    others = [str(one) for one in (wanted["project_dir"], *wanted["env"].values())]
    for key, value in secrets(wanted).items():
        if value and (len(value) < SHORTEST_SECRET or any(value in one for one in others)):
            yield (
                "{0} is shorter than {1} characters, or also appears in another setting (model, image, path …), so that "
                "it can't be hidden. Give the right one; for an API key, a random one such as `openssl rand -hex 24` "
                "prints.".format(VARIABLES.get(key, key), SHORTEST_SECRET)
            )


def words(extra_args: Union[str, Sequence[Any], None]) -> List[str]:
    """Return vllm_gpu_extra_args as the words that vLLM must get; a text is split as a shell would."""
    if not isinstance(extra_args, str):
        return [str(one) for one in extra_args or []]
    try:
        return shlex.split(extra_args)
    except ValueError as error:
        raise Problem(
            "vllm_gpu_extra_args can't be split into words ({0}). Give it as a list, one word an "
            "element.".format(error)
        ) from error


def check(wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with the values of the role's variables."""
    env = {key: str(value) for key, value in wanted["env"].items()}
    for key, value in env.items():
        if not value.strip() and key in VARIABLES and key not in _MAY_BE_EMPTY:
            yield "{0} is empty. Give it a value, or leave it out for its default.".format(VARIABLES[key])
    yield from _check_directory(str(wanted["project_dir"]))
    yield from _check_address(env["VLLM_BIND_ADDRESS"])
    if not re.match(r"[1-9][0-9]{0,4}\Z", env["VLLM_PORT"]) or int(env["VLLM_PORT"]) > 65535:
        yield "vllm_gpu_port is {0}; it must be a whole number from 1 to 65535.".format(env["VLLM_PORT"])
    yield from _check_utilization(env["VLLM_GPU_MEMORY_UTILIZATION"])
    if env["VLLM_MODEL"].startswith("-"):
        yield "vllm_gpu_model is {0}, which vLLM would take for an option.".format(env["VLLM_MODEL"])
    for key in _CACHES:
        if not re.match(r"(/[^:]*|[\w.-]*)\Z", env[key]):
            yield (
                "{0} is {1}; it must be an absolute path without a colon, or the default, which is the name of a "
                "volume.".format(VARIABLES[key], env[key])
            )
    try:
        yield from _check_options(words(wanted["extra_args"]))
    except Problem as problem:
        yield str(problem)
    for key, value in wanted["secrets"].items():
        if not re.match(r"[!-~]*\Z", str(value)):
            yield (
                "{0} has a blank, a line break or a character outside ASCII, which a header of HTTP can't carry. "
                "Use letters, digits and punctuation.".format(VARIABLES[key])
            )
    yield from weak_secrets(wanted)
    yield from _check_server_env(wanted)


def _check_directory(path: str) -> Iterator[str]:
    if not re.match(r"/[^\x00-\x1f:]*[^\x00-\x1f:/]", path) or "/../" in path + "/":
        yield "vllm_gpu_project_dir is {0}; it must be the absolute path of a directory of its own.".format(
            path
        )


def _check_address(address: str) -> Iterator[str]:
    try:
        ipaddress.ip_address(address[1:-1] if address.startswith("[") else address)
    except ValueError:
        yield (
            "vllm_gpu_bind_address is {0}; it must be an IP address of the host, such as 127.0.0.1, ::1 or "
            "0.0.0.0.".format(address)
        )


def _check_utilization(text: str) -> Iterator[str]:
    try:
        share = float(text)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        yield "vllm_gpu_memory_utilization is {0}; it must be a number above 0 and up to 1, such as 0.90.".format(
            text
        )


def _check_options(arguments: Sequence[str]) -> Iterator[str]:
    for position, word in enumerate(arguments):
        name, _is, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        for own, instead in _OWN_OPTIONS.items():
            # vLLM's parser takes an option's beginning for the whole of it where that is clear.
            if name == own or (len(name) > 4 and own.startswith(name) and name != "--mode"):
                yield "vllm_gpu_extra_args has {0}, which is the role's own. Use {1}.".format(name, instead)
        for spread, short in _ONE_GPU.items():
            if name in (spread, short):
                following = [*arguments[position + 1 : position + 2], ""]
                if (value or following[0]) != "1":
                    yield (
                        "vllm_gpu_extra_args has {0}: the server gets exactly one GPU, so that only 1 is "
                        "possible.".format(name)
                    )


def _check_server_env(wanted: Mapping[str, Any]) -> Iterator[str]:
    plain, secret = wanted["server_env"], wanted["secret_env"]
    for key, value in plain.items():
        if outgoing.SECRET_NAME.search(key) and len(str(value)) >= SHORTEST_SECRET:
            yield "vllm_gpu_env has {0}, which looks like a secret. Put it in vllm_gpu_secret_env.".format(
                key
            )
    for key in sorted({*plain} & {*secret}):
        yield "{0} is in vllm_gpu_env and in vllm_gpu_secret_env. Keep one of them.".format(key)
    for key in [*plain, *secret]:
        if not re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", key):
            yield "vllm_gpu_env has {0}, which is no name of an environment variable.".format(key)
        elif key in VARIABLES and key != "VLLM_PORT":
            yield "vllm_gpu_env has {0}. Use {1}, which sets it.".format(key, VARIABLES[key])
        elif key in wanted["env"] and key != "VLLM_PORT":
            yield "vllm_gpu_env has {0}, which the role sets for itself.".format(key)
        elif key in _RESERVED:
            yield "vllm_gpu_env has {0}: {1}.".format(key, _RESERVED[key])
