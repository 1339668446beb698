"""What scripts/rollout says before it has looked at any host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = "vllm_gpu:\n  hosts:\n    gpu01:\n      ansible_connection: local\n"


def rollout(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    (folder / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command: list[str | Path] = [ROOT / "scripts/rollout", "-i", "hosts.yml", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("words", [("--check",), ("-e", "gpu_device_id=1")])
def test_why_ansible_never_began_is_told(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Here the inventory is encrypted, and nobody gave the password."""
    (tmp_path / "group_vars").mkdir()
    secret, password = tmp_path / "group_vars/vllm_gpu.yml", tmp_path / "password"
    secret.write_text("vllm_gpu_api_key: sk-1\n", encoding="utf-8")
    password.write_text("a password\n", encoding="utf-8")
    vault = Path(sys.executable).parent / "ansible-vault"
    subprocess.run(
        [vault, "encrypt", "--vault-password-file", password, secret], check=True, capture_output=True
    )
    done = rollout(tmp_path, *words)
    assert done.returncode in (1, 3)
    assert "ansible-playbook ended before it had looked at any host:" in done.stderr
    assert "no vault secrets found" in done.stderr
    assert "\x1b" not in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-e", "vllm_gpu_api_key=sk-1"), "vllm_gpu_api_key looks like a secret"),
        (("-e", "gpu_device_id=1 ansible_become_password=x"), "ansible_become_password looks like a secret"),
        (("-e", "gpu_device_id"), "write KEY=VALUE, @FILE or a JSON object"),
        (("-e", "@nowhere.yml"), "there is no such file"),
        (("--limit", "gpu1"), "Did you mean gpu01?"),
        (("-i", "/proc/version"), "The inventory can't be read: "),
        (("--resume",), "There is no roll-out in rollouts to go on with"),
    ],
)
def test_wrong_usage_asks_nothing_of_any_host(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    done = rollout(tmp_path, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert not (tmp_path / "rollouts").exists()
