"""The profile of Hypothesis, a fake docker command, and scripts/rollout."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import HealthCheck, settings

# A busy machine must not fail a test.
settings.register_profile("noisy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("noisy")


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Callable[[], list[str]]]:
    """Put a fake `docker` on PATH; it returns a function that lists the calls."""

    def fake(out: str = "", err: str = "", code: int = 0, sleep: float = 0) -> Callable[[], list[str]]:
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

    return fake


ROOT = Path(__file__).resolve().parents[2]


class Script:
    """scripts/rollout within this process, which saves a second each time: its exit code and what it prints."""

    def __init__(
        self, module: ModuleType, patch: pytest.MonkeyPatch, output: pytest.CaptureFixture[str]
    ) -> None:
        self.module, self._patch, self._output = module, patch, output

    def __call__(self, *words: str) -> tuple[int, str, str]:
        self._patch.setattr(sys, "argv", ["rollout", *words])
        return (self.module.main(), *self._output.readouterr())


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Script:
    """Start in a folder of its own."""
    for name in ("ANSIBLE_CONFIG", "ANSIBLE_HOST_PATTERN_MISMATCH"):
        monkeypatch.setenv(name, str(ROOT / "ansible.cfg"))  # so that they are as before in the end
    monkeypatch.setattr(sys, "path", list(sys.path))
    loader = importlib.machinery.SourceFileLoader("rollout_script", str(ROOT / "scripts/rollout"))
    spec = importlib.util.spec_from_loader("rollout_script", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    monkeypatch.setattr(module, "STOPS", ())
    # Another test may have loaded Ansible before the script set the variable of that name.
    monkeypatch.setattr(module.constants, "HOST_PATTERN_MISMATCH", "ignore")
    monkeypatch.chdir(tmp_path)
    return Script(module, monkeypatch, capsys)
