# SPDX-License-Identifier: MIT
"""Call Docker Compose, which alone decides what the service's files mean."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
from typing import Any, Iterator, Mapping, Sequence

from . import docker, settings, shell
from .advice import with_advice
from .paths import COMPOSE_FILE, ENV_FILE
from .shell import Problem

SERVICE = "vllm"
# What the docker command needs of the user's environment. Nothing else, so that .env alone decides.
_NEEDED = ("PATH", "HOME", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "TMPDIR")
# How long Compose may take to stop when it is terminated; seconds.
_ENDING = 15


def _environment() -> dict[str, str]:
    return {key: os.environ[key] for key in _NEEDED if key in os.environ}


def _command(project: str, project_dir: str, compose_file: str, env_file: str) -> list[str]:
    project_options = ["--project-name", project, "--project-directory", project_dir]
    return ["compose", "--ansi", "never", *project_options, "--file", compose_file, "--env-file", env_file]


def _config(files: Mapping[str, bytes], project_dir: str, project: str, *options: str) -> str:
    """Return what `docker compose config` prints for files that need not be on the host yet: it reads them from memory."""
    with shell.memory_file(files[COMPOSE_FILE]) as compose_file, shell.memory_file(
        files[ENV_FILE]
    ) as env_file:
        paths = [f"/proc/{os.getpid()}/fd/{stream.fileno()}" for stream in (compose_file, env_file)]
        command = [*_command(project, project_dir, *paths), "config", *options]
        output = docker.run(command, env=_environment())
    if output.code != 0:
        message = output.err.replace(paths[0], COMPOSE_FILE).replace(paths[1], ENV_FILE)
        raise Problem(explain(message, project_dir))
    return output.out


def resolve(files: Mapping[str, bytes], project_dir: str, project: str) -> dict[str, Any]:
    """Return the service as Compose itself resolves it."""
    printed = _config(files, project_dir, project, "--format", "json")
    # Compose doubles each $ in its output.
    return dict(json.loads(printed.replace("$$", "$"))["services"][SERVICE])


def config_hash(files: Mapping[str, bytes], project_dir: str, project: str) -> str:
    """Return the hash that Compose labels the container with: another one means that `up` would recreate it."""
    return _config(files, project_dir, project, "--hash", SERVICE).split()[-1]


def up(project: str, project_dir: str, *, always: bool, timeout: int) -> None:
    """Bring the server up from the files in `project_dir`; raise Problem, with Compose's message, where that fails."""
    command = _command(
        project, project_dir, *(os.path.join(project_dir, name) for name in (COMPOSE_FILE, ENV_FILE))
    )
    # Options of the oldest supported Compose.
    command += ["up", "--detach", "--no-color", "--quiet-pull", "--pull", "never"]
    command += ["--force-recreate"] if always else []
    output = docker.run(command, env=_environment(), timeout=timeout, ending=_ENDING)
    if output.code in (None, 124, 137):
        raise Problem(
            f"Docker Compose did not bring the server of {project_dir} up within {timeout} s, and was stopped. Check "
            "the Docker service (`systemctl status docker`, `journalctl -u docker`), and run the play again. Its "
            f"output: {output.err or 'none'}"
        )
    if output.code != 0:
        message = output.err or output.out.strip() or f"nothing, with exit code {output.code}"
        raise Problem(
            with_advice(
                f"Docker Compose could not bring the server of {project_dir} up. It reported: {message}"
            )
        )


def passed_on(compose_file: bytes) -> set[str]:
    """Return the names of the variables that a compose file passes on from `.env` to the server."""
    block = re.search(rb"^    environment:\n((?: {6}.*\n)*)", compose_file, re.MULTILINE)
    names = re.findall(rb"^ {6}(\w+):[ \t]*$", block.group(1), re.MULTILINE) if block else []
    return {name.decode() for name in names}


def named(compose_file: bytes) -> set[str]:
    """Return the keys of `.env` that a compose file uses."""
    used = re.findall(rb"\$\{(\w+)", compose_file)
    return passed_on(compose_file) | {name.decode() for name in used}


def explain(message: str, project_dir: str) -> str:
    """Return why Compose refused, with a fix for known causes."""
    if re.search("is not a docker command|unknown shorthand flag|unknown flag", message):
        return (
            "Docker has no Compose plugin here (`docker compose version` fails). Install the package "
            "docker-compose-plugin, docker-compose-v2 or docker-compose of your distribution, "
            f"{docker.OLDEST_COMPOSE} or newer."
        )
    volume = re.search(r"undefined volume ([\w.-]+)", message)
    if volume:
        return (
            f"{volume.group(1)} is neither a path nor one of the service's volumes. Give vllm_gpu_hf_cache, "
            "vllm_gpu_compile_cache and vllm_gpu_models as absolute paths, or leave their defaults."
        )
    # What follows comes from `.env`.
    message = re.sub(r"(is missing a value:).*", r"\1 (hidden)", message)
    cure = ""
    if re.search(r"invalid (interpolation|template)", message, re.IGNORECASE):
        cure = " Put a value with a $ in single quotes."
    if "invalid command line string" in message:
        cure = " Give vllm_gpu_extra_args as a list, one word per element, and the model without quotes."
    return f"Compose can't use the configuration for {project_dir}: {message or 'no message'}{cure}"


# Mount points by their keys in .env.
_MOUNTS = {
    "HF_CACHE": "/root/.cache/huggingface",
    "VLLM_CACHE": "/root/.cache/vllm",
    "VLLM_MODELS": "/models",
}


def command(wanted: Mapping[str, Any]) -> list[str]:
    """Return the arguments of vLLM."""
    env, extra_args = wanted["env"], settings.words(wanted["extra_args"])
    return [
        env["VLLM_MODEL"], "--host", "0.0.0.0", "--port", "8000",  # noqa: S104 - inside the container
        "--gpu-memory-utilization", env["VLLM_GPU_MEMORY_UTILIZATION"], *extra_args,
    ]  # fmt: skip


def contradictions(service: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Yield where the resolved service differs from what was requested, for example because a value has a quote."""
    env = wanted["env"]
    words, requested = [str(word) for word in service.get("command") or []], command(wanted)
    if words != requested:
        yield (
            f"vLLM would be started with the arguments {shlex.join(words)}, not with {shlex.join(requested)}: "
            "Compose splits vllm_gpu_extra_args and vllm_gpu_model differently. Give vllm_gpu_extra_args as a list, "
            "one word per element, and the model without quotes."
        )
    if service.get("image") != env["VLLM_IMAGE"]:
        yield f"The image would be {service.get('image')}, not {env['VLLM_IMAGE']}. Correct vllm_gpu_image."
    port = (service.get("ports") or [{}])[0]
    found = (str(port.get("host_ip")), str(port.get("published")), port.get("target"))
    if found != (env["VLLM_BIND_ADDRESS"].strip("[]"), env["VLLM_PORT"], 8000):
        yield (
            f"The API would be published on {found[0]}:{found[1]}, not on {env['VLLM_BIND_ADDRESS']}:{env['VLLM_PORT']}. "
            "Correct vllm_gpu_bind_address and vllm_gpu_port."
        )
    mounts = {str(mount.get("target")): str(mount.get("source")) for mount in service.get("volumes") or []}
    for key, target in _MOUNTS.items():
        if os.path.normpath(mounts.get(target, "")) != os.path.normpath(env[key]):
            found_source = mounts.get(target, "Nothing")
            yield f"{found_source} would be mounted at {target}, not {env[key]}. Correct {settings.VARIABLES[key]}."
    environment_of = service.get("environment") or {}
    for key, value in {**wanted["server_env"], **settings.secrets(wanted)}.items():
        if str(environment_of.get(key) or "") != str(value):
            yield f"{key} would not reach the server unchanged. Use a value on one line."


def check_service(service: Mapping[str, Any]) -> None:
    """Raise Problem for a service that can't come from this role's compose file."""
    ports = service.get("ports") or [{}]
    if not service.get("command") or not str(ports[0].get("published", "")).isdigit():
        raise Problem(
            f"{COMPOSE_FILE} has been edited by hand: its service {SERVICE} has no command or publishes "
            "no port. Run serve.yml, which replaces the file."
        )


def option(command: Sequence[str], name: str) -> list[str]:
    """Return the values of an option of vLLM where it occurs last; `_` counts as `-`."""
    values: list[str] = []
    for position, word in enumerate(command):
        head, is_pair, value = word.partition("=")
        if head.replace("_", "-") == name:
            following = itertools.takewhile(
                lambda text: not re.match("-[A-Za-z-]", text), command[position + 1 :]
            )
            values = [value] if is_pair else list(following)
    return values
