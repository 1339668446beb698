"""What a roll-out is asked for: read and checked before any host is; each fault is told in a sentence."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import keyword
import os
import re
import shlex
import sys
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import yaml
from ansible.errors import AnsibleError
from ansible.inventory.manager import InventoryManager, split_host_pattern
from ansible.parsing.dataloader import DataLoader
from ansible_collections.mlops.vllm_gpu.plugins.filter.fleet import is_wave
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.outgoing import SECRET_NAME

from fleet.text import visible

# Names of secrets: those of the role, and what people type. Numbers of tokens, and their tokenizer, are none.
_SECRET = re.compile(
    rf"{SECRET_NAME.pattern}|pass(?![a-z])|(^|_)pwd(?![a-z])|bearer|authorization|auth_?key|token(?!s|ize)|"
    r"(api|access|auth)_?tokens",
    re.IGNORECASE,
)
# In a text: an option or a variable, and what it is given. (An image's tag, after a slash and a name, is nothing given.)
_GIVEN = re.compile(
    r"""((?<![\w/-])--?[\w-]++(?=["']?\s)|(?<![\w-])[\w-]++(?=["']?\s*=)|(?<![\w/-])[\w-]++(?=["']?\s*:))"""
    r"""(?=["']?\s*[=:]?\s*(?:(?:bearer|basic)\s+)?("[^"]*"|'[^']*'|\S+))""",
    re.IGNORECASE,
)
# A name and a password, or a token, before a host. (An image's digest is none.)
_LOGIN = re.compile(r"://([^/\s]*)@|(?<![^\s/@:])([^\s/@:]+:[^\s/@]+)@(?!sha\d+:)")
_LAST_OPTION = re.compile(r"(?<![\w/-])--?[\w-]+(?=[\s=]*\Z)")
_DEEPEST = 20
# Of a word that is quoted in a message; characters.
_LONGEST = 200
_SAFER = (
    "and the command line is seen by everybody on this machine. Put it into the inventory's vault, or into a file: "
    "-e @FILE."
)


class Usage(Exception):  # noqa: N818 - it is a message for a person
    """What is wrong with the command line, and what to type instead."""


class Last(NamedTuple):
    """The last roll-out, as far as --resume takes it up."""

    id: str
    left: list[str]
    request: dict[str, Any]
    files: list[str]
    inventory: list[str]
    wave: str | None


def readable(path: str) -> bool:
    """Whether this can be read; False for what is no path at all."""
    try:
        return os.access(path, os.R_OK)
    except ValueError:
        return False


def is_file(path: str) -> bool:
    """Whether this is a file that can be read."""
    return readable(path) and Path(path).is_file()


def count(text: str) -> int:
    """Return a whole number from 1."""
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise Usage(f"--forks {text}: write a whole number from 1 to 999999.")
    return int(text)


def variables(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return what -e says: values, and files (by their whole path)."""
    values: dict[str, Any] = {}
    files = []
    for word in words:
        if word.startswith("@"):
            files.append(str(Path(word[1:]).resolve()) if is_file(word[1:]) else word[1:])
        elif word.startswith("{"):
            values.update(_object(word))
        else:
            values.update(_pairs(word))
    return values, files


def _object(word: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(word)
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise Usage(f"-e {_shown(word)}: this is no JSON object: {error}.") from None
    return found


def _pairs(word: str) -> Iterator[tuple[str, str]]:
    """Several in one word, as ansible-playbook takes them."""
    try:
        pairs = shlex.split(word)
    except ValueError as error:
        raise Usage(f"-e {_shown(word)}: {error}.") from None
    if not all("=" in pair for pair in pairs or [""]):
        raise Usage(f"-e {_shown(word)}: write KEY=VALUE, @FILE or a JSON object.")
    for pair in pairs:
        key, value = pair.split("=", 1)
        yield key, value


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name.replace("-", "_")))


def _shown(word: str) -> str:
    if any(map(_is_secret, re.findall(r"[\w-]+", word))) or _LOGIN.search(word):
        return "(hidden)"
    return word if len(word) < _LONGEST else f"{word[:_LONGEST]}…"


def check_values(values: dict[str, Any]) -> None:
    """Refuse what is no variable, and what a report must not hold."""
    for key in values:
        if not (key.isascii() and key.isidentifier()) or keyword.iskeyword(key):
            raise Usage(
                f"-e: {_shown(key)} can't be the name of a variable. A value with spaces needs quotes of its own: "
                """-e "KEY='--a=1 --b=2'"."""
            )
    _check("", values)
    for name, _secret in _secrets("", values):
        raise Usage(f"{name} looks like a secret or holds one, {_SAFER}")
    if "vllm_gpu_waves" in values:
        wave_sizes("-e vllm_gpu_waves", values["vllm_gpu_waves"])


def _check(name: str, value: object, depth: int = 0) -> None:
    """Go through a value to its depths."""
    if depth > _DEEPEST:
        raise Usage(f"-e: the value of {name} is nested deeper than {_DEEPEST} levels.")
    if isinstance(value, dict):
        for key, one in value.items():
            _check(name or key, key, depth + 1)
            _check(name or key, one, depth + 1)
    elif isinstance(value, list):
        for one in value:
            _check(name, one, depth + 1)
    elif isinstance(value, str) and visible(value) != value:
        raise Usage(f"-e: the value of {name} holds control characters.")


def check_files(files: Iterable[str]) -> list[str]:
    """Refuse files of -e that can't be read; return the secrets in them, as far as they aren't encrypted."""
    secrets: list[str] = []
    for file in files:
        if not is_file(file):
            raise Usage(f"-e @{file}: there is no such file, or it can't be read.")
        with Path(file).open("rb") as opened:
            if opened.read(14) == b"$ANSIBLE_VAULT":
                continue
        with contextlib.suppress(AnsibleError, ValueError, RecursionError), _quiet():
            found = DataLoader().load_from_file(file)
            if isinstance(found, dict):
                if "vllm_gpu_hosts" in found:
                    raise Usage(
                        f"-e @{file}: it holds vllm_gpu_hosts. Give that with -e vllm_gpu_hosts=PATTERN."
                    )
                secrets += [secret for _name, secret in _secrets("", found)]
                continue
        # Not Ansible's own words: they quote the file, secrets included.
        raise Usage(f"-e @{file}: it holds no variables, as YAML or JSON.")
    return secrets


def _secrets(name: str, value: object, *, named: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the secrets in a value, each with the name of the variable or key that holds it."""
    if isinstance(value, dict):
        pair = _names_a_secret(value)
        for key, one in value.items():
            given = pair and str(key).lower() == "value"
            # A key that holds a secret itself must not be repeated.
            yield from ((name or "A variable", secret) for secret in _given(str(key)))
            yield from _secrets(str(key), one, named=named or given or _is_secret(str(key)))
    elif isinstance(value, (list, tuple)):
        for before, one in zip([None, *value], value, strict=False):
            option = _LAST_OPTION.search(before) if isinstance(before, str) else None
            yield from _secrets(name, one, named=named or bool(option and _is_secret(option[0])))
    # Not what is encrypted: it has no text yet.
    elif isinstance(value, (str, int, float, date)) and not isinstance(value, bool):
        text = str(value)
        if named:
            yield name, text
        yield from ((name, secret) for secret in _given(text))
        inner = _structure(text)
        if inner is not None:
            yield from _secrets(name, inner, named=named)


def _names_a_secret(entry: dict[Any, Any]) -> bool:
    """Whether it is such as {name: HF_TOKEN, value: …}."""
    return any(
        isinstance(one, str) and re.fullmatch(r"[\w-]+", one) and _is_secret(one)
        for key, one in entry.items()
        if str(key).lower() != "value"
    )


def _given(text: str) -> Iterator[str]:
    """Yield what a text gives to an option or a variable that is a secret's, and logins before a host."""
    for name, given in _GIVEN.findall(text):
        if _is_secret(name):
            # With the end of what may surround it, and without.
            yield from dict.fromkeys([given, given.strip("\"',;]}")])
    for one, other in _LOGIN.findall(text):
        login = one or other
        spelled = [login, login.partition(":")[2] or login]
        yield from dict.fromkeys([*spelled, *map(unquote, spelled)])


def _structure(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return the list or object that a text spells; None where it is another text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
        found = yaml.safe_load(text)
        return found if isinstance(found, (list, dict)) else None
    return None


def wave_sizes(option: str, asked: object) -> list[int | str]:
    """Return the sizes of the waves as Ansible's `serial` takes them."""
    words = [str(one) for one in asked] if isinstance(asked, list) else []
    if not words or not all(map(is_wave, words)):
        raise Usage(
            f"{option}: the sizes of waves are a list of whole numbers from 1 to 999999 and of percentages from "
            "1% to 100%, such as 1,10%,50%."
        )
    return [int(one) if one.isdigit() else one for one in words]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep back Ansible's warnings, which come before a problem is told in a sentence."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield
    sys.stderr.write(visible(said.getvalue()))


def read_inventory(inventory: list[str], group: str) -> tuple[InventoryManager, list[str]]:
    """Return the inventory and the hosts of its group."""
    for source in inventory:
        if "," not in source and not readable(source):
            raise Usage(f"There is no inventory {source}, or it can't be read.")
    try:
        with _quiet():
            manager = InventoryManager(loader=DataLoader(), sources=inventory)
            everybody = [host.name for host in manager.get_hosts(group)]
    except Exception as error:  # noqa: BLE001 - its plugins raise whatever they like
        shown = shlex.join(
            ["ansible-inventory", *(word for one in inventory for word in ("-i", one)), "--list"]
        )
        raise Usage(f"The inventory can't be read: {error}. More about it: {shown}") from None
    if not everybody:
        raise Usage(f"The inventory {', '.join(inventory)} has no host in the group {group}.")
    return manager, everybody


def limited(manager: InventoryManager, limit: str, group: str) -> list[str]:
    """Return the hosts that --limit leaves; Usage for a word in it that names none."""
    words = split_host_pattern(limit)
    # Ansible passes over what it can't read in a pattern, and then takes all hosts.
    between = re.compile(r"[\s,:]")
    if not words or between.sub("", limit) != between.sub("", "".join(words)):
        raise Usage(f"--limit {limit}: this is no pattern of hosts.")
    try:
        words = [one for word in words for one in (_lines(word[1:]) if word.startswith("@") else [word])]
    except (OSError, ValueError):
        raise Usage(
            f"--limit {limit}: there is no such file with names of hosts, or it can't be read."
        ) from None
    for word in words:
        name = word.lstrip("!&")
        try:
            # An implicit one is this machine, which Ansible adds to any inventory.
            found = name not in ("", "~") and any(not host.implicit for host in manager.get_hosts(name))
        except Exception:  # noqa: BLE001 - a pattern can be wrong in many ways
            found = False
        if not found:
            near = difflib.get_close_matches(name, [*manager.hosts, *manager.groups], n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise Usage(f"--limit {word}: the inventory has no such host or group.{hint}")
    manager.subset(words)
    chosen = [host.name for host in manager.get_hosts(group)]
    if not chosen:
        raise Usage(f"--limit {limit} leaves no host of the group {group}.")
    return chosen


def _lines(path: str) -> list[str]:
    lines = map(str.strip, Path(path).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def last(folder: Path) -> Last:
    """Return what the report of the last roll-out says."""
    path = folder / "latest/report.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        hosts = {str(one["name"]): str(one["outcome"]) for one in found["hosts"]}
        not_right = [name for name, outcome in hosts.items() if outcome not in ("changed", "already_right")]
        result = Last(
            id=str(found["id"]),
            left=[*not_right, *map(str, found.get("left_over", []))],
            request=dict(found["request"]),
            files=list(map(str, found["files"])),
            inventory=shlex.split(str(found["inventory"])),
            wave=found["wave"],
        )
        if found["schema"] != 1 or not isinstance(result.wave, (str, type(None))):
            raise ValueError
    except FileNotFoundError:
        raise Usage(f"There is no roll-out in {folder} to go on with.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Usage(
            f"{path} can't be read as the report of a roll-out, so that nobody knows what is left of it. Roll out "
            "again without --resume: hosts that are right already stay as they are."
        ) from None
    return result
