"""Text from hosts and people, as it is shown."""

from __future__ import annotations

import json
from urllib.parse import quote

import pytest
from fleet.text import visible, visible_in, without


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x1b[2J\x9b31m\x85\x7f\x00", r"\x1b[2J\x9b31m\x85\x7f\x00"),
        ("first\r\nsecond\tthird\n", "first\nsecond\tthird\n"),
        ("hidden\rshown", r"hidden\rshown"),
        ("a\u202eb\u2066c\u200fd\u061ce", r"a\u202eb\u2066c\u200fd\u061ce"),
        ("\udc9b\ufffe", r"\udc9b\ufffe"),
        ("Größe 東京 🚀 [bold] :smile: \\x1b", "Größe 東京 🚀 [bold] :smile: \\x1b"),
    ],
)
def test_control_characters_are_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible_in({text: [(text, 1), None]}) == {shown: [[shown, 1], None]}


def test_secrets_are_hidden_the_longest_first() -> None:
    assert without(["sk-1", "sk-12345", "", "1"], "sk-12345 and sk-1: 1") == "(hidden) and (hidden): 1"


@pytest.mark.parametrize("secret", ['pa"s\\s/w ö&rd', "a$b'c"])
def test_secrets_are_hidden_in_every_spelling(secret: str) -> None:
    spelled = [secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe=""), repr(secret)[1:-1]]
    assert without([secret], " ".join(spelled)) == " ".join(["(hidden)"] * len(spelled))
