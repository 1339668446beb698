# SPDX-License-Identifier: MIT
"""Read one host's GPUs, files and vLLM server, and compare them with what is wanted.

Everything here only reads. `read()` is the one look that the role takes: before
it changes anything, in check mode, and afterwards as the proof.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import stat
import urllib.error
import urllib.request
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv, preflight, record, shell, trust
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem as Problem  # noqa: PLC0414 - the modules take it from here

COMPOSE_FILE = "docker-compose.serving.yml"
ENV_FILE = ".env"
REFEREE = "check_gpu_allocation.sh"
SERVICE = "vllm"
CONTAINER = "vllm-server"

# Seconds; a server that many clients fall upon at once may take some.
_API_TIMEOUT = 10
# Ansible hides a secret wherever it stands in what a module says; a short one stands in anything.
_SHORTEST_SECRET = 8
_INDEX = r"0|[1-9][0-9]{0,2}"
_UUID = r"(?:GPU|MIG)-[0-9A-Za-z/-]{1,80}"
_PCI_BUS_ID = r"(?:[0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]"
_GPU_ID = re.compile("(?:{0}|{1}|{2})\\Z".format(_INDEX, _UUID, _PCI_BUS_ID), re.ASCII)
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
_VERDICT = ("verdict", "code", "cause", "message", "cure", "processes", "other_processes")
_OWN_REQUESTS = re.compile(r'"GET /(health|v1/models) HTTP')
# StopTimeout by index: a container that was given none lacks the field.
_INSPECT = (
    '{"id":{{json .Id}},"state":{{json .State}},"image_id":{{json .Image}},'
    '"image":{{json .Config.Image}},"stop_timeout":{{json (index .Config "StopTimeout")}},"labels":{{json .Config.Labels}},'
    '"restarts":{{json .RestartCount}},"ports":{{json .HostConfig.PortBindings}},"requests":{{json .HostConfig.DeviceRequests}}}'
)

WANTED_OPTIONS: Dict[str, Any] = {
    "project_dir": {"type": "path", "required": True},
    "compose": {"type": "str", "required": True},
    "referee": {"type": "str", "required": True},
    "env_example": {"type": "str", "required": True},
    "env": {"type": "dict", "required": True},
    "secrets": {"type": "dict", "default": {}, "no_log": True},
}


def invocation(params: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a module's arguments without `wanted`: its 40 kB would stand in every event of every host."""
    return {"module_args": {key: value for key, value in params.items() if key != "wanted"}}


class FileChange(NamedTuple):
    """A file that the host should have; `before` is None where there is none."""

    path: str
    before: Optional[bytes]
    after: bytes
    mode: int
    differs: bool


def describe(gpus: Sequence[Mapping[str, Any]]) -> str:
    """Say which cards there are: `0 (NVIDIA GeForce RTX 5090, GPU-…) or 1 (…)`."""
    return " or ".join("{index} ({name}, {uuid})".format(**gpu) for gpu in gpus)


def find_gpu(requested: str, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the card, or MIG instance, that the referee took `requested` for.

    Raises Problem, naming the cards that it could be, for anything else. The
    spelling is checked first: what isn't one plain id reaches no command.
    """
    gpus = verdict.get("gpus") or []
    choice = "It could be {0}.".format(describe(gpus)) if gpus else "This host shows no GPU."
    if not _GPU_ID.match(requested):
        raise Problem(
            "gpu_device_id is {0}, which is not the id of one GPU: it must be an index such as 0, a UUID such as "
            "GPU-0a1b2c3d-…, or a PCI bus id such as 00000000:01:00.0 (in YAML within quotes: it is a number "
            "without). {1}".format(json.dumps(requested), choice)
        )
    gpu = expected_gpu(verdict)
    if gpu is None:
        raise Problem("gpu_device_id is {0}, but this host has no such GPU. {1}".format(requested, choice))
    return gpu


def expected_gpu(verdict: Mapping[str, Any]) -> Optional[Mapping[str, Any]]:
    """Return the card that the referee's verdict is about, or None."""
    expected = verdict.get("expected")
    for gpu in verdict.get("gpus") or []:
        if expected and gpu["index"] == expected["index"]:
            if gpu["uuid"] == expected["uuid"]:
                return dict(gpu)
            # A MIG instance: nvidia-smi gives the memory of the whole card only.
            return dict(
                gpu,
                uuid=expected["uuid"],
                card_uuid=gpu["uuid"],
                memory_total_mib=None,
                memory_used_mib=None,
            )
    return None


def referee(script: str, expect: Optional[str]) -> Dict[str, Any]:
    """Return the referee's JSON verdict (see docs/check_gpu_allocation.md).

    The script comes over stdin, so the host is judged by this version of it,
    also before it was ever installed there.
    """
    argv = ["bash", "-s", "--", "--json", "--deep", "--no-drift", "--container", CONTAINER]
    argv += ["--expect", expect] if expect is not None else []
    # It makes several calls, each with a limit of its own.
    output = shell.run(argv, script.encode(), timeout=3 * shell.TIMEOUT)
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
    found = trust.read(path)
    if found is None:
        return None, 0, 0
    return found.content, stat.S_IMODE(found.status.st_mode), found.status.st_uid


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
    files: Sequence[FileChange], project_dir: str, project: str, config_hash: Optional[str]
) -> Tuple[Dict[str, Any], str]:
    """Return the service as Compose itself resolves it, and its config hash.

    The files need not be on the host yet: Compose reads them from memory. The
    hash is the one that Compose puts on the container as a label, so "would
    `up` recreate it?" is answered by Compose and not by a copy of its rules;
    it is asked for only where `config_hash` doesn't tell it already.
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
        config = shell.run([*base, "--format", "json"], env=env)
        asked = shell.run([*base, "--hash", SERVICE], env=env) if config_hash is None else None
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    for output in filter(None, (config, asked)):
        if output.code != 0:
            said = output.err.replace(paths[0], COMPOSE_FILE)
            raise Problem(explain_compose(said, paths[1], by_name[ENV_FILE], project_dir))
    if asked:
        config_hash = asked.out.split()[-1]
    return dict(json.loads(config.out)["services"][SERVICE]), str(config_hash)


def explain_compose(said: str, env_path: str, env: bytes, project_dir: str) -> str:
    """Say why Compose refused, without quoting a value of `.env`, which may be a secret."""
    if re.search("is not a docker command|unknown shorthand flag|unknown flag", said):
        return (
            "Docker has no Compose plugin here (`docker compose version` fails). Install the package "
            "docker-compose-plugin, docker-compose-v2 or docker-compose of your distribution, 2.18 or newer."
        )
    if env_path in said:
        line = re.search(r"line (\d+)", said)
        where = (
            "look at line {0} of it".format(line.group(1)) if line else "a value with a $ needs single quotes"
        )
        return "{0}/{1} can't be read by Compose: {2}.".format(project_dir, ENV_FILE, where)
    volume = re.search(r"undefined volume ([\w.-]+)", said)
    if volume:
        return (
            "{0} is neither a path nor one of the service's volumes. Give vllm_gpu_hf_cache, vllm_gpu_compile_cache "
            "and vllm_gpu_models as absolute paths, or leave their defaults.".format(volume.group(1))
        )
    for one in dotenv.lines(env):
        text = one.value.decode("utf-8", "replace").strip(" '\"")
        if len(text) > 3:  # shorter ones are numbers, and words like `no`
            said = said.replace(text, "(hidden)")
    return "Compose refuses the configuration for {0}: {1}".format(project_dir, said)


def answered(output: shell.Output) -> None:
    """Raise Problem where docker gave no answer in time: that is no word about what is there."""
    if output.code is None:
        raise Problem(
            "docker gave {0}. Look what the engine is doing (`systemctl status docker`, `journalctl -u docker`), "
            "and run the play again.".format(output.err)
        )


def inspect_container() -> Optional[Dict[str, Any]]:
    """Return the server's container, or None; never its environment, which holds secrets."""
    output = shell.run(["docker", "inspect", "--type", "container", "--format", _INSPECT, CONTAINER])
    answered(output)
    if output.code != 0:
        return None
    raw = json.loads(output.out)
    labels = raw["labels"] or {}
    return {
        "id": raw["id"],
        "status": raw["state"]["Status"],
        "exit_code": raw["state"]["ExitCode"],
        "error": raw["state"].get("Error", ""),
        "oom_killed": raw["state"].get("OOMKilled", False),
        "started_at": raw["state"]["StartedAt"],
        "health": (raw["state"].get("Health") or {}).get("Status"),
        "was_ready": False,
        "restarts": raw["restarts"],
        "ports": [
            int(one["HostPort"])
            for bound in (raw["ports"] or {}).values()
            for one in bound or []
            if one["HostPort"].isdigit()
        ],
        "image": raw["image"],
        "image_id": raw["image_id"],
        "stop_timeout": raw["stop_timeout"] or 10,
        "project": labels.get("com.docker.compose.project"),
        "project_dir": labels.get("com.docker.compose.project.working_dir"),
        "config_hash": labels.get("com.docker.compose.config-hash"),
        "requested": [
            str(one) for request in raw["requests"] or [] for one in request.get("DeviceIDs") or []
        ],
    }


def image_id(image: str) -> Optional[str]:
    """Return the id of an image that the engine has, or None where it would be pulled."""
    output = shell.run(["docker", "image", "inspect", "--format", "{{.Id}}", image])
    answered(output)
    return output.out.strip() if output.code == 0 else None


def log_tail(count: int) -> List[str]:
    """Return the last lines of the server's log, both streams."""
    output = shell.run(["docker", "logs", "--tail", str(10 * count), CONTAINER])
    lines = (output.out + "\n" + output.err).splitlines()
    # Our own looks at the API are no news.
    return [line for line in lines if line.strip() and not _OWN_REQUESTS.search(line)][-count:]


def base_url(service: Mapping[str, Any]) -> str:
    """Return where the API answers as seen from the host itself."""
    port = service["ports"][0]
    address = port.get("host_ip") or "127.0.0.1"
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - compared, not bound
    return "http://{0}:{1}".format("[" + address + "]" if ":" in address else address, port["published"])


def served_names(service: Mapping[str, Any]) -> List[str]:
    """Return the model names that the API must list, from the resolved command line."""
    command = [str(word) for word in service["command"]]
    return preflight.option(command, "--served-model-name") or command[:1]


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


def probe_api(service: Mapping[str, Any], *, placed: bool) -> Dict[str, Any]:
    """Return what the API says; `error` is None when every rung holds.

    The rungs: /health (the engine lives), and, once it is `placed`, /v1/models
    with our key (our model is the one served), and without it (the key is
    really asked for).
    """
    url = base_url(service)
    key = str((service.get("environment") or {}).get("VLLM_API_KEY") or "")
    result: Dict[str, Any] = {"url": url, "healthy": False, "models": [], "error": None}
    try:
        code, _body = _get(url + "/health", "")
        if code != 200:
            raise Problem("/health answers {0}".format(code))
        result["healthy"] = True
        if not placed:
            return dict(result, error="it answers, and is asked for its models once it is on its GPU")
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
    except (OSError, http.client.HTTPException) as error:
        # Also where only /v1/models gave none: that is no word about what is served.
        reason = getattr(error, "reason", error)
        result.update(healthy=False, error="no answer from {0} ({1})".format(url, reason))
    except (ValueError, KeyError, TypeError) as error:
        result["error"] = "/v1/models answers with no list of models ({0})".format(error)
    return result


def exported_secrets(wanted: Mapping[str, Any]) -> List[str]:
    """Return the secret keys that this user's environment exports on the host.

    Compose lets them beat `.env`. The role overrides every other key for its
    own call of Compose, but a secret can't be passed that way: it would stand
    in the process list.
    """
    known = ("VLLM_API_KEY", "HF_TOKEN")
    return [key for key in sorted({*known, *wanted["secrets"]}) if os.environ.get(key)]


def weak_secrets(wanted: Mapping[str, Any]) -> List[str]:
    """Return the secret keys whose values can't be hidden without hiding something that the role needs."""
    others = [str(one) for one in (wanted["project_dir"], *wanted["env"].values())]
    return [
        key
        for key, value in wanted["secrets"].items()
        if value and (len(str(value)) < _SHORTEST_SECRET or any(str(value) in one for one in others))
    ]


def read_cards(gpu_device_id: Optional[str], wanted: Mapping[str, Any], state: Dict[str, Any]) -> None:
    """Ask the referee; fill in `referee`, `gpus`, `gpu` and `gpu_device_id`."""
    plain = gpu_device_id is None or bool(_GPU_ID.match(gpu_device_id))
    verdict = referee(wanted["referee"], gpu_device_id if plain else None)
    state["referee"] = {key: verdict.get(key) for key in _VERDICT}
    state["gpus"] = verdict.get("gpus") or []
    if verdict.get("cause") in _HOST_CAUSES:
        raise Problem("{message} {cure}".format(**verdict))
    if gpu_device_id is None:
        state["gpu"] = expected_gpu(verdict)
        return
    state["gpu"] = find_gpu(gpu_device_id, verdict)
    # An index stays one; every other spelling becomes the UUID, which the
    # engine understands, and which a reboot doesn't change.
    state["gpu_device_id"] = gpu_device_id if gpu_device_id.isdigit() else state["gpu"]["uuid"]


def check_owner(container: Mapping[str, Any], project: str, project_dir: str) -> None:
    """Raise Problem for a container that somebody else set up: it could not be gone back to."""
    if container["project"] != project:
        owner = "of {0}".format(
            "the Compose project " + container["project"] if container["project"] else "no Compose project"
        )
    elif os.path.realpath(container["project_dir"] or "/") != os.path.realpath(project_dir):
        owner = "started from {0} and not from {1}".format(container["project_dir"], project_dir)
    else:
        return
    raise Problem(
        "A container named {0} is there already, {1}. It is not this role's to replace; when nobody "
        "needs it, remove it with: docker rm -f {0}".format(CONTAINER, owner)
    )


def check_container(container: Optional[Mapping[str, Any]], seen: Mapping[str, Any]) -> None:
    """Raise Problem for a container that the referee has just `seen` and that is gone, and for a frozen one."""
    if container is None and (seen["code"] in (0, 1) or seen["cause"] == "no_process_yet"):
        raise Problem(
            "The container {0} was there a moment ago, and docker shows it no more: somebody is replacing it, or the "
            "engine is stopping (`systemctl status docker`). Run the play again.".format(CONTAINER)
        )
    if container and container["status"] == "paused":
        raise Problem("The container {0} is paused. Let it go on with: docker unpause {0}".format(CONTAINER))


def check_service(service: Mapping[str, Any]) -> None:
    """Raise Problem for a service that this role's compose file can't have made."""
    ports = service.get("ports") or [{}]
    if not service.get("command") or not str(ports[0].get("published", "")).isdigit():
        raise Problem(
            "{0} has been edited by hand: its service {1} has no command, or publishes no port. serve.yml writes "
            "its own again.".format(COMPOSE_FILE, SERVICE)
        )


def read_service(
    files: Sequence[FileChange], wanted: Mapping[str, Any], state: Dict[str, Any], known_hash: Optional[str]
) -> Tuple[Dict[str, Any], str]:
    """Compare the container with the wanted service; return that, and its config hash."""
    project = str(wanted["env"]["COMPOSE_PROJECT_NAME"])
    container = state["container"] = inspect_container()
    check_container(container, state["referee"])
    # A newer Compose may hash otherwise: only one that asks for no change is taken as known.
    if container is None or container["config_hash"] != known_hash:
        known_hash = None
    service, config_hash = resolve_service(files, wanted["project_dir"], project, known_hash)
    check_service(service)
    state["image"] = service["image"]
    wanted_image = image_id(service["image"])
    state["image_present"] = wanted_image is not None
    if container:
        check_owner(container, project, wanted["project_dir"])
    if container:
        state["recreate"] = container["config_hash"] != config_hash or container["image_id"] != wanted_image
        proven_at = (state["last_proven"] or {}).get("proven_at", "")
        container["was_ready"] = container["health"] == "healthy" or (
            # The engine asks for its health only every ten seconds.
            not state["recreate"] and proven_at[:19] >= container["started_at"][:19]
        )
        # A container that will be replaced listens where it was told before.
        if container["status"] == "running" and not state["recreate"]:
            state["api"] = probe_api(service, placed=state["referee"]["code"] == 0)
    return service, config_hash


def read_running(state: Dict[str, Any]) -> None:
    """Judge the container by what it was made from."""
    found = state["container"] = inspect_container()
    check_container(found, state["referee"])
    if found is None:
        return
    raw = json.loads(shell.run(["docker", "inspect", CONTAINER]).out)[0]
    bound = [(one["HostIp"], one["HostPort"]) for all_ in (raw["HostConfig"]["PortBindings"] or {}).values() for one in all_]
    service = {
        "command": raw["Config"]["Cmd"],
        "environment": dict(one.partition("=")[::2] for one in raw["Config"]["Env"]),
        "ports": [{"host_ip": ip, "published": port} for ip, port in bound],
    }
    state["image"] = found["image"]
    state["recreate"] = False
    if found["status"] == "running":
        state["api"] = probe_api(service, placed=state["referee"]["code"] == 0)


def read(gpu_device_id: Optional[str], wanted: Mapping[str, Any], **options: Any) -> Dict[str, Any]:
    """Take the one look: what is there, what is wanted, and what would change.

    Args:
        gpu_device_id: index, UUID or PCI bus id of the card; None means the one that the
            container asked for.
        wanted: WANTED_OPTIONS, filled in.
        options: `as_installed` judges the server by the files that the host
            has, not by `wanted`; `preflight` asks for every check that a
            change needs, `force` leaves some out, `training_gpus` are ids; `again` takes what
            is found for granted, where else only what two looks find counts.

    Returns:
        `problems` (texts with their cures; nothing may be changed while there
        are any), `gpus`, `gpu` (the asked card), `gpu_device_id` (its id as the engine
            takes it), `changes` (sentences),
        `files_differ`, `recreate` (the container isn't the wanted one),
        `action` (what brings the wanted server up),
        `image_present`, `container`, `referee` (its verdict), `api`,
        `last_proven` (its record), `recorded` (it is what runs now), `proof`
        (what to record), `doubts` (what keeps the server from being proven),
        and `proven`: the wanted container runs, on that card and no other, and
        its API answers.
    """
    problems: List[str] = []
    asked = wanted
    state: Dict[str, Any] = {
        "problems": problems,
        "gpus": [],
        "gpu": None,
        "gpu_device_id": None,
        "changes": [],
        "files_differ": False,
        "recreate": True,
        "action": "create",
        "image": "",
        "image_present": False,
        "container": None,
        "referee": dict.fromkeys(_VERDICT),
        "api": {"url": "", "healthy": False, "models": [], "error": "it was not asked"},
        "doubts": [],
        "proven": False,
        "proof": {},
        "recorded": False,
        "last_proven": None,
    }
    try:
        read_cards(gpu_device_id, wanted, state)
        if state["gpu_device_id"] is not None:
            wanted = dict(wanted, env=dict(wanted["env"], GPU_DEVICE_ID=state["gpu_device_id"]))
    except Problem as problem:
        problems.append(str(problem))
    problems.extend(
        "{0} is exported in the environment of the user that Ansible becomes on this host, and would "
        "beat .env. Unset it there (look in /etc/environment and the shell's profile).".format(key)
        for key in exported_secrets(wanted)
    )
    problems.extend(
        "{0} is shorter than {1} characters, or stands in another setting (model, image, path …), so that it can't be "
        "hidden. Give the right one; for an API key, a random one such as `openssl rand -hex 24` prints.".format(
            key, _SHORTEST_SECRET
        )
        for key in weak_secrets(wanted)
    )
    try:
        last = record.load(wanted["project_dir"], "current")
    except Problem as problem:
        last = None
        problems.append(str(problem))
    state["last_proven"] = last.record if last else None
    as_installed = options.get("as_installed", False)
    try:
        if options.get("as_running"):
            read_running(state)
            state["doubts"] = doubts(state)
            state["proven"] = not problems and not state["doubts"]
            return state
        files = installed_files(wanted["project_dir"]) if as_installed else compare_files(wanted)
        state["files_differ"] = any(change.differs for change in files)
        state["changes"] = describe_changes([change for change in files if change.differs], wanted)
        contents = {os.path.basename(one.path): one.after for one in files[:2]}
        same = last if last and contents.items() <= last.files.items() else None
        # Of the very files that were proven, Compose told the hash then.
        known_hash = same.record.get("config_hash") if same else None
        service, config_hash = read_service(files, wanted, state, known_hash)
    except Problem as problem:
        if not problems and not options.get("again"):
            return read(gpu_device_id, asked, again=True, **options)
        problems.append(str(problem))
        return state
    state["doubts"] = doubts(state)
    state["action"] = action(state)
    changes = options.get("preflight") and (problems or state["doubts"])
    checks = preflight.CHECKS if changes else preflight.ALWAYS
    force, training_gpus = options.get("force", []), options.get("training_gpus", [])
    found = list(preflight.problems(checks, preflight.Asked(state, service, wanted, force, training_gpus)))
    if found and not options.get("again"):
        # A server that dies, or is brought back, between two of these reads looks like a problem of the host.
        return read(gpu_device_id, asked, again=True, **options)
    problems.extend(found)
    state["proven"] = not problems and not state["doubts"]
    if state["proven"]:
        state["proof"] = proof(state, config_hash)
        state["recorded"] = (
            not state["files_differ"]
            and same is not None
            and all(same.record.get(key) == value for key, value in state["proof"].items())
        )
    return state


def proof(state: Mapping[str, Any], config_hash: str) -> Dict[str, Any]:
    """Return what a proven server proves, to be recorded; no secret is in it."""
    return {
        "requested": state["container"]["requested"][0],
        "gpu": {key: state["gpu"][key] for key in ("index", "uuid", "pci_bus_id", "name")},
        "image": state["image"],
        "image_id": state["container"]["image_id"],
        "config_hash": config_hash,
        "models": state["api"]["models"],
    }


def action(state: Mapping[str, Any]) -> str:
    """Return what brings the wanted server up: create, recreate, replace, wait or nothing.

    `replace` is for a container that matches its files and yet is no good, so
    that Compose must be told; one that is only still loading is left to load.
    """
    container = state["container"]
    if container is None:
        return "create"
    if state["recreate"]:
        return "recreate"
    if (
        container["status"] != "running"
        or container["health"] == "unhealthy"
        or state["referee"]["cause"] in ("wrong_gpu", "additional_gpu", "gpu_view_lost")
    ):
        return "replace"
    return "wait" if state["doubts"] else "nothing"


def doubts(state: Mapping[str, Any]) -> List[str]:
    """Say what keeps the server from being proven, the most basic reason first."""
    container = state["container"]
    if container is None:
        return ["There is no container named {0}.".format(CONTAINER)]
    if container["status"] != "running":
        return ["The container is {0}, not running.".format(container["status"])]
    reasons = []
    if len(container["requested"]) != 1 or state["gpu"] is None:
        reasons.append("The container was not asked for one certain GPU.")
    if state["recreate"]:
        reasons.append("The container was made from other settings or another image than these.")
    if state["referee"]["code"] != 0:
        reasons.append(state["referee"]["message"])
    if state["api"]["error"] is not None:
        reasons.append("API: {0}.".format(state["api"]["error"]))
    return reasons
