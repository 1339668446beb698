"""Text from elsewhere, made fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# What a terminal obeys, what turns the direction of the text around, and what no page can hold.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)
# What is shorter can't be hidden: the text would be full of holes.
_SHORTEST_SECRET = 4


def visible(text: str) -> str:
    r"""Return the text with its control characters written out, as `\x1b`; line breaks and tabs stay."""
    return _UNSEEN.sub(lambda one: ascii(one[0])[1:-1], text.replace("\r\n", "\n"))


def visible_in(value: Any) -> Any:  # noqa: ANN401
    """Return the same value, with every text in it visible."""
    if isinstance(value, dict):
        return {visible_in(key): visible_in(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible_in(one) for one in value]
    return visible(value) if isinstance(value, str) else value


def without(secrets: Iterable[str], text: str) -> str:
    """Return the text with these values hidden, the longest first: one may be a part of another."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= _SHORTEST_SECRET:
            text = text.replace(secret, "(hidden)")
    return text
