"""What leaves a host: no secret in any spelling, no character that drives a terminal, and all the rest."""

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
    "sk-0123456789",
    "pa$word-123",
    'it\'s "so"',
    "back\\slash",
    "ü→🎉 key",
    "a b&c=d/e",
    "$$x",
    "a" * 99,
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    "spelling",
    [
        str, repr, json.dumps, shlex.quote, urllib.parse.quote,
        lambda one: urllib.parse.quote(one, safe=""),
        urllib.parse.quote_plus,
        lambda one: json.dumps(one, ensure_ascii=False),
        lambda one: one.replace("$", "$$"),
        lambda one: f"Bearer {one}, and again {one}",
    ],
    ids=["str", "repr", "json", "shell", "url", "url, slashes too", "form", "json with umlauts", "compose", "twice"],
)  # fmt: skip
def test_a_secret_in_every_spelling(secret: str, spelling: object) -> None:
    text = outgoing.clean(f"key {spelling(secret)}!", [secret])  # type: ignore[operator]
    assert secret not in text
    assert outgoing.HIDDEN in text
    assert text.startswith("key ")
    assert text.endswith("!")
    left = text.replace(outgoing.HIDDEN, "").replace("and again", "")
    assert not any(part in left for part in ("0123", "word", "slash", "so", 'key"', "%C3", "b&c", "aaa"))


def test_the_longest_first() -> None:
    assert outgoing.clean("abcdef abc", ["abc", "abcdef"]) == f"{outgoing.HIDDEN} {outgoing.HIDDEN}"


def test_wherever_it_is() -> None:
    deep = {"a": ["x sk-0123456789", ("sk-0123456789", {"b": "\x1b"})], "n": 1, "t": True, "none": None}
    hidden = outgoing.HIDDEN
    assert outgoing.clean(deep, ["sk-0123456789"]) == {
        "a": [f"x {hidden}", [hidden, {"b": "\\x1b"}]], "n": 1, "t": True, "none": None,
    }  # fmt: skip


@pytest.mark.parametrize("nothing", ["", "a", "ab"])
def test_what_is_too_short_to_be_hidden_hides_nothing(nothing: str) -> None:
    assert outgoing.clean("a banana, abc", [nothing]) == "a banana, abc"


@pytest.mark.parametrize(
    "code",
    [*range(9), *range(0x0B, 0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xD800, 0xDC9B, 0xDFFF],
)  # fmt: skip
def test_control_characters_are_written_out(code: int) -> None:
    shown = outgoing.visible(f"a{chr(code)}b")
    assert shown.isprintable()
    assert shown == f"a{chr(code).encode('unicode_escape').decode()}b"


@pytest.mark.parametrize("text", ["a\nb\tc", "Grüße → 日本語 🎉 👩‍👩‍👧", "שלום", "\u00a0", "\\x1b", "~!"])
def test_what_stays(text: str) -> None:
    assert outgoing.visible(text) == text


@given(st.text())
@example("\x1b]0;title\x07")
@example("\x9b31m")
def test_nothing_drives_a_terminal(text: str) -> None:
    shown = outgoing.visible(text)
    assert not any(unicodedata.category(one) == "Cc" and one not in "\n\t" for one in shown)
    assert outgoing.visible(shown) == shown


def test_c1_that_a_program_printed_as_utf_8() -> None:
    assert outgoing.visible(b"a\xc2\x9b31m".decode()) == "a\\x9b31m"


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
def test_names_of_none(name: str) -> None:
    assert list(outgoing.secret_values({name: "0123456789"})) == []
    assert list(outgoing.secret_values({name: "0123456789"}, [name])) == ["0123456789"]


@pytest.mark.parametrize(
    "url", ["http://me:s3cr3t@proxy:3128", "see https://me:s3cr3t@h/p?q and more", "//:s3cr3t@h"]
)
def test_a_password_in_a_url(url: str) -> None:
    assert list(outgoing.secret_values({"HTTPS_PROXY": url})) == ["s3cr3t"]


def test_no_value() -> None:
    assert outgoing.clean("None", outgoing.secret_values({"A_KEY": None, "B_KEY": ""})) == "None"


def test_all_that_a_host_knows(tmp_path: Path) -> None:
    for number, folder in enumerate((".", ".proven/current", ".proven/previous")):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        text = f"# no\nVLLM_API_KEY='old-$-{number}'\nHF_ENDPOINT=x\nMINE=mine-{number}\nexport A_TOKEN = \"t-{number}\"\n"
        (tmp_path / folder / ".env").write_text(text, encoding="utf-8")
    found = outgoing.known(str(tmp_path), {"MINE": "new-mine"})
    assert found == {"new-mine"} | {
        f"{one}-{number}" for one in ("old-$", "mine", "t") for number in range(3)
    }


def test_a_file_that_is_none_or_never_ends(tmp_path: Path) -> None:
    (tmp_path / ".proven").mkdir()
    os.mkfifo(tmp_path / ".env")
    (tmp_path / ".proven/current").symlink_to("/nowhere")
    (tmp_path / ".proven/previous").mkdir()
    (tmp_path / ".proven/previous/.env").mkdir()
    began = time.monotonic()
    assert outgoing.known(str(tmp_path), {}) == set()
    assert time.monotonic() - began < 2


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(b"\xff\xfe\nA_KEY=a\xffb-123\n")
    assert outgoing.known(str(tmp_path), {}) == {"a\ufffdb-123", "\ufffd\ufffd"}


def test_what_no_line_of_env_should_be_is_a_secret(tmp_path: Path) -> None:
    """Compose quotes the whole line when it refuses the file."""
    (tmp_path / ".env").write_text("# a note: nothing\nVLLM!API_KEY=sk-live-123456\nA=1\n", encoding="utf-8")
    assert outgoing.known(str(tmp_path), {}) == {"sk-live-123456"}


@pytest.mark.parametrize(
    ("url", "secret"),
    [
        ("http://u:S3CRETpw@p:1", "S3CRETpw"),
        ("http://u:p@ss@p", "p@ss"),
        ("https://ghp_0123456789@host", "ghp_0123456789"),
    ],
)
def test_the_login_of_a_url(url: str, secret: str) -> None:
    assert list(outgoing.secret_values({"PROXY": url})) == [secret]
