"""FR-3: the command line beats `.env`, which beats the default.

Runs each `docker compose … up -d` of the pages with `config` instead of `up -d`, by the current and the
oldest supported Compose.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "deployment/CLAUDE.md", "env.example", "docker/docker-compose.serving.yml"]
COMPOSE = {
    "current": (f"DOCKER_CONFIG={ROOT}/.cache/docker docker compose", "docker compose"),
    "oldest": (str(ROOT / ".cache/compose-oldest/bin/docker-compose"), "docker compose"),
}


def documented() -> list[str]:
    """Return the commands of the pages that start the server without Ansible."""
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found |= set(re.findall(r"((?:GPU_DEVICE_ID=\S* )?docker compose -f docker/\S+ up -d)", text))
    return sorted(found)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """Copy the files that Compose reads."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker", symlinks=True)
    shutil.copy(ROOT / "env.example", tmp_path)
    return tmp_path


def config(command: str, compose: str, clone: Path) -> dict[str, Any]:
    """Return what Compose resolves, for a command as a reader types it in a shell."""
    binary, written = COMPOSE[compose]
    line = re.sub(r"up -d$", "config", command).replace(written, binary)
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone)}
    output = subprocess.check_output(["bash", "-c", line], cwd=clone, env=environment, timeout=60)
    return dict(yaml.safe_load(output))


def device_ids(command: str, compose: str, clone: Path) -> list[str]:
    service = config(command, compose, clone)["services"]["vllm"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert "count" not in device
    assert device["driver"] == "nvidia"
    return [str(gpu_id) for gpu_id in device["device_ids"]]


def test_the_pages_show_both_forms() -> None:
    commands = documented()
    assert any(command.startswith("GPU_DEVICE_ID=1 ") for command in commands)
    assert any(command.startswith("docker compose ") for command in commands)


@pytest.mark.parametrize("compose", COMPOSE)
@pytest.mark.parametrize(
    ("typed", "dotenv"), list(itertools.product([None, "", "0", "1"], [None, "no such key", "", "0", "1"]))
)
def test_command_line_over_dotenv_over_default(
    compose: str, typed: str | None, dotenv: str | None, clone: Path
) -> None:
    if dotenv == "no such key":
        (clone / ".env").write_text("VLLM_PORT=8000\n", encoding="utf-8")
    elif dotenv is not None:
        text = (clone / "env.example").read_text(encoding="utf-8")
        text = re.sub(r"^GPU_DEVICE_ID=.*$", f"GPU_DEVICE_ID={dotenv}", text, flags=re.MULTILINE)
        (clone / ".env").write_text(text, encoding="utf-8")
    in_file = dotenv if dotenv in ("0", "1") else ""
    # An empty value on the command line also beats .env, and means the default.
    expected = (in_file if typed is None else typed) or "0"
    prefixed = typed is not None
    commands = [command for command in documented() if command.startswith("GPU_DEVICE_ID=") == prefixed]
    assert commands
    for command in commands:
        line = re.sub(r"^GPU_DEVICE_ID=\S*", f"GPU_DEVICE_ID={typed}", command)
        assert device_ids(line, compose, clone) == [expected]


@pytest.mark.parametrize("compose", COMPOSE)
def test_env_example_has_the_defaults(compose: str, clone: Path) -> None:
    command = "docker compose -p vllm -f docker/docker-compose.serving.yml config"
    defaults = config(command, compose, clone)
    shutil.copy(clone / "env.example", clone / ".env")
    assert config(command, compose, clone) == defaults
