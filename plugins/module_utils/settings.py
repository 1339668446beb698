# SPDX-License-Identifier: MIT
"""Check the values of the role's variables, before Compose, Docker or vLLM trip over them.

Each problem names the variable and what to type instead.
"""

from __future__ import annotations

import ipaddress
import json
import posixpath
import re
import shlex
from typing import Any, Iterator, Mapping, Sequence

from . import outgoing
from .shell import Problem

# The role's variable for each key of .env that the role sets.
VARIABLES: dict[str, str] = {
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
# Values of vllm_gpu_force.
FORCE = ("drift", "exposure", "irreversible", "mig", "training")
# Ansible hides a secret wherever a module's result has it; a short one occurs in most texts.
SHORTEST_SECRET = 8
_MAY_BE_EMPTY = ("VLLM_EXTRA_ARGS",)
_CACHES = ("HF_CACHE", "VLLM_CACHE", "VLLM_MODELS")

# Options of vLLM that the role sets or relies on, and what to do instead.
_OWN_OPTIONS: dict[str, str] = {
    "--model": "Use vllm_gpu_model",
    "--host": "Use vllm_gpu_bind_address",
    "--port": "Use vllm_gpu_port",
    "--uds": "Use vllm_gpu_bind_address and vllm_gpu_port",
    "--gpu-memory-utilization": "Use vllm_gpu_memory_utilization",
    "--api-key": "Use vllm_gpu_api_key: everybody can see the arguments of a process",
    "--hf-token": "Use vllm_gpu_hf_token: everybody can see the arguments of a process",
    "--download-dir": "Use vllm_gpu_hf_cache",
    "--headless": "Remove it: the server is proven by its API",
    "--grpc": "Remove it: the server is proven by its HTTP API",
    "--config": "Use vllm_gpu_extra_args itself: a file could set any option unseen",
    "--ssl-keyfile": "Use a proxy in front of the server for TLS: the health check uses HTTP",
    "--ssl-certfile": "Use a proxy in front of the server for TLS: the health check uses HTTP",
    "--root-path": "Use a proxy in front of the server for another path",
}
_SERVED_NAME = "--served-model-name"
# Options that spread a model over several GPUs, and their short forms.
_ONE_GPU = {
    "--tensor-parallel-size": "-tp",
    "--pipeline-parallel-size": "-pp",
    "--data-parallel-size": "-dp",
    "--data-parallel-size-local": "-dpl",
    "--prefill-context-parallel-size": "-pcp",
    "--decode-context-parallel-size": "-dcp",
    "--nnodes": "-n",
}

# Environment variables that are refused, and why.
_CARD = "gpu_device_id alone decides which GPU the server gets"
_MOUNTED = "it would move a cache off its mount; use vllm_gpu_hf_cache and vllm_gpu_compile_cache"
_RESERVED: dict[str, str] = {
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


def forced(word: str) -> str:
    """Return what to type to override a refusal."""
    return f"-e '{json.dumps({'vllm_gpu_force': [word]})}'"


def secrets(wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys and values of .env that must never be shown."""
    return {key: str(value) for key, value in {**wanted["secrets"], **wanted["secret_env"]}.items()}


def text(value: Any) -> str:
    """Return a variable's value as text; null is empty."""
    return "" if value is None else str(value)


def env_keys(wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return all keys and values of .env that the role sets."""
    return {
        key: text(value)
        for key, value in {**wanted["env"], **wanted["server_env"], **secrets(wanted)}.items()
    }


def weak_secrets(wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield a problem for each secret that can't be hidden without hiding something that the role needs."""
    others = [str(text) for text in (wanted["project_dir"], *wanted["env"].values())]
    for key, value in secrets(wanted).items():
        name = VARIABLES[key] if key in wanted["secrets"] else f"{key} of vllm_gpu_secret_env"
        if value and (len(value) < SHORTEST_SECRET or any(value in other for other in others)):
            yield (
                f"{name} is shorter than {SHORTEST_SECRET} characters, or also appears in another setting (model, "
                "image, path …), so it can't be hidden. Use another one; for an API key, for example the output of "
                "`openssl rand -hex 24`."
            )


def words(extra_args: Any) -> list[str]:
    """Return vllm_gpu_extra_args as a list; a text is split as a shell would."""
    if not isinstance(extra_args, str):
        found = [] if extra_args is None else extra_args
        if not isinstance(found, list) or not all(map(_is_word, found)):
            raise Problem(
                f"vllm_gpu_extra_args is {json.dumps(found)}; it must be a list of strings and numbers, one "
                "command-line word per element, or one string. Quote JSON and words such as true."
            )
        return [str(word) for word in found]
    try:
        return shlex.split(extra_args)
    except ValueError as error:
        raise Problem(
            f"vllm_gpu_extra_args can't be split into words ({error}). Give it as a list, one word per "
            "element."
        ) from error


def _is_word(value: Any) -> bool:
    """Return whether a value has only one spelling: `true`, `null`, lists and dicts have several."""
    return isinstance(value, (str, int, float)) and not isinstance(value, bool)


def _is_one_line(text: str) -> bool:
    """Return whether a line of .env can hold a text."""
    return not re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", text)


def check(wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield the problems of the role's variables."""
    env = {key: text(value) for key, value in wanted["env"].items()}
    yield from _check_texts(env)
    yield from _check_directory(str(wanted["project_dir"]))
    yield from _check_address(env["VLLM_BIND_ADDRESS"])
    if not re.match(r"[1-9][0-9]{0,4}\Z", env["VLLM_PORT"]) or int(env["VLLM_PORT"]) > 65535:
        yield f"vllm_gpu_port is {env['VLLM_PORT']}; it must be a whole number from 1 to 65535."
    yield from _check_utilization(env["VLLM_GPU_MEMORY_UTILIZATION"])
    if env["VLLM_MODEL"].startswith("-"):
        yield f"vllm_gpu_model is {env['VLLM_MODEL']}, which vLLM would read as an option."
    for key in _CACHES:
        if not re.match(r"(/[^:]*|[A-Za-z0-9][\w.-]*)\Z", env[key]):
            yield (
                f"{VARIABLES[key]} is {env[key]}; it must be an absolute path without a colon, or the default, "
                "which is the name of a volume."
            )
    try:
        yield from _check_options(words(wanted["extra_args"]))
    except Problem as problem:
        yield str(problem)
    for key, value in wanted["secrets"].items():
        if not re.match(r"[!-~]*\Z", str(value)):
            yield (
                f"{VARIABLES[key]} has a space, a line break or a non-ASCII character, which an HTTP header can't "
                "hold. Use ASCII letters, digits and punctuation."
            )
    yield from weak_secrets(wanted)
    yield from _check_server_env(wanted)


def _check_texts(env: Mapping[str, str]) -> Iterator[str]:
    for key, value in env.items():
        if not value.strip() and key in VARIABLES and key not in _MAY_BE_EMPTY:
            yield f"{VARIABLES[key]} is empty. Give it a value, or remove it to use its default."
        if not _is_one_line(value):
            yield (
                f"{VARIABLES.get(key, key)} has a line break or another control character, which .env can't hold. "
                "Remove it."
            )


def _check_directory(path: str) -> Iterator[str]:
    own = posixpath.normpath(path).lstrip("/")
    if (
        not path.startswith("/")
        or not own
        or ".." in path.split("/")
        or ":" in path
        or not _is_one_line(path)
    ):
        yield (
            f"vllm_gpu_project_dir is {path}; it must be the absolute path of a directory of its own, without a "
            "colon."
        )


def _check_address(address: str) -> Iterator[str]:
    # Compose needs IPv6 in brackets, and Docker takes no zone.
    bare = address[1:-1] if re.match(r"\[[^]]*:[^]]*\]\Z", address) else address
    try:
        if "%" in bare:
            raise ValueError
        ip = ipaddress.ip_address(bare)
        if ip.is_multicast or ip == ipaddress.ip_address("255.255.255.255"):
            raise ValueError
    except ValueError:
        yield (
            f"vllm_gpu_bind_address is {bare}; it must be an IP address of the host, such as 127.0.0.1, ::1 or "
            "0.0.0.0."
        )


def _check_utilization(text: str) -> Iterator[str]:
    # float() would also accept spaces and digits of other scripts.
    if not re.match(r"(0?\.[0-9]+|[01](\.[0-9]*)?|[0-9.]+[eE]-[0-9]+)\Z", text) or not 0 < float(text) <= 1:
        yield f"vllm_gpu_memory_utilization is {text}; it must be a number above 0 and up to 1, such as 0.90."


def _check_options(arguments: Sequence[str]) -> Iterator[str]:
    if arguments and not arguments[0].startswith("-"):
        yield f"vllm_gpu_extra_args starts with {arguments[0]}, which is not an option. Put the option before it."
    for position, word in enumerate(arguments):
        name, _is, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        for own, instead in _OWN_OPTIONS.items():
            # vLLM accepts unambiguous abbreviations of an option.
            if len(name) > 2 and own.startswith(name):
                yield f"vllm_gpu_extra_args has {name}, which is not allowed there. {instead}."
        if len(name) > 2 and _SERVED_NAME.startswith(name) and name != _SERVED_NAME:
            yield f"vllm_gpu_extra_args has {name}. Write {_SERVED_NAME} in full, as the role reads it."
        for spread, short in _ONE_GPU.items():
            joined = re.match(short + r"([0-9]+)\Z", word)
            if name == short or joined or (len(name) > 2 and spread.startswith(name)):
                count = joined.group(1) if joined else value or [*arguments[position + 1 :], ""][0]
                if count != "1":
                    yield f"vllm_gpu_extra_args has {name}: the server gets exactly one GPU, so only 1 is possible."
                break


def _check_server_env(wanted: Mapping[str, Any]) -> Iterator[str]:
    plain, secret = wanted["server_env"], wanted["secret_env"]
    for key in sorted({*plain} & {*secret}):
        yield f"{key} is in vllm_gpu_env and in vllm_gpu_secret_env. Keep one of them."
    for key, value in plain.items():
        if any(len(secret) >= SHORTEST_SECRET for secret in outgoing.secret_values({key: value})):
            yield f"vllm_gpu_env has {key}, which looks like a secret. Put it in vllm_gpu_secret_env."
    for variable, given in (("vllm_gpu_env", plain), ("vllm_gpu_secret_env", secret)):
        for key, value in given.items():
            problem = _name_problem(key, wanted["compose"]) or _value_problem(value)
            if problem:
                yield f"{variable} has {key}{problem}"


def _name_problem(key: str, compose_file: str) -> str | None:
    if not re.match(r"[A-Za-z_][A-Za-z0-9_]*\Z", key):
        return ", which is not a valid name of an environment variable."
    if key in _RESERVED:
        return f": {_RESERVED[key]}."
    if key in VARIABLES:
        return f". Use {VARIABLES[key]}, which sets it."
    if key in re.findall(r"\$\{(\w+)", compose_file):
        return ", which the compose file uses itself and doesn't pass on."
    if re.match("COMPOSE_|DOCKER_", key):
        return ", which Compose would read as one of its own settings."
    return None


def _value_problem(value: Any) -> str | None:
    if not _is_word(value):
        return ", whose value is not text. Quote it."
    if not _is_one_line(str(value)):
        return ", whose value has a line break or another control character, which .env can't hold."
    return None
