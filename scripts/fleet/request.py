"""Read and check the request of a rollout before any host is contacted; Usage reports a fault in a sentence."""

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

# Names of secrets: the role's, and those that people type. Not numbers of tokens, nor their tokenizer.
_SECRET = re.compile(
    rf"{SECRET_NAME.pattern}|pass(?![a-z])|(^|_)pwd(?![a-z])|bearer|authorization|auth_?key|token(?!s|ize)|"
    r"(api|access|auth)_?tokens",
    re.IGNORECASE,
)
# In a text: an option or a variable, and its value. (Not the tag of an image, which follows a slash and a name.)
_ASSIGNED = re.compile(
    r"""((?<![\w/-])--?[\w-]++(?=["']?\s)|(?<![\w-])[\w-]++(?=["']?\s*=)|(?<![\w/-])[\w-]++(?=["']?\s*:))"""
    r"""(?=["']?\s*[=:]?\s*(?:(?:bearer|basic)\s+)?("[^"]*"|'[^']*'|\S+))""",
    re.IGNORECASE,
)
# A name and a password, or a token, before a host. (Not an image's digest.)
_LOGIN = re.compile(r"://([^/\s]*)@|(?<![^\s/@:])([^\s/@:]+:[^\s/@]+)@(?!sha\d+:)")
_LAST_OPTION = re.compile(r"(?<![\w/-])--?[\w-]+(?=[\s=]*\Z)")
_MAX_DEPTH = 20
_MAX_QUOTED = 200  # characters of the command line in a message


class Usage(Exception):  # noqa: N818 - it is a message for a person
    """A fault of the command line, and what to type instead."""


class Last(NamedTuple):
    """What --resume takes from the last rollout."""

    id: str
    left: list[str]
    request: dict[str, Any]
    files: list[str]
    inventory: list[str]
    wave: str | None


def readable(path: str) -> bool:
    """Whether this is a path that can be read."""
    try:
        return os.access(path, os.R_OK)
    except ValueError:
        return False


def is_file(path: str) -> bool:
    """Whether this is a readable file."""
    return readable(path) and Path(path).is_file()


def count(text: str) -> int:
    """Return a whole number from 1."""
    if not re.fullmatch("[1-9][0-9]{0,5}", text):
        raise Usage(f"--forks {text}: write a whole number from 1 to 999999.")
    return int(text)


def variables(words: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of -e, and its files with absolute paths."""
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
        raise Usage(f"-e {_quoted(word)}: this is not a JSON object: {error}.") from None
    return found


def _pairs(word: str) -> Iterator[tuple[str, str]]:
    """Yield the pairs in one word, as ansible-playbook splits it."""
    try:
        pairs = shlex.split(word)
    except ValueError as error:
        raise Usage(f"-e {_quoted(word)}: {error}.") from None
    if not all("=" in pair for pair in pairs or [""]):
        raise Usage(f"-e {_quoted(word)}: write KEY=VALUE, @FILE or a JSON object.")
    for pair in pairs:
        key, value = pair.split("=", 1)
        yield key, value


def _is_secret(name: str) -> bool:
    return bool(_SECRET.search(name.replace("-", "_")))


def _quoted(word: str) -> str:
    if any(map(_is_secret, re.findall(r"[\w-]+", word))) or _LOGIN.search(word):
        return "(hidden)"
    return word if len(word) < _MAX_QUOTED else f"{word[:_MAX_QUOTED]}…"


def check_values(values: dict[str, Any]) -> None:
    """Refuse names that are not variables, and values that a report must not contain."""
    for key in values:
        if not (key.isascii() and key.isidentifier()) or keyword.iskeyword(key):
            raise Usage(
                f"-e: {_quoted(key)} cannot be the name of a variable. A value with spaces needs its own quotes: "
                """-e "KEY='--a=1 --b=2'"."""
            )
    _check("", values)
    for name, _secret in _secrets("", values):
        raise Usage(
            f"{name} looks like a secret or contains one, and every user of this machine can see the command line. "
            "Put it into the inventory's vault, or into a file: -e @FILE."
        )
    if "vllm_gpu_waves" in values:
        wave_sizes("-e vllm_gpu_waves", values["vllm_gpu_waves"])


def _check(name: str, value: object, depth: int = 0) -> None:
    if depth > _MAX_DEPTH:
        raise Usage(f"-e: the value of {name} is nested deeper than {_MAX_DEPTH} levels.")
    if isinstance(value, dict):
        for key, inner in value.items():
            _check(name or key, key, depth + 1)
            _check(name or key, inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check(name, inner, depth + 1)
    elif isinstance(value, str) and visible(value) != value:
        raise Usage(f"-e: the value of {name} contains control characters.")


def check_files(files: Iterable[str]) -> list[str]:
    """Refuse files of -e that cannot be read; return the unencrypted secrets in them."""
    secrets: list[str] = []
    for file in files:
        if not is_file(file):
            raise Usage(f"-e @{file}: this file does not exist or cannot be read.")
        with Path(file).open("rb") as opened:
            if opened.read(14) == b"$ANSIBLE_VAULT":
                continue
        with contextlib.suppress(AnsibleError, ValueError, RecursionError), _quiet():
            found = DataLoader().load_from_file(file)
            if isinstance(found, dict):
                if "vllm_gpu_hosts" in found:
                    raise Usage(f"-e @{file} sets vllm_gpu_hosts. Use -e vllm_gpu_hosts=PATTERN instead.")
                secrets += [secret for _name, secret in _secrets("", found)]
                continue
        # Not Ansible's own message: it quotes the file, secrets included.
        raise Usage(f"-e @{file}: this file contains no variables as YAML or JSON.")
    return secrets


def _secrets(name: str, value: object, *, named: bool = False) -> Iterator[tuple[str, str]]:
    """Yield the secrets in a value, each with the name of the variable or key that holds it."""
    if isinstance(value, dict):
        names_secret = _names_a_secret(value)
        for key, inner in value.items():
            text = str(key)
            # A key that holds a secret itself must not be repeated.
            yield from ((name or "A variable", secret) for secret in _assigned(text))
            secret_value = names_secret and text.lower() == "value"
            yield from _secrets(text, inner, named=named or secret_value or _is_secret(text))
    elif isinstance(value, (list, tuple)):
        for before, inner in zip([None, *value], value, strict=False):
            option = _LAST_OPTION.search(before) if isinstance(before, str) else None
            yield from _secrets(name, inner, named=named or bool(option and _is_secret(option[0])))
    # Nothing encrypted: it has no text yet.
    elif isinstance(value, (str, int, float, date)) and not isinstance(value, bool):
        text = str(value)
        if named:
            yield name, text
        yield from ((name, secret) for secret in _assigned(text))
        structure = _structure(text)
        if structure is not None:
            yield from _secrets(name, structure, named=named)


def _names_a_secret(entry: dict[Any, Any]) -> bool:
    """Whether the entry is like {name: HF_TOKEN, value: …}."""
    names = [name for key, name in entry.items() if str(key).lower() != "value" and isinstance(name, str)]
    return any(re.fullmatch(r"[\w-]+", name) and _is_secret(name) for name in names)


def _assigned(text: str) -> Iterator[str]:
    """Yield what a text assigns to an option or variable with a secret's name, and logins before a host."""
    for name, value in _ASSIGNED.findall(text):
        if _is_secret(name):
            # With any punctuation that follows, and without.
            yield from dict.fromkeys([value, value.strip("\"',;]}")])
    for in_url, bare in _LOGIN.findall(text):
        login = in_url or bare
        spellings = [login, login.partition(":")[2] or login]
        yield from dict.fromkeys([*spellings, *map(unquote, spellings)])


def _structure(text: str) -> list[Any] | dict[Any, Any] | None:
    """Return the list or object that a text spells out, if it does."""
    if text.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):
            found = yaml.safe_load(text)
            return found if isinstance(found, (list, dict)) else None
    return None


def wave_sizes(option: str, sizes: object) -> list[int | str]:
    """Return the sizes of the waves as Ansible's `serial` takes them."""
    words = list(map(str, sizes)) if isinstance(sizes, list) else []
    if not words or not all(map(is_wave, words)):
        raise Usage(
            f"{option}: the sizes of waves are a list of whole numbers from 1 to 999999 and of percentages from "
            "1% to 100%, such as 1,10%,50%."
        )
    return [int(word) if word.isdigit() else word for word in words]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drop Ansible's warnings where Usage is raised, which reports the problem in a sentence."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        yield
    sys.stderr.write(visible(output.getvalue()))


def read_inventory(inventory: list[str], group: str) -> tuple[InventoryManager, list[str]]:
    """Return the inventory and the hosts of its group."""
    for source in inventory:
        if "," not in source and not readable(source):
            raise Usage(f"The inventory {source} does not exist or cannot be read.")
    try:
        with _quiet():
            manager = InventoryManager(loader=DataLoader(), sources=inventory)
            everybody = [host.name for host in manager.get_hosts(group)]
    except Exception as error:  # noqa: BLE001 - its plugins raise anything
        sources = [word for source in inventory for word in ("-i", source)]
        command = shlex.join(["ansible-inventory", *sources, "--list"])
        raise Usage(f"The inventory cannot be read: {error}. For details: {command}") from None
    if not everybody:
        raise Usage(f"The inventory {', '.join(inventory)} has no host in the group {group}.")
    return manager, everybody


def limited(manager: InventoryManager, limit: str, group: str) -> list[str]:
    """Return the hosts that --limit leaves; refuse a word in it that matches none."""
    words = split_host_pattern(limit)
    # Ansible ignores what it cannot parse in a pattern, and then takes all hosts.
    separators = re.compile(r"[\s,:]")
    if not words or separators.sub("", limit) != separators.sub("", "".join(words)):
        raise Usage(f"--limit {limit}: this is not a pattern of hosts.")
    try:
        words = [name for word in words for name in (_lines(word[1:]) if word.startswith("@") else [word])]
    except (OSError, ValueError):
        raise Usage(f"--limit {limit}: this file of host names does not exist or cannot be read.") from None
    for word in words:
        name = word.lstrip("!&")
        try:
            # An implicit host is this machine, which Ansible adds to any inventory.
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
    """Return the last rollout, from its report."""
    path = folder / "latest/report.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        hosts = {str(host["name"]): str(host["outcome"]) for host in found["hosts"]}
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
        raise Usage(f"There is no rollout in {folder} to continue.") from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Usage(
            f"{path} cannot be read as the report of a rollout, so what is left of it is unknown. Start a new "
            "rollout without --resume: hosts that are already right stay as they are."
        ) from None
    return result
