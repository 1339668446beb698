"""What scripts/rollout accepts on the command line, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fleet import request
from fleet.request import Usage
from fleet.text import without


def parse(*words: str) -> dict[str, Any]:
    values, _files = request.variables(list(words))
    request.check_values(values)
    return values


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["gpu_device_id=1 vllm_gpu_port=8001"], {"gpu_device_id": "1", "vllm_gpu_port": "8001"}),
        (["vllm_gpu_extra_args='--a=1 --b=2'"], {"vllm_gpu_extra_args": "--a=1 --b=2"}),
        (['{"gpu_device_id": 1}', "gpu_device_id=2"], {"gpu_device_id": "2"}),
    ],
)
def test_variables_are_parsed_as_by_ansible(words: list[str], values: dict[str, Any]) -> None:
    assert parse(*words) == values


@pytest.mark.parametrize(
    "values",
    [
        {"vllm_gpu_env": {"TOKENIZERS_PARALLELISM": "false", "VLLM_MAX_TOKENS_PER_CHUNK": "1"}},
        {"vllm_gpu_extra_args": ["--max-num-batched-tokens", "4096", "--tokenizer", "acme/x"]},
        {"vllm_gpu_extra_args": "--max-num-batched-tokens 4096 --tokenizer-mode auto --trust-remote-code"},
        {"vllm_gpu_model": "acme/my-secret-model"},
        {"vllm_gpu_image": "registry.example.com:5000/vllm/vllm-openai:v0.11.0@sha256:0123abcd"},
        {"vllm_gpu_env": {"HTTPS_PROXY": "http://proxy.example.com:3128", "HF_ENDPOINT": "https://a.b/c@d"}},
        {"vllm_gpu_waves": [1, "10%", "100%"]},
        {"vllm_gpu_extra_args": "--chat-template 'a\tb\nc'"},
        {"vllm_gpu_extra_args": ["--ssl-keyfile", "/run/tls.pem", "--seed", "3"]},
        {"vllm_gpu_extra_args": '["--tokenizer", "acme/x"]', "vllm_gpu_model": "{{ model }}"},
        {"vllm_gpu_image": "registry.example.com/acme/vllm-auth:v1"},
        {"x": [{"name": "HF_ENDPOINT", "value": "a.example.com"}, {"name": "MAX_TOKENS", "value": "1"}]},
    ],
)
def test_values_without_a_secret(values: dict[str, Any]) -> None:
    assert parse(json.dumps(values)) == values


KEY = "sk-planted-71c2d9"


@pytest.mark.parametrize(
    "word",
    [
        f"vllm_gpu_api_key={KEY}",
        f"gpu_device_id=1 ansible_become_pass={KEY}",
        f"vault_vllm_gpu_hf_token={KEY}",
        json.dumps({"vllm_gpu_secret_env": {"ANYTHING": KEY}}),
        json.dumps({"vllm_gpu_env": {"X_TOKEN": KEY}}),
        json.dumps({"x": [{"y": [{"api_key": KEY}]}]}),
        json.dumps({"x": {"hfToken": KEY, "n": 1}}),
        json.dumps({"x": {"aws_secret_access_key": [KEY]}}),
        json.dumps({"x": {"Authorization": f"Bearer {KEY}"}}),
        json.dumps({"x": [f"--api-key={KEY}"]}),
        f"vllm_gpu_extra_args='--seed 3 --api-key {KEY}'",
        f"vllm_gpu_extra_args='--hf-token {KEY}'",
        f'x=\'{{"password": "{KEY}"}}\'',
        f"x=HF_TOKEN={KEY}",
        f"x=https://user:{KEY}@example.com/v1",
        f"x=https://{KEY}@example.com/v1",
        json.dumps({"vllm_gpu_env": {"HTTPS_PROXY": f"user:{KEY}@proxy.example.com:3128"}}),
        json.dumps({"vllm_gpu_extra_args": ["--ssl-keyfile-password", KEY]}),
        json.dumps({"vllm_gpu_extra_args": ["--seed", 3, "--api-key", KEY]}),
        json.dumps({"vllm_gpu_extra_args": ["--hf-token", [KEY]]}),
        json.dumps({"vllm_gpu_extra_args": ["--seed 3 --license-key", KEY]}),
        json.dumps({"vllm_gpu_extra_args": ["--basic-auth", 12345678]}),
        json.dumps({"vllm_gpu_extra_args": json.dumps(["--api-key", KEY])}),
        json.dumps({"x": [{"name": "HF_TOKEN", "value": KEY}]}),
        json.dumps({"x": {"Key": "S3_KEY", "Value": KEY}}),
        json.dumps({"x": json.dumps([{"name": "HF_TOKEN", "value": KEY}])}),
        json.dumps({"vllm_gpu_env": {"S3_KEY": KEY}}),
        json.dumps({"vllm_gpu_env": {"LICENSE_KEY": KEY}}),
        json.dumps({"vllm_gpu_env": {"BASIC_AUTH": KEY}}),
        json.dumps({"x": {f"--api-key={KEY}": 1}}),
        f"x=S3_KEY={KEY}",
        f'x="Authorization: Bearer {KEY}"',
        # Where it is refused for another reason.
        f"LICENSE_KEY {KEY}",
        f'{{"S3_KEY": "{KEY}"',
        f"vllm_gpu_api_key {KEY}",
        f'vllm_gpu_api_key="{KEY}',
        f'{{"vllm_gpu_api_key": "{KEY}"',
        f"--api_key:{KEY}=1",
    ],
)
def test_secrets_are_refused_at_any_depth_and_not_repeated(word: str) -> None:
    with pytest.raises(Usage) as refused:
        parse(word)
    assert KEY not in str(refused.value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("a=1 --b=1", "--b cannot be the name of a variable"),
        ("=1", "cannot be the name of a variable"),
        ("a.b=1", "a.b cannot be the name of a variable"),
        ("class=1", "class cannot be the name of a variable"),
        ("größe=1", "größe cannot be the name of a variable"),
        ('{"a b": 1}', "a b cannot be the name of a variable"),
        ("", "write KEY=VALUE, @FILE or a JSON object"),
        ("vllm_gpu_extra_args=--a --b 1", "write KEY=VALUE, @FILE or a JSON object"),
        ("[1, 2]", "write KEY=VALUE, @FILE or a JSON object"),
        ("a='b", "No closing quotation"),
        ("{a: 1}", "this is not a JSON object"),
        ('{"a": NaN}', "this is not a JSON object"),
        ('{"a": 1e999}', "this is not a JSON object"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than"),
        ('{"a": ' + "[" * 100_000, "this is not a JSON object"),
        ("a=\x1b]0;x\x07", "control characters"),
        (r'{"a": ["\ud800"]}', "control characters"),
        ('{"vllm_gpu_waves": [0]}', "-e vllm_gpu_waves: the sizes of waves"),
        ("vllm_gpu_waves=1,2", "-e vllm_gpu_waves: the sizes of waves"),
    ],
)
def test_malformed_variables_are_refused(word: str, message: str) -> None:
    with pytest.raises(Usage) as refused:
        parse(word)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("words", "sizes"),
    [(["1", "10%", "100%"], [1, "10%", "100%"]), ([1, "1%"], [1, "1%"]), (["999999"], [999999])],
)
def test_sizes_of_waves(words: list[object], sizes: list[object]) -> None:
    assert request.wave_sizes("--wave", words) == sizes


@pytest.mark.parametrize(
    "sizes",
    ["1,2", 1, [], None, {"1": 2}, True]
    + [[1, size, "100%"] for size in (
        "0", "-1", "+1", "01", "", " ", "ten", "1.5", "0%", "00%", "150%", "101%", "-5%", "%", "10 %", "1.5%", "1%%",
        "²", "٣", "1\n", "1" * 5000, True, None, 1.0, [1], {"1": 1},
    )],
)  # fmt: skip
def test_wrong_sizes_of_waves(sizes: object) -> None:
    with pytest.raises(Usage, match=r"^--wave: the sizes of waves are a list of whole numbers from 1 "):
        request.wave_sizes("--wave", sizes)


def test_secrets_in_files_are_known(tmp_path: Path) -> None:
    plain, vault = tmp_path / "plain.yml", tmp_path / "vault.yml"
    plain.write_text(
        "vllm_gpu_api_key: sk-1\nvllm_gpu_secret_env: {A: b1, N: [2]}\ngpu_device_id: 7\n"
        "ansible_become_password: !vault |\n  $ANSIBLE_VAULT;1.1;AES256\n  3132\n",
        encoding="utf-8",
    )
    vault.write_text("$ANSIBLE_VAULT;1.1;AES256\n3132\n", encoding="utf-8")
    assert request.check_files([str(plain), str(vault)]) == ["sk-1", "b1", "2"]


@pytest.mark.parametrize(
    ("line", "secret"),
    [
        ("vllm_gpu_extra_args: ['--seed', '3', '--api-key', 'sk-aaaa']", "sk-aaaa"),
        ("vllm_gpu_extra_args: --seed 3 --api-key sk-aaaa --enforce-eager", "sk-aaaa"),
        ("vllm_gpu_extra_args: --api-key=sk-aaaa", "sk-aaaa"),
        ("vllm_gpu_extra_args: --api-key 'sk aaaa' --seed 3", "sk aaaa"),
        ('vllm_gpu_extra_args: \'["--api-key", "sk-aaaa"]\'', "sk-aaaa"),
        ('x: \'{"password": "sk-aaaa"}\'', "sk-aaaa"),
        ("x: 'Authorization: Bearer sk-aaaa'", "sk-aaaa"),
        ("x: [{name: HF_TOKEN, value: hf_aaaa}]", "hf_aaaa"),
        ("vllm_gpu_api_key: 12345678.5", "12345678.5"),
        ("vllm_gpu_api_key: 2024-12-31", "2024-12-31"),
        ("vllm_gpu_env: {S3_KEY: abcdef}", "abcdef"),
        ("vllm_gpu_env: {BASIC_AUTH: 12345678}", "12345678"),
        ("vllm_gpu_env: {HTTPS_PROXY: 'http://me:p%40ssw@proxy:3128'}", "p@ssw"),
    ],
)
def test_secrets_in_files_are_hidden(tmp_path: Path, line: str, secret: str) -> None:
    path = tmp_path / "vars.yml"
    path.write_text(f"{line}\ngpu_device_id: 7\nx_auth: true\ny_key: null\n", encoding="utf-8")
    found = request.check_files([str(path)])
    assert without(found, f"GPU 7 <{secret}> --seed 3 true") == "GPU 7 <(hidden)> --seed 3 true"


@pytest.mark.parametrize(
    ("content", "message"),
    [(content, "") for content in (b"", b"- a\n", b"api_key: [sk-1\n", b"\xff\xfe\x00", b"text")]
    # The hosts are read before Ansible reads the file.
    + [(b"vllm_gpu_hosts: web\n", "-e vllm_gpu_hosts=PATTERN")],
    ids=repr,
)
def test_files_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, message: str
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(Usage) as refused:
        request.check_files([str(path)])
    assert str(path) in str(refused.value)
    assert message in str(refused.value)
    assert "sk-1" not in str(refused.value) + capsys.readouterr().err


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    for path in ("", "x" * 5000, "\0", "/dev/null/x", str(tmp_path)):
        assert not request.is_file(path)


GOOD = {
    "schema": 1, "id": "x", "hosts": [{"name": "a", "outcome": "failed"}, {"name": "b", "outcome": "changed"}],
    "left_over": ["c"], "request": {}, "files": [], "inventory": "'the hosts.yml'", "wave": None,
}  # fmt: skip


def last(folder: Path, content: str) -> request.Last:
    (folder / "latest").mkdir()
    (folder / "latest/report.json").write_text(content, encoding="utf-8")
    return request.last(folder)


def test_what_the_last_rollout_has_left(tmp_path: Path) -> None:
    found = last(tmp_path, json.dumps(GOOD))
    assert (found.left, found.inventory) == (["a", "c"], ["the hosts.yml"])


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "{}", "[" * 100_000]
    + [json.dumps({**GOOD, key: value}) for key, value in (
        ("schema", 2), ("schema", None), ("hosts", None), ("hosts", ["a"]), ("hosts", [{"name": "a"}]), ("request", [1]),
        ("files", 1), ("inventory", "'"), ("wave", [1]), ("left_over", None),
    )],
)  # fmt: skip
def test_a_damaged_report_is_not_resumed(tmp_path: Path, content: str) -> None:
    with pytest.raises(Usage, match="cannot be read as the report of a rollout"):
        last(tmp_path, content)
