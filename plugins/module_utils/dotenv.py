# SPDX-License-Identifier: MIT
"""Change the role's keys in a `.env` file and keep every other byte.

What a `.env` means is for Compose to decide (compose.py); this only finds the line that decides a
key, and replaces it. It works on bytes, as a user's file may have any encoding and line ending.
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
    """Return whether `value` opens a quote that it doesn't close."""
    body = value.lstrip(b" \t")
    quote = body[:1]
    if quote not in (b'"', b"'"):
        return False
    # A backslash escapes the next byte in both kinds of quotes.
    return quote not in re.sub(rb"\\.", b"", body[1:], flags=re.DOTALL)


def lines(content: bytes) -> Iterator[Line]:
    """Yield the logical lines of a `.env`; joined, they are `content` again."""
    # splitlines() would also split at form feeds and separators within a value.
    physical: list[bytes] = re.findall(rb"[^\n]*\n|[^\n]+\Z", content)
    while physical:
        raw = physical.pop(0)
        match = _ASSIGNMENT.match(raw)
        if match and _unclosed(match["value"]):
            # A quoted value may span several lines, which hold no keys. A quote that never closes is one line.
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
    """Return the text that `value` means, or None where only Compose knows (interpolation, escapes, odd bytes)."""
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
    """Return `value` as Compose reads it back from a `.env` line; ValueError for control characters."""
    if any(ord(char) < 32 or ord(char) == 127 for char in value):
        raise ValueError("it contains a control character")
    if _PLAIN.match(value):
        return value
    if "'" not in value and not value.endswith("\\"):
        return "'" + value + "'"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("$", "\\$")
    return '"' + escaped + '"'


def values(content: bytes) -> dict[str, str | None]:
    """Return the value of each key's last line, which decides; None where only Compose knows it."""
    return {line.key: literal(line.value) for line in lines(content) if line.key}


def texts(content: bytes) -> dict[str, str]:
    """Return the value of each key's last line, as written where only Compose knows its meaning."""
    found = {}
    for line in lines(content):
        if line.key:
            simple = literal(line.value)
            found[line.key] = line.value.decode("utf-8", "replace").strip() if simple is None else simple
    return found


def without(content: bytes, keys: Container[str]) -> bytes:
    """Return `content` without the lines of these keys."""
    return b"".join(
        line.text + line.ending for line in lines(content) if line.key is None or line.key not in keys
    )


def merge(content: bytes, wanted: Mapping[str, str]) -> bytes:
    """Return `content` with each key of `wanted` set, and everything else unchanged.

    An existing key keeps its place, `export`, line ending, and its bytes where it has the wanted
    value; new keys are appended. Raises ValueError, naming the key, for a value that no line can hold
    and for a quote in `content` that never closes.
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
