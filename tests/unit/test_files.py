"""Comparison of the installed files with the wanted ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.filter.passing_on import passing_on
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv, files, paths

from tests.wanted import COMPOSE, wanted


def test_changes_are_described_without_secrets() -> None:
    target = wanted(
        env={"GPU_DEVICE_ID": "1", "VLLM_PORT": "8000"},
        server_env={"HF_HUB_OFFLINE": 1, "SAME": "x"},
        secrets={"VLLM_API_KEY": "new-s3cr3t"},
        secret_env={"MINE": "mine-s3cr3t"},
    )
    before = b"GPU_DEVICE_ID=0\nVLLM_PORT=8000\nVLLM_API_KEY=old-s3cr3t\nSAME='x'\nGONE=gone-s3cr3t\nMINE=\n"
    change = files.FileChange("/opt/vllm-gpu/.env", before, b"GPU_DEVICE_ID=1\n", 0o600, differs=True)
    sentences = files.describe([change], target)
    assert sentences[:4] == [
        "GPU 0 → 1",
        "HF_HUB_OFFLINE (unset) → 1",
        "VLLM_API_KEY changes",
        "MINE changes",
    ]
    assert "GONE is removed" in sentences
    assert "s3cr3t" not in "".join(sentences)


def test_an_installation_of_the_earlier_project_keeps_its_volumes() -> None:
    assert files.env_keys(None, wanted()).get("VLLM_VOLUME_PREFIX") is None
    assert files.env_keys(b"COMPOSE_PROJECT_NAME=vllm\n", wanted())["VLLM_VOLUME_PREFIX"] == "vllm"
    moved = b"COMPOSE_PROJECT_NAME=vllm\nVLLM_VOLUME_PREFIX=mine\n"
    assert "VLLM_VOLUME_PREFIX" not in files.env_keys(moved, wanted())
    assert "VLLM_VOLUME_PREFIX" not in files.env_keys(b"COMPOSE_PROJECT_NAME=vllm-gpu\n", wanted())


def install(target: dict[str, Any]) -> None:
    """Write the files as the role does."""
    for change in files.compare(target):
        Path(change.path).write_bytes(change.after)
        Path(change.path).chmod(change.mode)
    assert [change.differs for change in files.compare(target)] == [False, False, False]


def test_variables_that_are_no_longer_set_leave_env_and_the_users_stay(tmp_path: Path) -> None:
    environment = {"server_env": {"A": "1"}, "secret_env": {"B": "2"}}
    install(wanted(project_dir=str(tmp_path), compose=passing_on(COMPOSE, ["A", "B"]), **environment))
    path = tmp_path / ".env"
    path.write_bytes(path.read_bytes() + b"MINE=3\nHF_TOKEN=hf-0123\n")
    (_compose, env, _referee) = files.compare(wanted(project_dir=str(tmp_path)))
    values = dotenv.values(env.after)
    assert {"A", "B"}.isdisjoint(values)
    assert (values["MINE"], values["HF_TOKEN"]) == ("3", "hf-0123")


@pytest.mark.parametrize(
    ("env", "note"),
    [
        (b"GPU_DEVICE_ID=0\nHF_TOKEN=x\nVLLM_API_KEY=x\nMINE=1\nVLLM_VOLUME_PREFIX=x\n", None),
        (b"HF_ENDPOINT=\n", None),
        (b"#HF_ENDPOINT=x\n", None),
        (b"HF_ENDPOINT=https://x\n", "HF_ENDPOINT in .env has no effect"),
        (b"HTTPS_PROXY=x\nno_proxy=y\nNCCL_D=z\n", "HTTPS_PROXY, no_proxy, NCCL_D in .env have no effect"),
        (b"CUDA_VISIBLE_DEVICES=$X\n", "CUDA_VISIBLE_DEVICES in .env has no effect"),
    ],
)
def test_settings_without_effect_are_noted(env: bytes, note: str | None) -> None:
    def changes(text: str) -> list[files.FileChange]:
        return [
            files.FileChange(f"/opt/x/{name}", content, content, 0o600, differs=False)
            for name, content in ((paths.COMPOSE_FILE, text.encode()), (paths.ENV_FILE, env))
        ]

    notes = list(files.without_effect(changes(COMPOSE)))
    assert [str(note) in found for found in notes] == [True] * bool(note)
    names = [line.partition("=")[0] for line in env.decode().splitlines()]
    assert list(files.without_effect(changes(passing_on(COMPOSE, names)))) == []


def test_a_file_with_another_mode_differs(tmp_path: Path) -> None:
    target = wanted(project_dir=str(tmp_path))
    assert [change.differs for change in files.compare(target)] == [True, True, True]
    install(target)
    (tmp_path / ".env").chmod(0o644)
    assert [change.differs for change in files.compare(target)] == [False, True, False]
