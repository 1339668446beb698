"""The execution environment, and the Python of the modules that run on hosts."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.gpu_host import ROOT

ON_THE_HOSTS = sorted((ROOT / "plugins").glob("module*/*.py"))


def test_the_execution_environment_can_be_built_from_its_definition(tmp_path: Path) -> None:
    """Only its build context: there is no registry here."""
    builder = Path(sys.executable).parent / "ansible-builder"
    definition = str(ROOT / "execution-environment.yml")
    words = ["create", "--file", definition, "--context", str(tmp_path), "--output-filename", "Containerfile"]
    subprocess.run([str(builder), *words], check=True, capture_output=True)
    text = (tmp_path / "Containerfile").read_text(encoding="utf-8")
    assert "FROM $EE_BASE_IMAGE" in text
    assert "ansible-core<2.22 ansible-runner" in text.replace('"', "").replace("'", "")


@pytest.mark.parametrize("path", ON_THE_HOSTS, ids=lambda path: path.name)
def test_modules_only_need_python_3_8_and_its_standard_library(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    roots = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in (
            [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    assert roots <= sys.stdlib_module_names | {"ansible", "ansible_collections"}
    # Otherwise Python 3.8 would evaluate annotations that it doesn't know.
    assert any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body)


def test_the_workflow_runs_the_ansible_core_of_each_python() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    lines = (ROOT / "requirements/runtime.in").read_text(encoding="utf-8").splitlines()
    given = [Requirement(line) for line in lines if line.startswith("ansible-core")]
    runs = workflow["jobs"]["unit"]["strategy"]["matrix"]["include"]
    assert {run["ansible"] for run in runs} == {"2.19", "2.20", "2.21"}
    for run in runs:
        python = {"python_version": run["python"]}
        (locked,) = [line for line in given if line.marker and line.marker.evaluate(python)]
        assert locked.specifier.contains(f"{run['ansible']}.0") is not run.get("unlocked", False), run
