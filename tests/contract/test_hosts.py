"""A playbook without hosts fails, and names the group and the inventory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PLAYBOOKS = sorted((ROOT / "playbooks").glob("*.yml"))
EMPTY: object = {"all": {"children": {"vllm_gpu": {"hosts": {}}}}}
OTHER: object = {"web": {"hosts": {"web01": None}}}
HOSTS: object = {"vllm_gpu": {"hosts": {"gpu01": None, "gpu02": None}}, "web": {"hosts": {"web01": None}}}


def play(
    playbook: Path, inventory: object, folder: Path, *arguments: str, **exported: str
) -> tuple[int, str]:
    """Run a playbook on an inventory; return its exit code and its output."""
    (folder / "hosts.yml").write_text(yaml.safe_dump(inventory), encoding="utf-8")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("GPU_", "VLLM_", "HF_"))}
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible-playbook", "-i", folder / "hosts.yml", playbook, *arguments],
        cwd=ROOT, env={**clean, **exported}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize(
    "playbook", [*PLAYBOOKS, ROOT / "serve.yml"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_play_without_hosts_fails(playbook: Path, tmp_path: Path) -> None:
    code, output = play(playbook, OTHER, tmp_path, "-e", "vllm_gpu_hosts=web", "--list-hosts")
    assert code == 0, output
    assert "hosts (1): web01" in output
    code, output = play(playbook, OTHER, tmp_path)
    assert code != 0
    assert f"No host is in the group vllm_gpu of the inventory that was read ({tmp_path}/hosts.yml)" in output
    assert "Name the right inventory with -i" in output


@pytest.mark.parametrize(
    ("inventory", "arguments", "reason"),
    [
        (EMPTY, [], "No host is in the group vllm_gpu"),
        ({}, [], "No host is in the group vllm_gpu"),
        (HOSTS, ["--limit", "web"], "--limit web leaves no host of the group vllm_gpu"),
        (OTHER, ["--limit", "web"], "No host is in the group vllm_gpu"),
        (HOSTS, ["-e", "vllm_gpu_hosts=nobody"], "No host is in the group nobody"),
        (HOSTS, ["-e", "vllm_gpu_hosts=web", "--limit", "gpu01"], "--limit gpu01 leaves no host of the group web"),
    ],
    ids=["empty group", "empty inventory", "limit", "limit without group", "other group", "limit of other group"],
)  # fmt: skip
def test_no_host_matches(inventory: object, arguments: list[str], reason: str, tmp_path: Path) -> None:
    code, output = play(ROOT / "playbooks/verify.yml", inventory, tmp_path, *arguments)
    assert code != 0
    assert reason in output
    assert "hosts.yml" in output


@pytest.mark.parametrize(
    ("arguments", "hosts"),
    [
        ([], ["gpu01", "gpu02"]),
        (["--limit", "gpu02"], ["gpu02"]),
        (["--limit", "all:!gpu01"], ["gpu02"]),
        (["--limit", "@{folder}/retry"], ["gpu01"]),
    ],
)
def test_the_hosts_that_match(arguments: list[str], hosts: list[str], tmp_path: Path) -> None:
    (tmp_path / "retry").write_text("gpu01\n", encoding="utf-8")
    words = [word.format(folder=tmp_path) for word in arguments]
    code, output = play(ROOT / "playbooks/verify.yml", HOSTS, tmp_path, "--list-hosts", *words)
    assert code == 0, output
    assert sorted(output.partition(f"hosts ({len(hosts)}): ")[2].split()) == hosts
    assert "WARNING" not in output


def test_vllm_gpu_hosts_in_the_inventory_is_refused(tmp_path: Path) -> None:
    """Ansible reads a play's hosts before the variables of a host, which would have no effect."""
    inventory: object = {"vllm_gpu": {"hosts": {"gpu01": None}}, "all": {"vars": {"vllm_gpu_hosts": "web"}}}
    code, output = play(ROOT / "playbooks/verify.yml", inventory, tmp_path)
    assert code != 0
    assert "Give it with -e vllm_gpu_hosts=web, and remove it there." in output


def test_an_inventory_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    """Even where another one has hosts: a misspelt -i must not leave half of the fleet out."""
    code, output = play(ROOT / "playbooks/verify.yml", HOSTS, tmp_path, "-i", "nowhere.yml", "--list-hosts")
    assert code != 0
    assert "nowhere.yml" in output


def test_a_syntax_check_needs_no_inventory(tmp_path: Path) -> None:
    assert play(ROOT / "playbooks/rollout.yml", {}, tmp_path, "--syntax-check")[0] == 0


@pytest.mark.parametrize("name", ["GPU_DEVICE_ID", "VLLM_PORT", "HF_CACHE"])
def test_an_exported_setting_is_warned_about(name: str, tmp_path: Path) -> None:
    exported = {name: "1", "GPU_X": "1"}
    code, output = play(ROOT / "playbooks/serve.yml", HOSTS, tmp_path, "--list-hosts", **exported)
    assert code == 0
    assert f"{name} is exported here and has no effect" in output
    assert "GPU_X" not in output


@pytest.mark.parametrize(
    ("pattern", "code"), [("web", 0), ("vllm_gpu:&web", 4), ("gpu0*", 0), ("nobody", 4), ("all:!vllm_gpu", 0)]
)
def test_another_pattern(pattern: str, code: int, tmp_path: Path) -> None:
    own = [{"hosts": f"{{{{ lookup('mlops.vllm_gpu.serving_hosts', '{pattern}') }}}}", "gather_facts": False}]
    (tmp_path / "own.yml").write_text(yaml.safe_dump(own), encoding="utf-8")
    found, output = play(tmp_path / "own.yml", HOSTS, tmp_path, "--list-hosts")
    assert bool(found) == bool(code), output
    assert (f"No host is in the group {pattern}" in output) == bool(code)
