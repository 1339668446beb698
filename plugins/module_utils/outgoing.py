# SPDX-License-Identifier: MIT
"""Remove secrets and control characters from what leaves the host."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import urllib.parse
from typing import Any, Iterable, Iterator, Mapping

from . import dotenv, paths

HIDDEN = "********"
# Names of environment variables that hold secrets.
SECRET_NAME = re.compile(
    r"API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|TOKEN\Z|SECRET|PASS(W|\Z)|PASSPHRASE|CREDENTIAL|(\A|_)(KEY|AUTH)\Z",
    re.IGNORECASE,
)
# A shorter value occurs in most texts, which would become unreadable.
_SHORTEST = 3
_LOGIN = re.compile(r"//[^/@\s:]*:([^/\s]+)@|//([^/\s:]{8,})@")
# C0 except tabs and line breaks, DEL, C1, bidirectional controls, and lone surrogates, which no JSON
# can hold.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    r"""Return `text` with control characters written out, as `\x1b`; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def secret_values(environment: Mapping[str, Any], names: Iterable[str] = ()) -> Iterator[str]:
    """Yield the secrets of an environment: of `names`, of names that look like it, and passwords in URLs."""
    named = set(names)
    for key, value in environment.items():
        text = str(value or "")
        if key in named or SECRET_NAME.search(key):
            yield text
        yield from (match[1] or match[2] for match in _LOGIN.finditer(text))


def known(project_dir: str, requested: Mapping[str, str]) -> set[str]:
    """Return the secrets of a host's `.env`, of its proven copies, and the `requested` ones."""
    found = set(map(str, requested.values()))
    proven = os.path.join(project_dir, paths.PROVEN)
    for directory in (project_dir, *(os.path.join(proven, link) for link in paths.LINKS)):
        with contextlib.suppress(OSError):
            # Opening a FIFO would block.
            path = os.path.join(directory, paths.ENV_FILE)
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with os.fdopen(descriptor, "rb") as stream:
                content = stream.read(2**20)
            found.update(secret_values(dotenv.texts(content), requested))
            found.update(_unreadable(content))
    return found


def _unreadable(content: bytes) -> Iterator[str]:
    """Yield the values of malformed lines: Compose quotes such a line when it refuses the file."""
    for line in dotenv.lines(content):
        text = line.text.decode("utf-8", "replace").strip()
        if line.key is None and not text.startswith("#"):
            yield re.split("[=:]", text, maxsplit=1)[-1].strip(" '\"")


def spellings(secrets: Iterable[str]) -> list[str]:
    """Return every form in which a program may print the secrets, the longest first."""
    found: set[str] = set()
    for secret in secrets:
        if len(secret) >= _SHORTEST:
            found |= {secret, repr(secret)[1:-1], shlex.quote(secret), secret.replace("$", "$$")}
            found |= {json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False)}
            found |= {
                urllib.parse.quote(secret, safe="/"),
                urllib.parse.quote(secret, safe=""),
                urllib.parse.quote_plus(secret),
            }
    return sorted(found, key=len, reverse=True)


def clean(value: Any, secrets: Iterable[str] = ()) -> Any:
    """Return `value` with each text in it, at any depth, safe to show."""
    return _clean(value, spellings(secrets))


def _clean(value: Any, hidden: list[str]) -> Any:
    if isinstance(value, str):
        for secret in hidden:
            value = value.replace(secret, HIDDEN)
        return visible(value)
    if isinstance(value, Mapping):
        return {key: _clean(part, hidden) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(part, hidden) for part in value]
    return value
