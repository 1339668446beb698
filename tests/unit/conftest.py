"""How Hypothesis looks for examples here, and a docker command that says what a test wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A machine that stands still for a moment says nothing about the code.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[str]]]:
    """A `docker` on PATH that says what the test tells it; what it gives back lists the calls."""

    def says(out: str = "", err: str = "", code: int = 0, sleep: float = 0) -> Callable[[], list[str]]:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        calls = folder / "calls"
        (folder / "out").write_text(out, encoding="utf-8")
        (folder / "err").write_text(err, encoding="utf-8")
        program = folder / "docker"
        program.write_text(
            f'#!/bin/sh\necho "$*" >> {calls}\nsleep {sleep}\ncat {folder}/out\ncat {folder}/err >&2\nexit {code}\n',
            encoding="utf-8",
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return lambda: calls.read_text(encoding="utf-8").splitlines()

    return says
