# SPDX-License-Identifier: MIT
"""Change a `.env` file without losing a byte that isn't ours.

Compose itself is the judge of what a `.env` *means* (see server.py, which asks
`docker compose config`); this module only finds the line that decides a key
and replaces that one line. It works on bytes: a user's file may hold any
encoding and any line ending.
"""

from __future__ import annotations

import re
from typing import Container, Iterator, Mapping, NamedTuple

# Compose allows `export KEY=value`, spaces around `=`, and `KEY: value`.
_ASSIGNMENT = re.compile(
    rb"(?P<head>[ \t]*(?:export[ \t]+)?(?P<key>[A-Za-z_][A-Za-z0-9_.\-]*)[ \t]*[=:])"
    rb"(?P<value>.*)",
    re.DOTALL,
)
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+,=\-]*\Z")


class Line(NamedTuple):
    """One logical line: an assignment (with its key) or anything else."""

    text: bytes
    ending: bytes
    key: str | None
    head: bytes
    value: bytes


def _unclosed(value: bytes) -> bool:
    """Say whether `value` opens a quote that it doesn't close."""
    body = value.lstrip(b" \t")
    quote = body[:1]
    if quote not in (b'"', b"'"):
        return False
    # A backslash takes the next byte with it, in both kinds of quotes.
    return quote not in re.sub(rb"\\.", b"", body[1:], flags=re.DOTALL)


def lines(content: bytes) -> Iterator[Line]:
    """Yield the logical lines of a `.env`; joined, they are `content` again."""
    # Not splitlines(): that also splits at form feeds and separators, which
    # may stand inside a value.
    physical: list[bytes] = re.findall(rb"[^\n]*\n|[^\n]+\Z", content)
    while physical:
        raw = physical.pop(0)
        match = _ASSIGNMENT.match(raw)
        if match and _unclosed(match["value"]):
            # A quoted value may run over several lines, and what looks like a
            # key in there is text. One that never closes is this line only.
            joined = raw
            for count, more in enumerate(physical, 1):
                joined += more
                if not _unclosed(joined[len(match["head"]) :]):
                    raw = joined
                    del physical[:count]
                    break
        text = raw.rstrip(b"\r\n")
        ending = raw[len(text) :]
        match = _ASSIGNMENT.match(text)
        if match:
            yield Line(text, ending, match["key"].decode(), match["head"], match["value"])
        else:
            yield Line(text, ending, None, b"", b"")


def literal(value: bytes) -> str | None:
    """Return the text that `value` stands for, or None if it isn't that simple.

    None (interpolation, escapes, undecodable bytes, text after a closing
    quote) makes the caller rewrite the line, which is always safe.
    """
    try:
        text = value.decode().strip(" \t")
    except UnicodeDecodeError:
        return None
    if text[:1] in ("'", '"'):
        quote, body = text[0], text[1:]
        end = body.find(quote)
        if end < 0 or body[end + 1 :].strip() or "\\" in body or "\n" in body:
            return None
        if quote == '"' and "$" in body:
            return None
        return body[:end]
    text = re.split(r"[ \t]#", text, maxsplit=1)[0].rstrip(" \t")
    if text.startswith("#") or any(char in text for char in "$\\\"'`\n"):
        return None
    return text


def quoted(value: str) -> str:
    """Return `value` as a `.env` line must hold it so that Compose reads it back.

    Raises ValueError for control characters, which no `.env` line can hold.
    """
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError("it contains a control character")
    if _PLAIN.match(value):
        return value
    if "'" not in value and not value.endswith("\\"):
        return "'" + value + "'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return '"' + escaped + '"'


def values(content: bytes) -> dict[str, str | None]:
    """Return what each key's deciding (last) line says; None where not simple."""
    return {line.key: literal(line.value) for line in lines(content) if line.key}


def texts(content: bytes) -> dict[str, str]:
    """Return what each key's last line says, for people: as it is written where that is not simple."""
    found = {}
    for line in lines(content):
        if line.key:
            simple = literal(line.value)
            found[line.key] = line.value.decode("utf-8", "replace").strip() if simple is None else simple
    return found


def without(content: bytes, keys: Container[str]) -> bytes:
    """Return `content` less the lines of these keys."""
    return b"".join(
        line.text + line.ending for line in lines(content) if line.key is None or line.key not in keys
    )


def merge(content: bytes, wanted: Mapping[str, str]) -> bytes:
    """Return `content` with each key of `wanted` set, and all else as it was.

    A key that is there keeps its place, its `export` and its line ending, and
    its very bytes where it says the wanted value already. Of several lines
    with one key the last decides, so only that one changes. A new key goes to
    the end. Raises ValueError, naming the key, for a value that no line can
    hold and for a quote in `content` that never closes: what follows it can't
    be told from it.
    """
    parsed = list(lines(content))
    for line in parsed:
        if _unclosed(line.value):
            raise ValueError(f"the quote after {line.key}= is never closed")
    last = {line.key: number for number, line in enumerate(parsed) if line.key}
    newline = b"\r\n" if any(line.ending == b"\r\n" for line in parsed[:1]) else b"\n"
    added = b""
    for key, value in wanted.items():
        try:
            text = quoted(value).encode()
        except (ValueError, UnicodeEncodeError) as error:
            raise ValueError(f"{key} can't be written to .env: {error}") from error
        if key not in last:
            added += key.encode() + b"=" + text + newline
            continue
        line = parsed[last[key]]
        if literal(line.value) != value:
            head = re.sub(rb"[ \t]*[=:]\Z", b"=", line.head)
            parsed[last[key]] = line._replace(text=head + text)
    merged = b"".join(line.text + line.ending for line in parsed)
    if added and merged and not merged.endswith(b"\n"):
        merged += newline
    return merged + added
