"""More than one controller: the same playbook through ansible-runner's transmit, worker and process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.fleet.conftest import Fleet
from tests.gpu_host import ROOT


def test_transmit_worker_process(fleet: Fleet, tmp_path: Path) -> None:
    """The worker gets only what is transmitted, and the sender gets the result."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    job = tmp_path / "job"
    for name in filter(None, subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")):
        target = job / "project" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target, follow_symlinks=False)
    (job / "inventory").mkdir()
    shutil.copy(fleet.inventory(), job / "inventory/hosts.yml")
    (job / "env").mkdir()
    (job / "env/extravars").write_text(json.dumps({"gpu_device_id": 1, "vllm_gpu_waves": [1, "100%"]}))
    (job / "env/settings").write_text(json.dumps({"suppress_env_files": True}))

    runner = Path(sys.executable).parent / "ansible-runner"
    (tmp_path / "empty").mkdir()
    sent = subprocess.run(
        [runner, "transmit", job, "-p", "playbooks/rollout.yml"], capture_output=True, check=True
    )
    worked = subprocess.run(
        [runner, "worker"], cwd=tmp_path / "empty", input=sent.stdout, capture_output=True, check=False,
        env=fleet.environment, timeout=300,
    )  # fmt: skip
    subprocess.run(
        [runner, "process", tmp_path / "result"], input=worked.stdout, capture_output=True, check=True
    )

    (artifacts,) = {path.parent for path in (tmp_path / "result").rglob("status")}
    assert (artifacts / "status").read_text() == "successful", (artifacts / "stdout").read_text()
    assert (artifacts / "rc").read_text() == "0"
    events = [json.loads(path.read_text()) for path in (artifacts / "job_events").glob("*.json")]
    waves = [event for event in events if event["event"] == "playbook_on_play_start"]
    assert len(waves) == 3  # the plan, the canary, the rest
    assert fleet.serving() == "11111"
