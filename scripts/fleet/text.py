"""Text from hosts and people, made safe to show."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import outgoing

# What controls a terminal or reverses the direction of the text, and what no page can hold.
_CONTROL = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    r"""Return the text with its control characters written out, as `\x1b`; line breaks and tabs stay."""
    return _CONTROL.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))


def visible_in(value: Any) -> Any:  # noqa: ANN401
    """Return the same value, with every text in it made visible."""
    if isinstance(value, dict):
        return {visible_in(key): visible_in(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [visible_in(item) for item in value]
    return visible(value) if isinstance(value, str) else value


# The secrets of a rollout stay the same.
_spellings = lru_cache(maxsize=1)(outgoing.spellings)


def without(secrets: Iterable[str], text: str) -> str:
    """Return the text with these values hidden, also where they are quoted or encoded."""
    for spelling in _spellings(tuple(secrets)):
        text = text.replace(spelling, "(hidden)")
    return text
