"""Installed as a collection, from an empty directory, with nothing of the clone in sight."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.gpu_host import ROOT, GpuHost

BIN = Path(sys.executable).parent


def test_serve_from_the_installed_collection(clean_host: GpuHost, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {
        key: value
        for key, value in clean_host.environment.items()
        if key not in ("ANSIBLE_CONFIG", "ANSIBLE_INVENTORY", "ANSIBLE_COLLECTIONS_PATH")
    }
    environment["ANSIBLE_COLLECTIONS_PATH"] = str(tmp_path / "collections")

    def run(program: str | Path, *words: object) -> str:
        done = subprocess.run(
            [BIN / program, *map(str, words)],
            cwd=empty,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("ansible-galaxy", "collection", "build", ROOT, "--output-path", tmp_path)
    (built,) = tmp_path.glob("mlops-vllm_gpu-*.tar.gz")
    run("ansible-galaxy", "collection", "install", built, "--offline", "-p", tmp_path / "collections")
    # Another group than vllm_gpu, in every verb.
    hosts = tmp_path / "hosts.yml"
    hosts.write_text(
        clean_host.inventory.read_text(encoding="utf-8").replace("vllm_gpu:", "fleet:", 1), "utf-8"
    )

    def play(verb: str, *words: str) -> str:
        words = ("-i", str(hosts), f"mlops.vllm_gpu.{verb}", "-e", "vllm_gpu_hosts=fleet", *words)
        return " ".join(run("ansible-playbook", *words).split())

    assert "on no other" in play("serve", "-e", "gpu_device_id=1")
    assert clean_host.served_gpu() == "1"
    assert "changed=0" in play("serve", "-e", "gpu_device_id=1")
    play("verify")

    # It finds itself, wherever it was installed.
    root = tmp_path / "collections/ansible_collections/mlops/vllm_gpu"
    del environment["ANSIBLE_COLLECTIONS_PATH"]
    request = ("-e", "gpu_device_id=0", "-e", "vllm_gpu_hosts=fleet")
    said = run(root / "scripts/rollout", "-i", hosts, *request)
    assert "1 changed, 0 already right" in " ".join(said.split())
    assert clean_host.served_gpu() == "0"
    assert json.loads((empty / "rollouts/latest/report.json").read_text("utf-8"))["waves"][0]["hosts"]
    environment["ANSIBLE_COLLECTIONS_PATH"] = str(tmp_path / "collections")
    assert "changed=0" in play("rollout", "-e", "gpu_device_id=0")

    # What it holds is what it is made of, and documented.
    assert sorted(path.name for path in root.iterdir() if path.is_dir()) == [
        "changelogs", "deployment", "docker", "docs", "meta", "playbooks", "plugins", "roles", "scripts", "tests"
    ]  # fmt: skip
    assert [path.name for path in (root / "tests").iterdir()] == ["sanity"]
    assert not list(root.rglob(".*"))
    for module in (root / "plugins/modules").glob("*.py"):
        shown = json.loads(run("ansible-doc", "--json", f"mlops.vllm_gpu.{module.stem}"))
        assert shown[f"mlops.vllm_gpu.{module.stem}"]["doc"]["short_description"]
    role = json.loads(run("ansible-doc", "--type", "role", "--json", "mlops.vllm_gpu.vllm_gpu"))
    assert "gpu_device_id" in role["mlops.vllm_gpu.vllm_gpu"]["entry_points"]["main"]["options"]
