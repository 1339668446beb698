"""As much of Go's templates as `docker --format` is asked for here.

Fields, `json`, `index`, `join`, `range` and `with`; anything else is an error, and so
is a field that isn't there: a wrong answer would be worse than none.
"""

from __future__ import annotations

import json
import re
from typing import Any

TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[()]|[^\s()]+')


def render(template: str, data: object) -> str:
    """Return the template filled in from the data."""
    # Text and actions take turns.
    pieces = re.split(r"\{\{(.*?)\}\}", template, flags=re.DOTALL)
    text, end = _block(pieces, 0, data)
    if end != len(pieces):
        raise ValueError("an {{end}} too many")
    return text


def _block(pieces: list[str], at: int, data: Any) -> tuple[str, int]:  # noqa: ANN401 (what JSON holds)
    """Fill in what stands up to the block's end; return it, and the place behind it."""
    text = pieces[at]
    at += 1
    while at < len(pieces):
        action = pieces[at].strip()
        if action == "end":
            return text, at + 1
        if action.startswith("range "):
            body, after = "", _end(pieces, at + 1)
            for one in value(action.removeprefix("range "), data) or []:
                body += _block(pieces, at + 1, one)[0]
            at = after
            text += body
        elif action.startswith("with "):
            inner = value(action.removeprefix("with "), data)
            if inner:
                text += _block(pieces, at + 1, inner)[0]
            at = _end(pieces, at + 1)
        else:
            text += shown(value(action, data))
            at += 1
        text += pieces[at]
        at += 1
    return text, at


def _end(pieces: list[str], at: int) -> int:
    """Return the place behind the end of a block."""
    depth = 1
    for place in range(at + 1, len(pieces), 2):
        action = pieces[place].strip()
        depth += action.startswith(("range ", "with ")) - (action == "end")
        if depth == 0:
            return place + 1
    raise ValueError("a {{range}} or {{with}} without its {{end}}")


def value(expression: str, data: object) -> Any:  # noqa: ANN401
    """Return what an expression stands for."""
    tokens = TOKEN.findall(expression)
    result = _call(tokens, data)
    if tokens:
        raise ValueError(f"not understood: {expression}")
    return result


def _call(tokens: list[str], data: object) -> Any:  # noqa: ANN401
    """Take one expression off the tokens: a function and its operands, or an operand."""
    name = tokens[0]
    if name not in ("json", "index", "join"):
        return _operand(tokens, data)
    tokens.pop(0)
    operands = []
    while tokens and tokens[0] != ")":
        operands.append(_operand(tokens, data))
    if name == "json":
        # As Go writes it: no spaces.
        return json.dumps(operands[0], separators=(",", ":"), ensure_ascii=False)
    if name == "join":
        return operands[1].join(operands[0])
    # A key that isn't there is the empty string in a map of strings.
    return operands[0].get(operands[1], "") if isinstance(operands[0], dict) else operands[0][operands[1]]


def _operand(tokens: list[str], data: Any) -> Any:  # noqa: ANN401
    """Take one operand off the tokens."""
    word = tokens.pop(0)
    if word == "(":
        result = _call(tokens, data)
        if tokens.pop(0) != ")":
            raise ValueError("a bracket isn't closed")
        return result
    if word.startswith('"'):
        return json.loads(word)
    if not word.startswith("."):
        raise ValueError(f"not understood: {word}")
    for field in word.split(".")[1:]:
        data = data[field] if field else data
    return data


def shown(one: object) -> str:
    """Return a value as Go prints it."""
    if isinstance(one, bool):
        return str(one).lower()
    if isinstance(one, list):
        return f"[{' '.join(map(shown, one))}]"
    return str(one)
