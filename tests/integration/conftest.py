"""The simulated GPU host of the integration tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.gpu_host import DIRECTORY, GpuHost
from tests.gpu_host import started as start


@pytest.fixture(scope="session")
def started() -> Iterator[GpuHost]:
    with start("integration") as host:
        yield host


@pytest.fixture
def clean_host(started: GpuHost) -> GpuHost:
    """The host as before its first deployment."""
    started.cure()
    started.ssh.run(
        "docker rm -f vllm-server; docker volume ls -q | xargs -r docker volume rm; docker network prune -f; "
        f"rm -rf {DIRECTORY} /run/vllm_gpu.lock"
    )
    return started


@pytest.fixture
def served(started: GpuHost) -> GpuHost:
    """The host with a proven server on GPU 0, set up by the role's defaults."""
    started.restore()
    return started
