# SPDX-License-Identifier: MIT
"""Read one host's GPUs, files and vLLM server, and compare them with what is wanted.

Everything here only reads. `read()` is the one look that the role takes: before
it changes anything, in check mode, and afterwards as the proof.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    api,
    compose,
    container,
    dotenv,
    leftovers,
    outgoing,
    preflight,
    record,
    settings,
    shell,
    trust,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem as Problem  # noqa: PLC0414 - the modules take it from here

COMPOSE_FILE, ENV_FILE = compose.COMPOSE_FILE, compose.ENV_FILE
REFEREE = "check_gpu_allocation.sh"
CONTAINER = container.CONTAINER

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
# Of these, the engine may only be restarting.
_ENGINE_AWAY = ("docker_timeout", "engine_not_running")
_VERDICT = (
    "verdict",
    "code",
    "cause",
    "message",
    "cure",
    "notes",
    "processes",
    "other_processes",
    "processes_listed",
)
# What people put into .env for the server itself; only keys that the compose file names get there.
_FOR_THE_SERVER = re.compile(
    r"(HF|HUGGING_?FACE|VLLM|CUDA|NCCL|GLOO|RAY|TRITON|FLASHINFER|(PY)?TORCH|TRANSFORMERS|TOKENIZERS|NVIDIA|OMP|AWS|S3|"
    r"SSL|REQUESTS|CURL|LD)_|PYTHON|(HTTPS?|NO|ALL)_PROXY\Z",
    re.IGNORECASE,
)

# What vllm_gpu_force may name.
FORCE = ["drift", "exposure", "irreversible", "mig", "training"]

WANTED_OPTIONS: Dict[str, Any] = {
    "project_dir": {"type": "path", "required": True},
    "compose": {"type": "str", "required": True},
    "referee": {"type": "str", "required": True},
    "env_example": {"type": "str", "required": True},
    "env": {"type": "dict", "required": True},
    "extra_args": {"type": "raw", "default": []},
    "server_env": {"type": "dict", "default": {}},
    "secrets": {"type": "dict", "default": {}, "no_log": True},
    "secret_env": {"type": "dict", "default": {}, "no_log": True},
}


def invocation(params: Mapping[str, Any]) -> Dict[str, Any]:
    """Return a module's arguments without `wanted`: its 40 kB would stand in every event of every host."""
    return {"module_args": {key: value for key, value in params.items() if key != "wanted"}}


def message(problem: Exception, project_dir: str) -> str:
    """Return a module's message about what went wrong, as it may leave the host.

    Nobody has named the secrets to most modules. All that the compose file passes on to the
    server counts as one, if it is as long as one.
    """
    secrets = outgoing.known(project_dir, {})
    with contextlib.suppress(Problem):
        passed_on = compose.passed_on(read_file(os.path.join(project_dir, COMPOSE_FILE))[0] or b"")
        values = dotenv.texts(read_file(os.path.join(project_dir, ENV_FILE))[0] or b"")
        secrets.update(
            one for key, one in values.items() if key in passed_on and len(one) >= settings.SHORTEST_SECRET
        )
    return str(outgoing.clean(str(problem), secrets))


class FileChange(NamedTuple):
    """A file that the host should have; `before` is None where there is none."""

    path: str
    before: Optional[bytes]
    after: bytes
    mode: int
    differs: bool


def find_gpu(requested: str, verdict: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the card, or MIG instance, that the referee took `requested` for.

    Raises Problem, naming the cards that it could be, for anything else. The
    spelling is checked first: what isn't one plain id reaches no command.
    """
    gpus = verdict.get("gpus") or []
    choice = "It could be {0}.".format(preflight.describe(gpus)) if gpus else "This host shows no GPU."
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
        if expected and gpu["uuid"] == expected["uuid"]:
            return dict(gpu)
        # Where nvidia-smi's row is odd, an index is None.
        if expected and gpu["index"] == expected["index"] is not None and expected["uuid"].startswith("MIG-"):
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


def previous_files(directory: str) -> List[FileChange]:
    """Return the service's files as they were proven before the current ones."""
    proven = record.load(directory, "previous")
    if proven is None:
        raise Problem("{0} has no previous proven state.".format(directory))
    return [
        FileChange(
            os.path.join(directory, name), proven.files[name], proven.files[name], 0o600, differs=False
        )
        for name in (COMPOSE_FILE, ENV_FILE)
    ]


def compare_files(wanted: Mapping[str, Any]) -> List[FileChange]:
    """Return the three files as they are and as they should be, `.env` merged."""
    directory = wanted["project_dir"]
    changes: List[FileChange] = []
    for name, content, mode in (
        (COMPOSE_FILE, wanted["compose"], 0o644),
        (ENV_FILE, None, 0o600),
        (REFEREE, wanted["referee"], 0o755),
    ):
        path = os.path.join(directory, name)
        before, mode_now, owner = read_file(path)
        if content is None:
            base = wanted["env_example"].encode() if before is None else before
            # What the server is no longer given, it was the role that wrote down.
            given = compose.passed_on(changes[0].before or b"")
            base = dotenv.without(base, given - {*settings.env_keys(wanted)})
            try:
                after = dotenv.merge(base, env_keys(before, wanted))
            except ValueError as error:
                raise Problem(
                    "{0}: {1}. Correct that line, or move the file away.".format(path, error)
                ) from error
        else:
            after = content.encode()
        differs = (before, mode_now, owner) != (after, mode, os.geteuid())
        changes.append(FileChange(path, before, after, mode, differs))
    return changes


def env_keys(before: Optional[bytes], wanted: Mapping[str, Any]) -> Dict[str, str]:
    """Return what `.env` must say; an installation of the earlier Compose project keeps that one's volumes."""
    keys = settings.env_keys(wanted)
    found = dotenv.values(before or b"")
    if found.get("COMPOSE_PROJECT_NAME") == container.EARLIER_PROJECT and "VLLM_VOLUME_PREFIX" not in found:
        keys["VLLM_VOLUME_PREFIX"] = container.EARLIER_PROJECT
    return keys


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
    before, secret = dotenv.texts(content), settings.secrets(wanted)
    sentences = []
    for key, value in env_keys(content, wanted).items():
        if before.get(key, "") == value:
            continue
        if key in secret:
            sentences.append("{0} changes".format(key))
        else:
            name = "GPU" if key == "GPU_DEVICE_ID" else key
            sentences.append("{0} {1} → {2}".format(name, before.get(key) or "(unset)", value or "(unset)"))
    sentences.extend("{0} is removed".format(key) for key in before if key not in dotenv.texts(merged))
    return sentences


def read_cards(gpu_device_id: Optional[str], wanted: Mapping[str, Any], state: Dict[str, Any]) -> None:
    """Ask the referee; fill in `referee`, `gpus`, `gpu` and `gpu_device_id`."""
    plain = gpu_device_id is None or bool(_GPU_ID.match(gpu_device_id))
    verdict = referee(wanted["referee"], gpu_device_id if plain else None)
    state["referee"] = {key: verdict.get(key) for key in _VERDICT}
    state["gpus"] = verdict.get("gpus") or []
    state["referee"]["container_id"] = (verdict.get("container") or {}).get("id")
    state["notes"] = list(verdict.get("notes") or [])
    if verdict.get("cause") in _HOST_CAUSES:
        away = verdict["cause"] in _ENGINE_AWAY
        raise (container.Unanswered if away else Problem)("{message} {cure}".format(**verdict))
    if gpu_device_id is None:
        state["gpu"] = expected_gpu(verdict)
        return
    state["gpu"] = find_gpu(gpu_device_id, verdict)
    # An index stays one; every other spelling becomes the UUID, which the
    # engine understands, and which a reboot doesn't change.
    state["gpu_device_id"] = gpu_device_id if gpu_device_id.isdigit() else state["gpu"]["uuid"]


def check_owner(found: Mapping[str, Any], project_dir: str) -> None:
    """Raise Problem for a container that somebody else set up."""
    if found["project"] not in (container.PROJECT, container.EARLIER_PROJECT):
        owner = "of {0}".format(
            "the Compose project " + found["project"] if found["project"] else "no Compose project"
        )
    elif os.path.realpath(found["project_dir"] or "/") != os.path.realpath(project_dir):
        owner = "started from {0} and not from {1}".format(found["project_dir"], project_dir)
    else:
        return
    raise Problem(
        "A container named {0} exists already, {1}. It is not this role's to replace; when nobody "
        "needs it, remove it with: docker rm -f {0}".format(CONTAINER, owner)
    )


def check_container(found: Optional[Mapping[str, Any]], seen: Mapping[str, Any]) -> None:
    """Raise Problem for a container that isn't the one that the referee has just `seen`, and for a frozen one."""
    judged = seen.get("container_id")
    if judged and (found is None or found["id"] != judged):
        raise Problem(
            "The container {0} was replaced or removed while it was being checked: another program is changing it, or "
            "the Docker Engine is stopping. Run the play again.".format(CONTAINER)
        )
    if found and found["status"] == "paused":
        raise Problem("The container {0} is paused. Let it go on with: docker unpause {0}".format(CONTAINER))


def check_service(service: Mapping[str, Any]) -> None:
    """Raise Problem for a service that this role's compose file can't have made."""
    ports = service.get("ports") or [{}]
    if not service.get("command") or not str(ports[0].get("published", "")).isdigit():
        raise Problem(
            "{0} has been edited by hand: its service {1} has no command, or publishes no port. serve.yml writes "
            "its own again.".format(COMPOSE_FILE, compose.SERVICE)
        )


def project_of(files: Sequence[FileChange], wanted: Mapping[str, Any], *, as_installed: bool) -> str:
    """Return the Compose project: the wanted one, or the one that the installed files name."""
    named = dotenv.values(files[1].after).get("COMPOSE_PROJECT_NAME") if as_installed else None
    return str(named or wanted["env"]["COMPOSE_PROJECT_NAME"])


def orphans(files: Sequence[FileChange]) -> Iterator[str]:
    """Yield a note on settings in `.env` that are meant for the server and don't reach it."""
    content = {os.path.basename(one.path): one.after for one in files}
    known = compose.named(content[COMPOSE_FILE])
    lost = [
        key
        for key, value in dotenv.texts(content[ENV_FILE]).items()
        if value and key not in known and _FOR_THE_SERVER.match(key)
    ]
    if lost:
        yield (
            "{0} in {1} {2} no effect: the compose file doesn't pass it on. Set it with vllm_gpu_env, or "
            "vllm_gpu_secret_env for a secret.".format(
                ", ".join(lost), ENV_FILE, "has" if len(lost) == 1 else "have"
            )
        )


def read_container(state: Dict[str, Any]) -> Optional[Dict[str, Any]]:
    """Fill in `container`; return all that the engine knows of it, its environment included."""
    raw = container.inspect()
    state["container"] = container.describe(raw) if raw else None
    state["secrets"].update(outgoing.secret_values(container.environment(raw)))
    check_container(state["container"], state["referee"])
    return raw


def read_running(state: Dict[str, Any]) -> None:
    """Judge the server by what its own container was made from."""
    raw = read_container(state)
    found = state["container"]
    if raw is None or found is None:
        return
    state.update(image=found["image"], image_present=True, recreate=False)
    if found["status"] == "running" and found["bindings"]:
        state["api"] = api.probe(container.made_from(raw), placed=state["referee"]["code"] == 0)


def resolve(
    files: Sequence[FileChange], wanted: Mapping[str, Any], state: Dict[str, Any], *, as_installed: bool
) -> Tuple[Dict[str, Any], str]:
    """Return the service that the files describe and its config hash; add where it isn't the wanted one to `problems`."""
    contents = {os.path.basename(change.path): change.after for change in files}
    service, config_hash = compose.resolve(contents, wanted["project_dir"], state["project"])
    check_service(service)
    if not as_installed:
        state["problems"].extend(compose.contradictions(service, wanted))
    return service, config_hash


def read_service(
    files: Sequence[FileChange],
    wanted: Mapping[str, Any],
    state: Dict[str, Any],
    known_hash: Optional[str],
    *,
    as_installed: bool,
) -> Tuple[Dict[str, Any], str]:
    """Compare the container with the service of the files; return that, and its config hash.

    `known_hash` is the one that Compose told of the very same files when they were proven.
    A server that was made from them, and is right, says itself what they mean.
    """
    raw = read_container(state)
    found = state["container"]
    if raw is None or found is None or not known_hash or found["config_hash"] != known_hash:
        service, config_hash = resolve(files, wanted, state, as_installed=as_installed)
        compare_container(raw, service, config_hash, wanted, state)
        return service, config_hash
    service = container.made_from(raw)
    compare_container(raw, service, found["config_hash"], wanted, state)
    if state["problems"] or doubts(state):
        service, _hash = resolve(files, wanted, state, as_installed=as_installed)
    return service, found["config_hash"]


def compare_container(
    raw: Optional[Mapping[str, Any]],
    service: Mapping[str, Any],
    config_hash: str,
    wanted: Mapping[str, Any],
    state: Dict[str, Any],
) -> None:
    """Fill in whether the container is the wanted one, and what its API says."""
    found = state["container"]
    state["image"] = service["image"]
    wanted_image = container.image_id(service["image"])
    state["image_present"] = wanted_image is not None
    if raw is None or found is None:
        return
    check_owner(found, wanted["project_dir"])
    state["recreate"] = (
        found["config_hash"] != config_hash
        or found["image_id"] != wanted_image
        or found["project"] != state["project"]
    )
    proven_at = (state["last_proven"] or {}).get("proven_at", "")
    found["was_ready"] = found["health"] == "healthy" or (
        # The engine asks for its health only every ten seconds.
        not state["recreate"] and proven_at[:19] >= found["started_at"][:19]
    )
    if found["status"] != "running":
        return
    # A container that will be replaced listens where it was told before.
    if not state["recreate"]:
        state["api"] = api.probe(service, placed=state["referee"]["code"] == 0)
        state["serving"] = state["api"]["healthy"]
    elif found["bindings"] and not state["referee"]["processes"]:
        state["serving"] = api.probe(container.made_from(raw), placed=False)["healthy"]


class Judged(NamedTuple):
    """What the container is held against: the service of the files, its config hash, and the record of the same files."""

    service: Mapping[str, Any]
    config_hash: str
    same: Optional[record.Proven]


def read_files(
    wanted: Mapping[str, Any],
    state: Dict[str, Any],
    last: Optional[record.Proven],
    files: Sequence[FileChange],
    *,
    as_installed: bool,
) -> Judged:
    """Compare the container with what is wanted, or with the files that are, or were, installed."""
    changes = [change for change in files if change.differs]
    left = [] if as_installed else leftovers.interrupted(wanted["project_dir"])
    state["files_differ"] = bool(changes or left)
    state["changes"] = describe_changes(changes, wanted)
    state["changes"].extend(
        "{0}, which an interrupted play has left, is removed".format(path) for path in left
    )
    state["project"] = project_of(files, wanted, as_installed=as_installed)
    contents = {os.path.basename(one.path): one.after for one in files[:2]}
    same = last if last and contents.items() <= last.files.items() else None
    known_hash = same.record.get("config_hash") if same else None
    service, config_hash = read_service(files, wanted, state, known_hash, as_installed=as_installed)
    state["secrets"].update(
        outgoing.secret_values(service.get("environment") or {}, settings.secrets(wanted))
    )
    state["notes"].extend(orphans(files))
    return Judged(service, config_hash, same)


def begin(
    gpu_device_id: Optional[str], wanted: Mapping[str, Any]
) -> Tuple[Dict[str, Any], Mapping[str, Any]]:
    """Read the cards; return the state so far, and what is wanted with the card's id as the engine takes it."""
    problems: List[str] = []
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
        "notes": [],
        "unanswered": False,
        "serving": False,
        "secrets": set(),
        "project": str(wanted["env"]["COMPOSE_PROJECT_NAME"]),
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
        state["unanswered"] = isinstance(problem, container.Unanswered)
    return state, wanted


def read(gpu_device_id: Optional[str], wanted: Mapping[str, Any], **options: Any) -> Dict[str, Any]:
    """Take the one look: what is there, what is wanted, and what would change.

    Args:
        gpu_device_id: index, UUID or PCI bus id of the card; None means the one that the
            container asked for.
        wanted: WANTED_OPTIONS, filled in.
        options: `as_installed` judges the server by the files that the host
            has, not by `wanted`, and `as_running` by what its container was made from; `preflight` asks for every check that a
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
        (what to record), `doubts` (what keeps the server from being proven), `notes`
        (what a person should know besides), `unanswered` (the engine gave no answer),
        and `proven`: the wanted container runs, on that card and no other, and
        its API answers.
    """
    state, resolved = begin(gpu_device_id, wanted)
    problems = state["problems"]
    as_running = options.get("as_running", False)
    as_installed = options.get("as_installed", False) or options.get("as_previous", False)
    invalid = [] if as_installed or as_running else list(settings.check(resolved))
    problems.extend(invalid)
    judged = Judged({}, "", None)
    try:
        last = record.load(wanted["project_dir"], "current")
        state["last_proven"] = last.record if last else None
        if as_running:
            read_running(state)
        elif not invalid:
            files = sources(resolved, options)
            judged = read_files(resolved, state, last, files, as_installed=as_installed)
    except Problem as problem:
        if not problems and not options.get("again"):
            return read(gpu_device_id, wanted, again=True, **options)
        problems.append(str(problem))
        state["unanswered"] = state["unanswered"] or isinstance(problem, container.Unanswered)
        return state
    state["doubts"] = doubts(state)
    state["action"] = action(state)
    if judged.service:
        found = list(find_problems(state, judged.service, resolved, options))
        if found and not options.get("again"):
            # A server that dies, or is brought back, between two of these reads looks like a problem of the host.
            return read(gpu_device_id, wanted, again=True, **options)
        problems.extend(found)
    state["proven"] = not problems and not state["doubts"]
    if state["proven"] and judged.service:
        state["proof"] = proof(state, judged.config_hash)
        state["recorded"] = is_recorded(state, judged)
    return state


def is_recorded(state: Mapping[str, Any], judged: Judged) -> bool:
    """Return whether what runs is what was proven last, from the same files."""
    if state["files_differ"] or judged.same is None:
        return False
    return all(judged.same.record.get(key) == value for key, value in state["proof"].items())


def sources(wanted: Mapping[str, Any], options: Mapping[str, Any]) -> List[FileChange]:
    """Return the files that the server is judged by."""
    if options.get("as_previous"):
        return previous_files(wanted["project_dir"])
    return installed_files(wanted["project_dir"]) if options.get("as_installed") else compare_files(wanted)


def find_problems(
    state: Mapping[str, Any],
    service: Mapping[str, Any],
    wanted: Mapping[str, Any],
    options: Mapping[str, Any],
) -> Iterator[str]:
    """Yield what prevents a change, where one is needed; of a proven server, whether its card is still the same."""
    changes = options.get("preflight") and (
        state["problems"] or state["doubts"] or options.get("as_previous")
    )
    checks = preflight.CHECKS if changes else preflight.ALWAYS
    force, training_gpus = options.get("force", []), options.get("training_gpus", [])
    return preflight.problems(checks, preflight.Asked(state, service, wanted, force, training_gpus))


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
    """Return what brings the wanted server up: create, recreate, move, replace, wait or nothing.

    `move` is for one of the earlier Compose project, which has to go before its successor can have its name.

    `replace` is for a container that matches its files and yet is no good, so
    that Compose must be told; one that is only still loading is left to load.
    """
    found = state["container"]
    if found is None:
        return "create"
    if state["recreate"]:
        return "recreate" if found["project"] == state["project"] else "move"
    if (
        found["status"] != "running"
        # Where the API answers all the same, it is the health check that is ill.
        or (found["health"] == "unhealthy" and not state["api"]["healthy"])
        or state["referee"]["cause"] in ("wrong_gpu", "additional_gpu", "gpu_view_lost")
    ):
        return "replace"
    return "wait" if state["doubts"] else "nothing"


def doubts(state: Mapping[str, Any]) -> List[str]:
    """Say what keeps the server from being proven, the most basic reason first."""
    found = state["container"]
    if found is None:
        return ["There is no container named {0}.".format(CONTAINER)]
    if found["status"] != "running":
        return ["The container is {0}, not running.".format(found["status"])]
    reasons = []
    if len(found["requested"]) != 1 or state["gpu"] is None:
        reasons.append("The container was not asked for one certain GPU.")
    if state["recreate"]:
        reasons.append("The container was made from other settings or another image than these.")
    if state["referee"]["code"] != 0:
        reasons.append(state["referee"]["message"])
    if state["api"]["error"] is not None:
        reasons.append("API: {0}.".format(state["api"]["error"]))
    return reasons
