# SPDX-License-Identifier: MIT
"""Read one host's GPUs, files and vLLM server, and compare them with what is wanted.

Everything here only reads. `read()` is the one look that the role takes: before
it changes anything, in check mode, and afterwards as the proof.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import urllib.error
import urllib.request
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv

COMPOSE_FILE = "docker-compose.serving.yml"
ENV_FILE = ".env"
REFEREE = "check_gpu_allocation.sh"
SERVICE = "vllm"
CONTAINER = "vllm-server"

# One call of the docker CLI; seconds. An engine that takes longer is stuck.
_ENGINE_TIMEOUT = 20
_API_TIMEOUT = 5
_UUID = r"GPU-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_GPU_ID = re.compile(r"(?:0|[1-9][0-9]{0,2}|" + _UUID + r")\Z", re.ASCII)
# Causes of the referee that say "no card or engine to work with", not "no
# server yet": nothing can be served before they are cured.
_HOST_CAUSES = (
    "nvidia_smi_missing",
    "nvidia_smi_timeout",
    "nvidia_smi_failed",
    "nvidia_smi_unparsable",
    "driver_not_loaded",
    "driver_library_mismatch",
    "gpu_lost",
    "no_devices",
    "docker_missing",
    "docker_timeout",
    "docker_failed",
    "docker_unparsable",
    "engine_not_running",
    "engine_permission",
)
_INSPECT = (
    '{"id":{{json .Id}},"state":{{json .State}},"image_id":{{json .Image}},'
    '"image":{{json .Config.Image}},"labels":{{json .Config.Labels}},'
    '"restarts":{{json .RestartCount}},"requests":{{json .HostConfig.DeviceRequests}}}'
)

WANTED_OPTIONS: Dict[str, Any] = {
    "project_dir": {"type": "path", "required": True},
    "compose": {"type": "str", "required": True},
    "referee": {"type": "str", "required": True},
    "env_example": {"type": "str", "required": True},
    "env": {"type": "dict", "required": True},
    "secrets": {"type": "dict", "default": {}, "no_log": True},
}


class Output(NamedTuple):
    """What a command left behind; `code` is None when it ran into its time limit."""

    code: Optional[int]
    out: str
    err: str


class FileChange(NamedTuple):
    """A file that the host should have; `before` is None where there is none."""

    path: str
    before: Optional[bytes]
    after: bytes
    mode: int
    differs: bool


class Problem(Exception):  # noqa: N818 - it is a finding, for a person
    """A reason not to touch the host, with its cure, as one text for a person."""


def run(argv: Sequence[str], stdin: bytes = b"", env: Optional[Mapping[str, str]] = None) -> Output:
    """Run `argv` without a shell, for at most the engine's time limit."""
    try:
        done = subprocess.run(
            argv, input=stdin, capture_output=True, timeout=_ENGINE_TIMEOUT, check=False, env=env
        )
    except subprocess.TimeoutExpired:
        return Output(None, "", "no answer in {0} s".format(_ENGINE_TIMEOUT))
    except OSError as error:
        return Output(127, "", str(error))
    return Output(
        done.returncode,
        done.stdout.decode("utf-8", "replace"),
        done.stderr.decode("utf-8", "replace").strip(),
    )


def describe(gpus: Sequence[Mapping[str, Any]]) -> str:
    """Say which cards there are: `0 (NVIDIA GeForce RTX 5090, GPU-…) or 1 (…)`."""
    return " or ".join("{index} ({name}, {uuid})".format(**gpu) for gpu in gpus)


def find_gpu(requested: str, gpus: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the card that `requested` (an index or a UUID) names.

    Raises Problem, naming the cards that it could be, for anything else. The
    spelling is checked first: what isn't one plain id reaches no command.
    """
    choice = "It could be {0}.".format(describe(gpus)) if gpus else "This host shows no GPU."
    if not _GPU_ID.match(requested):
        raise Problem(
            "gpu_device_id is {0}, which is not the id of one GPU: it must be an index such as 0, or a UUID "
            "such as GPU-0a1b2c3d-…. {1}".format(json.dumps(requested), choice)
        )
    for gpu in gpus:
        if requested in (str(gpu["index"]), gpu["uuid"]):
            return gpu
    raise Problem("gpu_device_id is {0}, but this host has no such GPU. {1}".format(requested, choice))


def referee(script: str, expect: Optional[str]) -> Dict[str, Any]:
    """Return the referee's JSON verdict (see docs/check_gpu_allocation.md).

    The script comes over stdin, so the host is judged by this version of it,
    also before it was ever installed there.
    """
    argv = ["bash", "-s", "--", "--json", "--container", CONTAINER]
    output = run(argv + (["--expect", expect] if expect is not None else []), script.encode())
    try:
        verdict = json.loads(output.out)
    except ValueError:
        raise Problem(
            "The referee ({0}) gave no verdict: {1}".format(
                REFEREE, output.err or "exit code {0}".format(output.code)
            )
        ) from None
    return dict(verdict)


def read_file(path: str) -> Tuple[Optional[bytes], int, int]:
    """Return a file's bytes, mode and owner, or (None, 0, 0) where there is none."""
    try:
        with open(path, "rb") as stream:
            status = os.fstat(stream.fileno())
            return stream.read(), stat.S_IMODE(status.st_mode), status.st_uid
    except FileNotFoundError:
        return None, 0, 0
    except OSError as error:
        raise Problem(
            "{0} can't be read: {1}. Make it a readable file, or move it away.".format(path, error.strerror)
        ) from error


def installed_files(directory: str) -> List[FileChange]:
    """Return the service's files as they are; Problem where a needed one is missing."""
    files = []
    for name in (COMPOSE_FILE, ENV_FILE):
        path = os.path.join(directory, name)
        content, mode, _owner = read_file(path)
        if content is None:
            raise Problem(
                "{0} is not there: no server was set up on this host yet. Run serve.yml first.".format(path)
            )
        files.append(FileChange(path, content, content, mode, differs=False))
    return files


def compare_files(wanted: Mapping[str, Any]) -> List[FileChange]:
    """Return the three files as they are and as they should be, `.env` merged."""
    directory = wanted["project_dir"]
    changes = []
    for name, content, mode in (
        (COMPOSE_FILE, wanted["compose"], 0o644),
        (ENV_FILE, None, 0o600),
        (REFEREE, wanted["referee"], 0o755),
    ):
        path = os.path.join(directory, name)
        before, mode_now, owner = read_file(path)
        if content is None:
            base = wanted["env_example"].encode() if before is None else before
            keys = {key: str(value) for key, value in dict(wanted["env"], **wanted["secrets"]).items()}
            try:
                after = dotenv.merge(base, keys)
            except ValueError as error:
                raise Problem(
                    "{0}: {1}. Mend that line, or move the file away.".format(path, error)
                ) from error
        else:
            after = content.encode()
        differs = (before, mode_now, owner) != (after, mode, os.geteuid())
        changes.append(FileChange(path, before, after, mode, differs))
    return changes


def describe_changes(files: Sequence[FileChange], wanted: Mapping[str, Any]) -> List[str]:
    """Say in short sentences what would change; a secret only by its key."""
    sentences = []
    for change in files:
        if change.before is None:
            sentences.append("{0} is new".format(change.path))
        elif change.before == change.after:
            sentences.append(
                "{0} gets mode {1:04o} and this user as its owner".format(change.path, change.mode)
            )
        elif not change.path.endswith("/" + ENV_FILE):
            sentences.append("{0} changes".format(change.path))
        else:
            sentences.extend(describe_env(change.before, change.after, wanted))
    return sentences


def describe_env(content: bytes, merged: bytes, wanted: Mapping[str, Any]) -> List[str]:
    """Say which keys of an existing `.env` would change: `GPU 0 → 1`."""
    sentences = []
    before, after = dotenv.values(content), dotenv.values(merged)
    for key in list(wanted["env"]) + list(wanted["secrets"]):
        if before.get(key, "") == after.get(key):
            continue
        if key in wanted["secrets"]:
            sentences.append("{0} changes".format(key))
        else:
            name = "GPU" if key == "GPU_DEVICE_ID" else key
            sentences.append("{0} {1} → {2}".format(name, before.get(key) or "(unset)", after.get(key)))
    return sentences


def _memory_file(content: bytes) -> int:
    """Return a descriptor of a file that never touches the disk."""
    descriptor = os.memfd_create("vllm_gpu")
    os.write(descriptor, content)
    return descriptor


def resolve_service(
    files: Sequence[FileChange], project_dir: str, project: str
) -> Tuple[Dict[str, Any], str]:
    """Return the service as Compose itself resolves it, and its config hash.

    The files need not be on the host yet: Compose reads them from memory. The
    hash is the one that Compose puts on the container as a label, so "would
    `up` recreate it?" is answered by Compose and not by a copy of its rules.
    Keys that the host's environment exports are left out: `.env` decides.
    """
    by_name = {os.path.basename(change.path): change.after for change in files}
    keys = set(re.findall(r"\$\{([A-Za-z_][A-Za-z0-9_]*)", by_name[COMPOSE_FILE].decode()))
    env = {k: v for k, v in os.environ.items() if k not in keys and not k.startswith("COMPOSE_")}
    descriptors = [_memory_file(by_name[COMPOSE_FILE]), _memory_file(by_name[ENV_FILE])]
    try:
        paths = ["/proc/{0}/fd/{1}".format(os.getpid(), descriptor) for descriptor in descriptors]
        base = ["docker", "compose", "--project-name", project, "--project-directory", project_dir]
        base += ["--file", paths[0], "--env-file", paths[1], "config"]
        config = run([*base, "--format", "json"], env=env)
        hashed = run([*base, "--hash", SERVICE], env=env)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    if config.code != 0 or hashed.code != 0:
        raise Problem(explain_compose(config if config.code != 0 else hashed, project_dir))
    return dict(json.loads(config.out)["services"][SERVICE]), hashed.out.split()[-1]


def explain_compose(output: Output, project_dir: str) -> str:
    """Say why Compose refused, without quoting a line of `.env`, which may be a secret."""
    if (
        "is not a docker command" in output.err
        or "unknown shorthand flag" in output.err
        or "unknown flag" in output.err
    ):
        return (
            "Docker has no Compose plugin here (`docker compose version` fails). Install the package "
            "docker-compose-plugin, docker-compose-v2 or docker-compose of your distribution, 2.18 or newer."
        )
    where = re.search(r"/proc/\d+/fd/\d+: line (\d+)|line (\d+)", output.err)
    if where:
        return "{0}/{1} can't be read by Compose: look at line {2} of it.".format(
            project_dir, ENV_FILE, where.group(1) or where.group(2)
        )
    return "Compose refuses the configuration in {0}: {1}".format(project_dir, output.err)


def inspect_container() -> Optional[Dict[str, Any]]:
    """Return the server's container, or None; never its environment, which holds secrets."""
    output = run(["docker", "inspect", "--type", "container", "--format", _INSPECT, CONTAINER])
    if output.code != 0:
        return None
    raw = json.loads(output.out)
    labels = raw["labels"] or {}
    return {
        "id": raw["id"],
        "status": raw["state"]["Status"],
        "exit_code": raw["state"]["ExitCode"],
        "error": raw["state"].get("Error", ""),
        "started_at": raw["state"]["StartedAt"],
        "health": (raw["state"].get("Health") or {}).get("Status"),
        "restarts": raw["restarts"],
        "image": raw["image"],
        "image_id": raw["image_id"],
        "project": labels.get("com.docker.compose.project"),
        "config_hash": labels.get("com.docker.compose.config-hash"),
        "requested": [
            str(one) for request in raw["requests"] or [] for one in request.get("DeviceIDs") or []
        ],
    }


def image_id(image: str) -> Optional[str]:
    """Return the id of an image that the engine has, or None where it would be pulled."""
    output = run(["docker", "image", "inspect", "--format", "{{.Id}}", image])
    return output.out.strip() if output.code == 0 else None


def log_tail(count: int = 20) -> List[str]:
    """Return the last lines of the server's log, both streams."""
    output = run(["docker", "logs", "--tail", str(count), CONTAINER])
    return (output.out + output.err).splitlines()[-count:]


def base_url(service: Mapping[str, Any]) -> str:
    """Return where the API answers as seen from the host itself."""
    port = service["ports"][0]
    address = port.get("host_ip") or "127.0.0.1"
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - compared, not bound
    return "http://{0}:{1}".format("[" + address + "]" if ":" in address else address, port["published"])


def served_names(service: Mapping[str, Any]) -> List[str]:
    """Return the model names that the API must list, from the resolved command line."""
    command = [str(word) for word in service["command"]]
    names: List[str] = []
    for position, word in enumerate(command):
        if word.startswith("--served-model-name="):
            names = [word.split("=", 1)[1]]
        elif word == "--served-model-name":
            names = []
            for name in command[position + 1 :]:
                if name.startswith("-"):
                    break
                names.append(name)
    return names or command[:1]


def _get(url: str, key: str) -> Tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Authorization": "Bearer " + key} if key else {})  # noqa: S310
    # Never through a proxy: the server is on this very host.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_API_TIMEOUT) as answer:
            return int(answer.status), bytes(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return int(error.code), b""


def probe_api(service: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what the API says; `error` is None when every rung holds.

    The rungs: /health (the engine lives), /v1/models with our key (our model
    is the one served), and without it (the key is really asked for).
    """
    url = base_url(service)
    key = str((service.get("environment") or {}).get("VLLM_API_KEY") or "")
    result: Dict[str, Any] = {"url": url, "healthy": False, "models": [], "error": None}
    try:
        code, _body = _get(url + "/health", "")
        if code != 200:
            raise Problem("/health answers {0}".format(code))
        result["healthy"] = True
        code, body = _get(url + "/v1/models", key)
        if code != 200:
            raise Problem("/v1/models answers {0}{1}".format(code, " to the API key in .env" if key else ""))
        result["models"] = [model["id"] for model in json.loads(body)["data"]]
        missing = [name for name in served_names(service) if name not in result["models"]]
        if missing:
            raise Problem("it serves {0}, not {1}".format(", ".join(result["models"]), ", ".join(missing)))
        if key and _get(url + "/v1/models", "")[0] == 200:
            raise Problem("/v1/models answers without the API key that .env sets")
    except Problem as problem:
        result["error"] = str(problem)
    except (OSError, ValueError, KeyError) as error:
        result["error"] = "no answer from {0} ({1})".format(url, getattr(error, "reason", error))
    return result


def exported_secrets(wanted: Mapping[str, Any]) -> List[str]:
    """Return the secret keys that this user's environment exports on the host.

    Compose lets them beat `.env`. The role overrides every other key for its
    own call of Compose, but a secret can't be passed that way: it would stand
    in the process list.
    """
    known = ("VLLM_API_KEY", "HF_TOKEN")
    return [key for key in sorted({*known, *wanted["secrets"]}) if os.environ.get(key)]


def read(
    gpu_device_id: Optional[str], wanted: Mapping[str, Any], *, as_installed: bool = False
) -> Dict[str, Any]:
    """Take the one look: what is there, what is wanted, and what would change.

    Args:
        gpu_device_id: index or UUID of the card; None means the one that the
            container asked for.
        wanted: WANTED_OPTIONS, filled in.
        as_installed: judge the server by the files that the host has, not by
            the ones in `wanted`.

    Returns:
        `problems` (texts with their cures; nothing may be changed while there
        are any), `gpus`, `gpu` (the asked card), `changes` (sentences),
        `files_differ`, `recreate` (the container isn't the wanted one),
        `image_present`, `container`, `referee` (its verdict), `api`, and
        `proven`: the wanted container runs, on that card and no other, and
        its API answers.
    """
    problems: List[str] = []
    state: Dict[str, Any] = {
        "problems": problems,
        "gpus": [],
        "gpu": None,
        "changes": [],
        "files_differ": False,
        "recreate": True,
        "image": "",
        "image_present": False,
        "container": None,
        "referee": {},
        "api": {"url": "", "healthy": False, "models": [], "error": "it was not asked"},
        "doubts": [],
        "proven": False,
    }
    plain = gpu_device_id is None or bool(_GPU_ID.match(gpu_device_id))
    try:
        verdict = referee(wanted["referee"], gpu_device_id if plain else None)
    except Problem as problem:
        problems.append(str(problem))
        return state
    state["referee"] = {
        key: verdict.get(key) for key in ("verdict", "code", "cause", "message", "cure", "processes")
    }
    state["gpus"] = verdict.get("gpus") or []
    if verdict.get("cause") in _HOST_CAUSES:
        problems.append("{message} {cure}".format(**verdict))
    elif gpu_device_id is not None:
        try:
            state["gpu"] = find_gpu(gpu_device_id, state["gpus"])
        except Problem as problem:
            problems.append(str(problem))
    problems.extend(
        "{0} is exported in the environment of the user that Ansible becomes on this host, and would "
        "beat .env. Unset it there (look in /etc/environment and the shell's profile).".format(key)
        for key in exported_secrets(wanted)
    )
    try:
        files = installed_files(wanted["project_dir"]) if as_installed else compare_files(wanted)
        project = str(wanted["env"]["COMPOSE_PROJECT_NAME"])
        service, config_hash = resolve_service(files, wanted["project_dir"], project)
    except Problem as problem:
        problems.append(str(problem))
        return state
    state["files_differ"] = any(change.differs for change in files)
    state["changes"] = describe_changes([change for change in files if change.differs], wanted)
    state["image"] = service["image"]
    wanted_image = image_id(service["image"])
    state["image_present"] = wanted_image is not None
    container = state["container"] = inspect_container()
    if container and container["project"] != project:
        problems.append(
            "A container named {0} is there already, of {1}. It is not this role's to replace; when nobody "
            "needs it, remove it with: docker rm -f {0}".format(
                CONTAINER,
                "the Compose project " + container["project"]
                if container["project"]
                else "no Compose project",
            )
        )
        return state
    if container:
        state["recreate"] = container["config_hash"] != config_hash or container["image_id"] != wanted_image
        if container["status"] == "running":
            state["api"] = probe_api(service)
    state["doubts"] = doubts(state)
    state["proven"] = not problems and not state["doubts"]
    return state


def doubts(state: Mapping[str, Any]) -> List[str]:
    """Say what keeps the server from being proven, the most basic reason first."""
    container = state["container"]
    if container is None:
        return ["There is no container named {0}.".format(CONTAINER)]
    if container["status"] != "running":
        return ["The container is {0}.".format(container["status"])]
    reasons = []
    if state["recreate"]:
        reasons.append("The container was made from other settings or another image than these.")
    if state["referee"]["code"] != 0:
        reasons.append(state["referee"]["message"])
    if state["api"]["error"] is not None:
        reasons.append("API: {0}.".format(state["api"]["error"]))
    return reasons
