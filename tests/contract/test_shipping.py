"""What others build from the project: here, the execution environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.gpu_host import ROOT


def test_the_execution_environment_can_be_built_from_its_definition(tmp_path: Path) -> None:
    """As far as that goes without a registry: its build context, with what the playbooks need."""
    builder = Path(sys.executable).parent / "ansible-builder"
    definition = str(ROOT / "execution-environment.yml")
    words = ["create", "--file", definition, "--context", str(tmp_path), "--output-filename", "Containerfile"]
    subprocess.run([str(builder), *words], check=True, capture_output=True)
    text = (tmp_path / "Containerfile").read_text(encoding="utf-8")
    assert "FROM $EE_BASE_IMAGE" in text
    assert "ansible-core<2.20 ansible-runner" in text.replace('"', "").replace("'", "")
    assert "community.docker" in (tmp_path / "_build/requirements.yml").read_text(encoding="utf-8")
