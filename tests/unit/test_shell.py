"""Commands, without a shell and not for ever."""

from __future__ import annotations

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import shell


def test_docker_is_the_hosts_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:2375")
    monkeypatch.setenv("DOCKER_CONTEXT", "elsewhere")
    said = shell.run(["sh", "-c", "echo $DOCKER_HOST $DOCKER_CONTEXT"]).out
    assert said == "unix:///var/run/docker.sock\n"


def test_a_command_that_does_not_exist_or_end() -> None:
    assert shell.run(["/no/such/program"]).code == 127
    assert shell.run(["sleep", "5"], timeout=0.2) == shell.Output(None, "", "no answer in 0.2 s")


def test_nothing_of_a_command_goes_through_a_shell() -> None:
    assert shell.run(["printf", "%s", "$HOME;id"]).out == "$HOME;id"
