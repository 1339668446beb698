"""The simulated GPU host of the fault matrix, and the table of its results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.gpu_host import ROOT, GpuHost
from tests.gpu_host import started as start

TABLE = ROOT / ".cache/faults.md"
HEAD = "| fault | what the play reported | serves afterwards | files changed |\n|---|---|---|---|\n"
ROWS = pytest.StashKey[list[str]]()


def pytest_configure(config: Any) -> None:  # noqa: ANN401 - pytest's own class isn't public
    config.stash[ROWS] = []


@pytest.fixture(scope="session")
def started() -> Iterator[GpuHost]:
    with start("faults") as host:
        yield host


@pytest.fixture
def matrix(request: pytest.FixtureRequest) -> list[str]:
    return request.config.stash[ROWS]


def pytest_sessionfinish(session: Any) -> None:  # noqa: ANN401
    """Write the table of the run."""
    rows = session.config.stash[ROWS]
    if rows:
        TABLE.write_text(HEAD + "".join(rows), encoding="utf-8")
