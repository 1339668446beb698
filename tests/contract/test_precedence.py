"""FR-3: command line over `.env` over the default, with the documented commands.

Every `docker compose … up -d` that a page shows is run as written, with
`config` in place of `up -d`, by the current and by the oldest supported Compose.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    "README.md",
    "deployment/CLAUDE.md",
    "env.example",
    "docker/docker-compose.serving.yml",
]
COMPOSE = {
    "current": (f"DOCKER_CONFIG={ROOT}/.cache/docker docker compose", "docker compose"),
    "oldest": (str(ROOT / ".cache/compose-oldest/bin/docker-compose"), "docker compose"),
}


def documented() -> list[str]:
    """Every command of the pages that starts the server by hand from the root."""
    found = set()
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found |= set(re.findall(r"((?:GPU_DEVICE_ID=\S* )?docker compose -f docker/\S+ up -d)", text))
    return sorted(found)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone's files as far as Compose looks at them."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker", symlinks=True)
    shutil.copy(ROOT / "env.example", tmp_path)
    return tmp_path


def device_ids(command: str, compose: str, clone: Path) -> list[str]:
    binary, written = COMPOSE[compose]
    line = re.sub(r"up -d$", "config", command).replace(written, binary)
    environment = {"PATH": os.environ["PATH"], "HOME": str(clone)}
    # The page's own line, in a shell, as the reader will type it.
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    service = yaml.safe_load(done.stdout)["services"]["vllm"]
    devices = service["deploy"]["resources"]["reservations"]["devices"]
    assert len(devices) == 1
    assert "count" not in devices[0]
    assert devices[0]["driver"] == "nvidia"
    return [str(one) for one in devices[0]["device_ids"]]


def test_the_pages_show_both_ways() -> None:
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
        (clone / ".env").write_text(
            re.sub(r"^GPU_DEVICE_ID=.*$", f"GPU_DEVICE_ID={dotenv}", text, flags=re.MULTILINE),
            encoding="utf-8",
        )
    in_file = dotenv if dotenv in ("0", "1") else ""
    # A value typed as empty is still typed: it hides .env and means the default.
    expected = (in_file if typed is None else typed) or "0"
    prefixed = typed is not None
    commands = [one for one in documented() if one.startswith("GPU_DEVICE_ID=") == prefixed]
    assert commands
    for command in commands:
        line = re.sub(r"^GPU_DEVICE_ID=\S*", f"GPU_DEVICE_ID={typed}", command)
        assert device_ids(line, compose, clone) == [expected]


@pytest.mark.parametrize("compose", COMPOSE)
def test_env_example_as_it_is_changes_nothing_against_the_defaults(compose: str, clone: Path) -> None:
    binary = COMPOSE[compose][0]

    def resolved() -> dict[str, object]:
        line = f"{binary} -p vllm -f docker/docker-compose.serving.yml config"
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=clone,
            env={"PATH": os.environ["PATH"], "HOME": str(clone)},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return dict(yaml.safe_load(done.stdout))

    defaults = resolved()
    shutil.copy(clone / "env.example", clone / ".env")
    assert resolved() == defaults
