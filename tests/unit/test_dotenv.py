"""The `.env` merge: the role's keys are set, and the user's lines stay."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

PLUGIN = Path(__file__).resolve().parents[2] / ".cache/docker/cli-plugins/docker-compose"
KEYS = st.from_regex(r"[A-Z_][A-Z0-9_]{0,8}", fullmatch=True)
# Anything that a `.env` line can hold at all.
VALUES = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\x7f"))
# Lines of a user's file, well-formed or not.
LINES = st.one_of(
    st.binary(max_size=20),
    st.builds(lambda k, v: f"{k}={v}".encode(), KEYS, VALUES),
    st.builds(lambda k, v: f"export {k} = '{v}'".encode(), KEYS, VALUES),
    st.sampled_from([b"# comment", b"", b"A=1", b'A="1', b"A='x\ny'", b"A: 1", b"\xff\xfe=1", b"A=$B"]),
)
FILES = st.builds(
    lambda parts, end: end.join(parts), st.lists(LINES, max_size=8), st.sampled_from([b"\n", b"\r\n"])
)


def merge_if_readable(content: bytes, wanted: dict[str, str]) -> bytes:
    """Merge, or skip a file with an open quote."""
    try:
        return dotenv.merge(content, wanted)
    except ValueError as error:
        if "never closed" not in str(error):
            raise
        reject()


@given(FILES)
def test_lines_keep_every_byte(content: bytes) -> None:
    assert b"".join(line.text + line.ending for line in dotenv.lines(content)) == content


@given(FILES, st.dictionaries(KEYS, VALUES, max_size=4))
@example(b"A=1\nA=2", {"A": "3"})
@example(b"A='x\nB=inside\n'\n", {"B": "new"})
def test_merge_sets_the_wanted_keys_and_keeps_the_rest(content: bytes, wanted: dict[str, str]) -> None:
    before = list(dotenv.lines(content))
    after = list(dotenv.lines(merge_if_readable(content, wanted)))
    # Every line that doesn't decide a wanted key stays, in order.
    deciding: dict[str | None, int] = {}
    deciding.update((line.key, number) for number, line in enumerate(before) if line.key in wanted)
    for number, line in enumerate(before):
        if deciding.get(line.key) != number:
            assert after[number].text == line.text
            assert after[number].ending == line.ending or number == len(before) - 1
    assert set(wanted) <= {line.key for line in after}


@given(FILES, st.dictionaries(KEYS, VALUES, max_size=4))
def test_a_second_merge_changes_nothing(content: bytes, wanted: dict[str, str]) -> None:
    merged = merge_if_readable(content, wanted)
    assert dotenv.merge(merged, wanted) == merged


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"", b"GPU_DEVICE_ID=1\n"),
        (b"X=1", b"X=1\nGPU_DEVICE_ID=1\n"),
        (b"GPU_DEVICE_ID=0\n# mine\nX=1\n", b"GPU_DEVICE_ID=1\n# mine\nX=1\n"),
        (b"export GPU_DEVICE_ID=0\r\nX=1\r\n", b"export GPU_DEVICE_ID=1\r\nX=1\r\n"),
        (b"GPU_DEVICE_ID = 0\n", b"GPU_DEVICE_ID=1\n"),
        (b'GPU_DEVICE_ID="1" # mine\n', b"GPU_DEVICE_ID=1\n"),
        (b'GPU_DEVICE_ID="1"\n', b'GPU_DEVICE_ID="1"\n'),
        (b"GPU_DEVICE_ID=1 # mine\n", b"GPU_DEVICE_ID=1 # mine\n"),
        (b"GPU_DEVICE_ID=0\nGPU_DEVICE_ID=0\n", b"GPU_DEVICE_ID=0\nGPU_DEVICE_ID=1\n"),
        (b"#GPU_DEVICE_ID=0\n", b"#GPU_DEVICE_ID=0\nGPU_DEVICE_ID=1\n"),
        (b"GPU_DEVICE_ID=${X:-1}\n", b"GPU_DEVICE_ID=1\n"),
        (b"N='\nGPU_DEVICE_ID=0\n'\n", b"N='\nGPU_DEVICE_ID=0\n'\nGPU_DEVICE_ID=1\n"),
    ],
)
def test_merge_by_example(before: bytes, after: bytes) -> None:
    assert dotenv.merge(before, {"GPU_DEVICE_ID": "1"}) == after


@pytest.mark.parametrize("value", ["a\nb", "\x00", "\x7f", "\r"])
def test_control_characters_are_refused_by_key(value: str) -> None:
    with pytest.raises(ValueError, match="VLLM_MODEL can't be written"):
        dotenv.merge(b"", {"VLLM_MODEL": value})


def test_a_quote_that_never_closes_is_refused_by_key() -> None:
    with pytest.raises(ValueError, match="quote after MINE= is never closed"):
        dotenv.merge(b"A=1\nMINE='x\nB=2\n", {"GPU_DEVICE_ID": "1"})


@settings(max_examples=30, deadline=None)
@given(st.lists(VALUES, min_size=20, max_size=40))
@example(["it's", 'a "b" c', "$HOME ${X} $$", "a\\b\\", " # no comment", "`id` $(id)", "\\'", "'", "=x"])
def test_compose_reads_back_what_was_written(values: list[str]) -> None:
    wanted = {f"K{number}": value for number, value in enumerate(values)}
    service = {"image": "none", "environment": {key: f"${{{key}}}" for key in wanted}}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "compose.json").write_text(json.dumps({"services": {"a": service}}), encoding="utf-8")
        (Path(folder) / ".env").write_bytes(dotenv.merge(b"", wanted))
        done = subprocess.run(
            [PLUGIN, "--file", "compose.json", "config", "--format", "json"],
            cwd=folder, env={}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)["services"]["a"]["environment"]
    # Compose doubles each $ in its output.
    assert {key: value.replace("$$", "$") for key, value in read.items()} == wanted
