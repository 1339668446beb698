"""Rollouts over a fleet, good and bad: the outcome of each host."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from tests.fleet.conftest import NAMES, Ended, Fleet, interrupt, kill
from tests.gpu_host import ROOT, gpuhost

BIN = Path(sys.executable).parent
BAD = {"vllm_gpu_model": "acme/does-not-exist"}
ONE_BY_ONE = ("--wave", "1,1,1,100%")


def outcomes(*of: str) -> dict[str, str]:
    return dict(zip(NAMES, of, strict=True))


def all_hosts(outcome: str) -> dict[str, str]:
    return dict.fromkeys(NAMES, outcome)


def test_success_and_a_second_run_that_changes_nothing(fleet: Fleet) -> None:
    done = fleet.rollout("--wave", "1,2,100%")
    assert (done.code, done.report["outcome"]) == (0, "done")
    assert done.outcomes == all_hosts("changed")
    assert [wave["hosts"] for wave in done.report["waves"]] == [NAMES[:1], NAMES[1:3], NAMES[3:]]
    assert fleet.serving() == "11111"
    for host in done.report["hosts"]:
        assert (host["before"]["index"], host["after"]["index"], host["verdict"]) == (0, 1, "ok")
        assert 0 < host["downtime_s"] < host["seconds"]
    assert [event["name"] for event in done.events if event["event"] == "host"] == NAMES
    assert done.events[-1]["outcome"] == "done"

    before = fleet.containers()
    again = fleet.rollout()
    assert (again.code, again.outcomes) == (0, all_hosts("already_right"))
    assert fleet.containers() == before


def test_a_terminal_shows_it_live(fleet: Fleet) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 80))
    words: list[str | Path] = [
        ROOT / "scripts/rollout", "-i", fleet.inventory(), "-e", "gpu_device_id=1", "--limit", "fleet1,fleet2",
        "--reports", fleet.folder / "rollouts",
    ]  # fmt: skip
    environment = {**fleet.environment, "TERM": "xterm-256color"}
    shown = b""
    with subprocess.Popen(words, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # its other end was closed
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert process.returncode == 0, text
    for words_seen in (
        "Checking every host before changing the first: 0 of 2", "fleet1 GPU 0 → GPU 1 deploy", "1 of 2 hosts",
        "✔ fleet2: GPU 0 → GPU 1, changed after", "All 2 hosts are proven: 2 changed, 0 already right.",
    ):  # fmt: skip
        assert words_seen in text
    assert max(map(len, re.split(r"[\r\n]+", text.partition("Report:")[0]))) <= 80


def test_check_changes_nothing(fleet: Fleet) -> None:
    before = fleet.containers()
    inventory = fleet.inventory(
        fleet2={"gpu_device_id": 0}, fleet3={"gpu_device_id": 7}, fleet4={"gpu_device_id": 1}
    )
    plan = fleet.rollout("--check", gpu=None, inventory=inventory)
    assert plan.code == 3
    (event,) = [event for event in plan.events if event["event"] == "check"]
    assert (event["to_change"], event["already_right"]) == (["fleet4"], 3)
    assert list(event["refused"]) == ["fleet3"]
    assert "gpu_device_id is 7, but this host has no such GPU" in event["refused"]["fleet3"]
    assert fleet.containers() == before
    assert plan.report == {}


def test_the_canary_fails(fleet: Fleet) -> None:
    before = fleet.containers()[1:]
    done = fleet.rollout(inventory=fleet.inventory(fleet1=BAD))
    assert (done.code, done.report["outcome"]) == (1, "failed")
    assert done.outcomes == outcomes("rolled_back", *["untouched"] * 4)
    assert "acme/does-not-exist is not a local folder" in done.report["hosts"][0]["error"]
    assert "Stopped at the canary: fleet1" in done.report["message"]
    assert fleet.serving() == "00000"
    assert fleet.containers()[1:] == before


def test_a_host_fails_in_the_third_wave_and_the_rest_is_resumed(fleet: Fleet) -> None:
    before = fleet.containers()[3:]
    done = fleet.rollout(*ONE_BY_ONE, inventory=fleet.inventory(fleet3=BAD))
    assert done.code == 1
    assert done.outcomes == outcomes("changed", "changed", "rolled_back", "untouched", "untouched")
    assert fleet.serving() == "11000"
    assert fleet.containers()[3:] == before

    fleet.inventory()  # with the right model
    rest = fleet.rollout("--resume", gpu=None)
    assert (rest.code, list(rest.outcomes)) == (0, NAMES[2:])
    assert set(rest.outcomes.values()) == {"changed"}
    assert fleet.serving() == "11111"
    assert fleet.rollout("--resume", gpu=None).code == 2


def test_part_of_a_wave_fails(fleet: Fleet) -> None:
    """The rest of the wave is finished, and no further wave starts; also with the plain playbook."""
    inventory = fleet.inventory(fleet2=BAD)
    done = fleet.rollout("--wave", "1,2,2", inventory=inventory)
    assert done.code == 1
    assert done.outcomes == outcomes("changed", "rolled_back", "changed", "untouched", "untouched")
    assert fleet.serving() == "10100"
    play = subprocess.run(
        [BIN / "ansible-playbook", "-i", inventory, "playbooks/rollout.yml",
         "-e", '{"gpu_device_id": 1, "vllm_gpu_waves": [2, 1]}'],
        cwd=ROOT, env=fleet.environment, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert play.returncode == 2, play.stdout
    assert fleet.serving() == "10110"


def test_unreachable_from_the_start(fleet: Fleet) -> None:
    before = fleet.containers()
    done = fleet.rollout(inventory=fleet.inventory(fleet5={"ansible_port": 1}))
    assert (done.code, done.report["outcome"]) == (3, "refused")
    assert done.outcomes == outcomes(*["untouched"] * 4, "unreachable")
    assert "cannot be reached" in done.report["hosts"][4]["error"]
    assert fleet.containers() == before


def test_unreachable_during_a_wave(fleet: Fleet) -> None:
    fleet.hosts["fleet2"].fault("start_delay=6")
    server = "dropbear -s -g -p 22 -r /etc/dropbear/host_key"

    def cut(_process: object) -> None:
        on_host("fleet2", "pkill -9 -x dropbear")

    done = fleet.rollout(*ONE_BY_ONE, at=("fleet2", "verify"), act=cut)
    on_host("fleet2", server)
    assert done.code == 1
    assert done.outcomes == outcomes("changed", "unreachable", *["untouched"] * 3)
    assert fleet.rollout("--resume", gpu=None).code == 0
    assert fleet.serving() == "11111"


def on_host(name: str, command: str) -> None:
    """Run a command on the host through Docker, because the test cuts SSH."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'molecule/simulated_host')!r}); import gpuhost; "
        f"gpuhost.Host({name!r}).script({command!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_controller_is_killed_during_a_wave(fleet: Fleet) -> None:
    fleet.hosts["fleet2"].fault("start_delay=4")
    done = fleet.rollout(*ONE_BY_ONE, at=("fleet2", "verify"), act=kill)
    assert done.code != 0
    assert done.report["outcome"] == "running"
    rest = fleet.rollout("--resume", gpu=None)
    assert rest.code == 0
    assert "fleet1" not in rest.outcomes
    assert fleet.serving() == "11111"


def test_ctrl_c_finishes_the_wave_and_starts_no_other(fleet: Fleet) -> None:
    before = fleet.containers()[2:]
    done = fleet.rollout(*ONE_BY_ONE, at=("fleet2", "deploy"), act=interrupt)
    assert (done.code, done.report["outcome"]) == (130, "stopped")
    assert done.outcomes == outcomes("changed", "changed", *["untouched"] * 3)
    assert fleet.containers()[2:] == before
    assert fleet.rollout("--resume", gpu=None).code == 0
    assert fleet.serving() == "11111"


@pytest.mark.parametrize("reports", ["rollouts", "other"])
def test_two_at_once(fleet: Fleet, reports: str) -> None:
    """On the same controller the second one does not start; from another controller, the host refuses it."""
    canary = fleet.hosts["fleet1"]
    canary.fault("health=503")
    second: list[Ended] = []

    def start(_process: object) -> None:
        """The second one runs to its end while the first one waits for its canary."""
        second.append(fleet.rollout("-e", "vllm_gpu_shm_size=1gb", gpu=0, reports=reports))
        canary.fault("--clear")

    first = fleet.rollout(at=("fleet1", "verify"), act=start)
    assert first.code == 0, first
    assert fleet.serving() == "11111"
    if reports == "rollouts":
        assert second[0].code == 3
        assert "another rollout is running" in second[0].errors
    else:
        assert second[0].code == 1
        assert second[0].outcomes == outcomes("refused", *["untouched"] * 4)
        assert "is changing this server right now" in second[0].report["hosts"][0]["error"]


def test_a_host_with_only_one_card(fleet: Fleet, tmp_path: Path) -> None:
    before = fleet.containers()
    listing = json.loads((ROOT / "molecule/simulated_host/cards.json").read_text(encoding="utf-8"))
    uuids = (
        fleet.hosts["fleet3"].look.check_output("nvidia-smi --query-gpu=uuid --format=csv,noheader").split()
    )
    cards = [{**card, "uuid": uuid} for card, uuid in zip(listing["cards"], uuids, strict=True)]

    def install(number: int) -> None:
        path = tmp_path / "cards.json"
        path.write_text(json.dumps({**listing, "cards": cards[:number]}), encoding="utf-8")
        gpuhost("cards", "fleet3", str(path))

    install(1)
    done = fleet.rollout()
    install(len(cards))
    assert (done.code, done.outcomes) == (3, {**all_hosts("untouched"), "fleet3": "refused"})
    message = "gpu_device_id is 1, but this host has no such GPU. Choose 0"
    assert message in done.report["hosts"][2]["error"]
    assert fleet.containers() == before


def test_an_inventory_that_names_a_machine_twice(fleet: Fleet) -> None:
    before = fleet.containers()
    twin = fleet.listing["vllm_gpu"]["hosts"]["fleet2"]
    done = fleet.rollout(inventory=fleet.inventory(chat=twin))
    assert done.code == 3
    errors = [host["error"] for host in done.report["hosts"] if host["error"]]
    assert any("are one machine" in error and "fleet2" in error and "chat" in error for error in errors), (
        errors
    )
    assert fleet.containers() == before


def test_secrets_stay_where_they_belong(fleet: Fleet, tmp_path: Path) -> None:
    key = "sk-planted-71c2d9"
    file = tmp_path / "secrets.yml"
    file.write_text(f"vllm_gpu_api_key: {key}\n", encoding="utf-8")
    processes: list[str] = []

    def list_processes(_process: object) -> None:
        processes.append(subprocess.check_output(["ps", "-eo", "args"], text=True))

    at = ("fleet1", "deploy")
    done = fleet.rollout("-e", f"@{file}", "--limit", "fleet1", at=at, act=list_processes)
    assert done.code == 0
    assert key in fleet.hosts["fleet1"].look.check_output("cat /opt/vllm-gpu/.env")
    found = subprocess.run(["grep", "-rl", key, fleet.folder], capture_output=True, text=True, check=False)
    assert found.stdout == ""
    assert key not in json.dumps(done.events) + done.errors + processes[0]


def test_transmit_worker_process(fleet: Fleet, tmp_path: Path) -> None:
    """More than one controller: the worker gets only what is transmitted, and the sender gets the result."""
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

    runner = BIN / "ansible-runner"
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
