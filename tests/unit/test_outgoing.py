"""What leaves a host: no secret in any spelling, and no control character."""

from __future__ import annotations

import json
import os
import shlex
import time
import unicodedata
import urllib.parse
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import outgoing
from hypothesis import example, given
from hypothesis import strategies as st

SECRETS = [
    "sk-0123456789", "pa$word-123", 'it\'s "so"', "back\\slash", "ü→🎉 key", "a b&c=d/e", "$$x", "a" * 99,
]  # fmt: skip


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "spelling",
    [
        str, repr, json.dumps, shlex.quote, urllib.parse.quote,
        lambda secret: urllib.parse.quote(secret, safe=""),
        urllib.parse.quote_plus,
        lambda secret: json.dumps(secret, ensure_ascii=False),
        lambda secret: secret.replace("$", "$$"),
        lambda secret: f"Bearer {secret}, and again {secret}",
    ],
    ids=["str", "repr", "json", "shell", "url", "url, slashes too", "form", "json with umlauts", "compose", "twice"],
)  # fmt: skip
def test_a_secret_is_hidden_in_every_spelling(secret: str, spelling: object) -> None:
    text = outgoing.clean(f"key {spelling(secret)}!", [secret])  # type: ignore[operator]
    assert secret not in text
    assert outgoing.HIDDEN in text
    assert text.startswith("key ")
    assert text.endswith("!")
    left = text.replace(outgoing.HIDDEN, "").replace("and again", "")
    assert not any(part in left for part in ("0123", "word", "slash", "so", 'key"', "%C3", "b&c", "aaa"))


def test_the_longest_secret_is_hidden_first() -> None:
    assert outgoing.clean("abcdef abc", ["abc", "abcdef"]) == f"{outgoing.HIDDEN} {outgoing.HIDDEN}"


def test_texts_are_cleaned_at_any_depth() -> None:
    deep = {"a": ["x sk-0123456789", ("sk-0123456789", {"b": "\x1b"})], "n": 1, "t": True, "none": None}
    hidden = outgoing.HIDDEN
    assert outgoing.clean(deep, ["sk-0123456789"]) == {
        "a": [f"x {hidden}", [hidden, {"b": "\\x1b"}]], "n": 1, "t": True, "none": None,
    }  # fmt: skip


def test_short_secrets_are_not_hidden() -> None:
    assert outgoing.clean("a banana, abc", ["", "a", "ab"]) == "a banana, abc"


@pytest.mark.parametrize(
    "code",
    [*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDC9B, 0xDFFF],
)  # fmt: skip
def test_control_characters_are_escaped(code: int) -> None:
    shown = outgoing.visible(f"a{chr(code)}b")
    assert shown.isprintable()
    assert shown == f"a{chr(code).encode('unicode_escape').decode()}b"


@pytest.mark.parametrize("text", ["a\nb\tc", "Grüße → 日本語 🎉 👩‍👩‍👧", "שלום", "\u00a0", "\\x1b", "~!"])
def test_other_characters_stay(text: str) -> None:
    assert outgoing.visible(text) == text


@given(st.text())
@example("\x1b]0;title\x07")
@example("\x9b31m")
def test_no_control_character_is_left(text: str) -> None:
    shown = outgoing.visible(text)
    assert not any(unicodedata.category(char) == "Cc" and char not in "\n\t" for char in shown)
    assert outgoing.visible(shown) == shown


@pytest.mark.parametrize(
    "name",
    [
        "VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PASSWORD",
        "DB_PASSWD", "db_password", "CREDENTIALS", "KEY", "MY_KEY", "SSL_PRIVATE_KEY", "APIKEY", "BASIC_AUTH", "SECRET_X",
        "GPG_PASSPHRASE",
    ],
)  # fmt: skip
def test_names_of_secrets(name: str) -> None:
    assert list(outgoing.secret_values({name: "0123456789"})) == ["0123456789"]


@pytest.mark.parametrize(
    "name", ["VLLM_MODEL", "MAX_TOKENS", "TOKENIZERS_PARALLELISM", "AUTHOR", "KEYBOARD", "HOME"]
)
def test_names_of_other_variables(name: str) -> None:
    assert list(outgoing.secret_values({name: "0123456789"})) == []
    assert list(outgoing.secret_values({name: "0123456789"}, [name])) == ["0123456789"]


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("http://me:s3cr3t@proxy:3128", "s3cr3t"),
        ("see https://me:s3cr3t@h/p?q and more", "s3cr3t"),
        ("//:s3cr3t@h", "s3cr3t"),
        ("http://u:p@ss@p", "p@ss"),
        ("https://ghp_0123456789@host", "ghp_0123456789"),
    ],
)
def test_the_login_in_a_url_is_a_secret(url: str, secret: str) -> None:
    assert list(outgoing.secret_values({"HTTPS_PROXY": url})) == [secret]


def test_an_empty_secret_hides_nothing() -> None:
    assert outgoing.clean("None", outgoing.secret_values({"A_KEY": None, "B_KEY": ""})) == "None"


def test_the_secrets_of_a_host(tmp_path: Path) -> None:
    for number, folder in enumerate((".", ".proven/current", ".proven/previous")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        text = f"# no\nVLLM_API_KEY='old-$-{number}'\nHF_ENDPOINT=x\nMINE=mine-{number}\nexport A_TOKEN = \"t-{number}\"\n"
        (tmp_path / folder / ".env").write_text(text, encoding="utf-8")
    found = outgoing.known(str(tmp_path), {"MINE": "new-mine"})
    assert found == {"new-mine"} | {
        f"{start}-{number}" for start in ("old-$", "mine", "t") for number in range(3)
    }


def test_an_env_that_is_not_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / ".proven").mkdir()
    os.mkfifo(tmp_path / ".env")
    (tmp_path / ".proven/current").symlink_to("/nowhere")
    (tmp_path / ".proven/previous").mkdir()
    (tmp_path / ".proven/previous/.env").mkdir()
    started = time.monotonic()
    assert outgoing.known(str(tmp_path), {}) == set()
    assert time.monotonic() - started < 2


def test_an_env_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe\nA_KEY=a\xffb-123\n")
    assert outgoing.known(str(tmp_path), {}) == {"a\ufffdb-123", "\ufffd\ufffd"}


def test_the_value_of_a_malformed_line_is_a_secret(tmp_path: Path) -> None:
    """Compose quotes the whole line when it refuses the file."""
    (tmp_path / ".env").write_text("# a note: nothing\nVLLM!API_KEY=sk-live-123456\nA=1\n", encoding="utf-8")
    assert outgoing.known(str(tmp_path), {}) == {"sk-live-123456"}
