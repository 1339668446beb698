# SPDX-License-Identifier: MIT
"""The service's files: installed, previous and wanted."""

from __future__ import annotations

import os
import re
import stat
from typing import Any, Iterator, Mapping, NamedTuple, Sequence

from . import compose, container, dotenv, paths, record, settings, trust
from .shell import Problem

# Keys that people put into .env for the server; only those that the compose file names reach it.
_FOR_THE_SERVER = re.compile(
    r"(HF|HUGGING_?FACE|VLLM|CUDA|NCCL|GLOO|RAY|TRITON|FLASHINFER|(PY)?TORCH|TRANSFORMERS|TOKENIZERS|NVIDIA|OMP|AWS|S3|"
    r"SSL|REQUESTS|CURL|LD)_|PYTHON|(HTTPS?|NO|ALL)_PROXY\Z",
    re.IGNORECASE,
)


class FileChange(NamedTuple):
    """A file that the host should have; `before` is None where there is none."""

    path: str
    before: bytes | None
    after: bytes
    mode: int
    differs: bool


def read(path: str) -> tuple[bytes | None, int, int]:
    """Return a file's bytes, mode and owner, or (None, 0, 0) where there is none."""
    found = trust.read(path)
    if found is None:
        return None, 0, 0
    return found.content, stat.S_IMODE(found.status.st_mode), found.status.st_uid


def installed(directory: str) -> list[FileChange]:
    """Return the installed files; raise Problem where one is missing."""
    files = []
    for name in (paths.COMPOSE_FILE, paths.ENV_FILE):
        path = os.path.join(directory, name)
        content, mode, _owner = read(path)
        if content is None:
            raise Problem(
                f"{path} does not exist: no server was set up on this host yet. Run serve.yml first."
            )
        files.append(FileChange(path, content, content, mode, differs=False))
    return files


def previous(directory: str) -> list[FileChange]:
    """Return the files of the previous proven state."""
    proven = record.load(directory, "previous")
    if proven is None:
        raise Problem(f"{directory} has no previous proven state.")
    return [
        FileChange(
            os.path.join(directory, name), proven.files[name], proven.files[name], 0o600, differs=False
        )
        for name in (paths.COMPOSE_FILE, paths.ENV_FILE)
    ]


def compare(wanted: Mapping[str, Any]) -> list[FileChange]:
    """Return the three files as they are and as they should be, with `.env` merged."""
    directory = wanted["project_dir"]
    changes: list[FileChange] = []
    for name, content, mode in (
        (paths.COMPOSE_FILE, wanted["compose"], 0o644),
        (paths.ENV_FILE, None, 0o600),
        (paths.REFEREE, wanted["referee"], 0o755),
    ):
        path = os.path.join(directory, name)
        before, mode_now, owner = read(path)
        if content is None:
            base = wanted["env_example"].encode() if before is None else before
            # The role wrote what the compose file passes on, so it also removes it.
            given = compose.passed_on(changes[0].before or b"")
            base = dotenv.without(base, given - {*settings.env_keys(wanted)})
            try:
                after = dotenv.merge(base, env_keys(before, wanted))
            except ValueError as error:
                raise Problem(f"{path}: {error}. Correct that line, or move the file away.") from error
        else:
            after = content.encode()
        differs = (before, mode_now, owner) != (after, mode, os.geteuid())
        changes.append(FileChange(path, before, after, mode, differs))
    return changes


def env_keys(before: bytes | None, wanted: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of `.env`; an installation of the earlier Compose project keeps its volumes."""
    keys = settings.env_keys(wanted)
    found = dotenv.values(before or b"")
    if found.get("COMPOSE_PROJECT_NAME") == container.EARLIER_PROJECT and "VLLM_VOLUME_PREFIX" not in found:
        keys["VLLM_VOLUME_PREFIX"] = container.EARLIER_PROJECT
    return keys


def describe(files: Sequence[FileChange], wanted: Mapping[str, Any]) -> list[str]:
    """Describe what would change; secrets by their keys only."""
    sentences = []
    for change in files:
        if change.before is None:
            sentences.append(f"{change.path} is new")
        elif change.before == change.after:
            sentences.append(f"{change.path} gets mode {change.mode:04o} and this user as its owner")
        elif not change.path.endswith("/" + paths.ENV_FILE):
            sentences.append(f"{change.path} changes")
        else:
            sentences.extend(describe_env(change.before, change.after, wanted))
    return sentences


def describe_env(content: bytes, merged: bytes, wanted: Mapping[str, Any]) -> list[str]:
    """Describe which keys of an existing `.env` would change: `GPU 0 → 1`."""
    before, secret = dotenv.texts(content), settings.secrets(wanted)
    sentences = []
    for key, value in env_keys(content, wanted).items():
        if before.get(key, "") == value:
            continue
        if key in secret:
            sentences.append(f"{key} changes")
        else:
            name = "GPU" if key == "GPU_DEVICE_ID" else key
            sentences.append(f"{name} {before.get(key) or '(unset)'} → {value or '(unset)'}")
    sentences.extend(f"{key} is removed" for key in before if key not in dotenv.texts(merged))
    return sentences


def project_of(files: Sequence[FileChange], wanted: Mapping[str, Any], *, as_installed: bool) -> str:
    """Return the Compose project: the wanted one, or the one that the installed files name."""
    named = dotenv.values(files[1].after).get("COMPOSE_PROJECT_NAME") if as_installed else None
    return str(named or wanted["env"]["COMPOSE_PROJECT_NAME"])


def without_effect(files: Sequence[FileChange]) -> Iterator[str]:
    """Yield a note on settings in `.env` that look meant for the server and don't reach it."""
    content = {os.path.basename(change.path): change.after for change in files}
    known = compose.named(content[paths.COMPOSE_FILE])
    lost = [
        key
        for key, value in dotenv.texts(content[paths.ENV_FILE]).items()
        if value and key not in known and _FOR_THE_SERVER.match(key)
    ]
    if lost:
        yield (
            f"{', '.join(lost)} in {paths.ENV_FILE} {'has' if len(lost) == 1 else 'have'} no effect: the compose file "
            "doesn't pass it on. Set it with vllm_gpu_env, or vllm_gpu_secret_env for a secret."
        )


def sources(wanted: Mapping[str, Any], options: Mapping[str, Any]) -> list[FileChange]:
    """Return the files that the server is judged by."""
    if options.get("as_previous"):
        return previous(wanted["project_dir"])
    return installed(wanted["project_dir"]) if options.get("as_installed") else compare(wanted)
