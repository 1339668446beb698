"""Text from elsewhere, made fit to be shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from ansible_collections.mlops.vllm_gpu.plugins.module_utils import outgoing

# What a terminal obeys, what turns the direction of the text around, and what no page can hold.
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


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
    """Return the text with these values hidden, in any spelling."""
    for spelling in _spellings(tuple(secrets)):
        text = text.replace(spelling, "(hidden)")
    return text


@lru_cache(maxsize=1)  # a roll-out has the same ones from its beginning to its end
def _spellings(secrets: tuple[str, ...]) -> list[str]:
    return outgoing.spellings(secrets)
