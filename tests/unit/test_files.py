"""The service's files as they are and as they should be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv, files, paths

from tests.wanted import COMPOSE, wanted


def test_changes_are_told_without_secrets() -> None:
    one = wanted(
        env={"GPU_DEVICE_ID": "1", "VLLM_PORT": "8000"},
        server_env={"HF_HUB_OFFLINE": 1, "SAME": "x"},
        secrets={"VLLM_API_KEY": "new-s3cr3t"},
        secret_env={"MINE": "mine-s3cr3t"},
    )
    before = b"GPU_DEVICE_ID=0\nVLLM_PORT=8000\nVLLM_API_KEY=old-s3cr3t\nSAME='x'\nGONE=gone-s3cr3t\nMINE=\n"
    change = files.FileChange("/opt/vllm-gpu/.env", before, b"GPU_DEVICE_ID=1\n", 0o600, differs=True)
    told = files.describe([change], one)
    assert told[:4] == ["GPU 0 → 1", "HF_HUB_OFFLINE (unset) → 1", "VLLM_API_KEY changes", "MINE changes"]
    assert "GONE is removed" in told
    assert "s3cr3t" not in "".join(told)


def test_an_installation_of_the_earlier_project_keeps_its_volumes() -> None:
    assert files.env_keys(None, wanted()).get("VLLM_VOLUME_PREFIX") is None
    assert files.env_keys(b"COMPOSE_PROJECT_NAME=vllm\n", wanted())["VLLM_VOLUME_PREFIX"] == "vllm"
    moved = b"COMPOSE_PROJECT_NAME=vllm\nVLLM_VOLUME_PREFIX=mine\n"
    assert "VLLM_VOLUME_PREFIX" not in files.env_keys(moved, wanted())
    assert "VLLM_VOLUME_PREFIX" not in files.env_keys(b"COMPOSE_PROJECT_NAME=vllm-gpu\n", wanted())


def installed(folder: Path, one: dict[str, Any]) -> None:
    """Write the files as the role does."""
    for change in files.compare(one):
        Path(change.path).write_bytes(change.after)
        Path(change.path).chmod(change.mode)
    assert [change.differs for change in files.compare(one)] == [False, False, False]
    assert folder.is_dir()


def test_what_the_server_is_no_longer_given_leaves_env_and_what_was_the_users_stays(tmp_path: Path) -> None:
    given = COMPOSE.replace("    environment:\n", "    environment:\n      A:\n      B:\n")
    installed(
        tmp_path,
        wanted(project_dir=str(tmp_path), compose=given, server_env={"A": "1"}, secret_env={"B": "2"}),
    )
    path = tmp_path / ".env"
    path.write_bytes(path.read_bytes() + b"MINE=3\nHF_TOKEN=hf-0123\n")
    (_compose, env, _referee) = files.compare(wanted(project_dir=str(tmp_path)))
    values = dotenv.values(env.after)
    assert {"A", "B"}.isdisjoint(values)
    assert (values["MINE"], values["HF_TOKEN"]) == ("3", "hf-0123")


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (b"GPU_DEVICE_ID=0\nHF_TOKEN=x\nVLLM_API_KEY=x\nMINE=1\nVLLM_VOLUME_PREFIX=x\n", None),
        (b"HF_ENDPOINT=\n", None),
        (b"#HF_ENDPOINT=x\n", None),
        (b"HF_ENDPOINT=https://x\n", "HF_ENDPOINT in .env has no effect"),
        (
            b"HTTPS_PROXY=x\nno_proxy=y\nNCCL_DEBUG=z\n",
            "HTTPS_PROXY, no_proxy, NCCL_DEBUG in .env have no effect",
        ),
        (b"CUDA_VISIBLE_DEVICES=$X\n", "CUDA_VISIBLE_DEVICES in .env has no effect"),
    ],
)
def test_settings_that_reach_nobody_are_told(env: bytes, told: str | None) -> None:
    def changes(text: str) -> list[files.FileChange]:
        return [
            files.FileChange(f"/opt/x/{name}", content, content, 0o600, differs=False)
            for name, content in ((paths.COMPOSE_FILE, text.encode()), (paths.ENV_FILE, env))
        ]

    notes = list(files.without_effect(changes(COMPOSE)))
    assert [str(told) in note for note in notes] == [True] * bool(told)
    passes = "".join(f"      {line.partition('=')[0]}:\n" for line in env.decode().splitlines())
    passing = COMPOSE.replace("    environment:\n", f"    environment:\n{passes}")
    assert list(files.without_effect(changes(passing))) == []


def test_a_file_with_another_mode_differs(tmp_path: Path) -> None:
    one = wanted(project_dir=str(tmp_path))
    assert [change.differs for change in files.compare(one)] == [True, True, True]
    installed(tmp_path, one)
    (tmp_path / ".env").chmod(0o644)
    assert [change.differs for change in files.compare(one)] == [False, True, False]
