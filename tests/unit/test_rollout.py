"""scripts/rollout before it has checked any host, and when it is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fleet.processes import kill_tree

from tests.unit.conftest import Script

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Hosts without Docker or a way to become root: each would be refused.
HOSTS = """
all: {hosts: {web01: {}}, vars: {ansible_connection: local, ansible_become_exe: /nowhere/sudo}}
vllm_gpu:
  hosts: {gpu01: {}, gpu02: {}}
"""


@pytest.fixture(autouse=True)
def hosts(tmp_path: Path) -> Path:
    path = tmp_path / "hosts.yml"
    path.write_text(HOSTS, encoding="utf-8")
    return path


def command(folder: Path, *words: str) -> dict[str, Any]:
    """Return the arguments of subprocess.run for scripts/rollout, in a folder with an inventory."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    inventory = () if "--resume" in words else ("-i", "hosts.yml")
    whole: list[str | Path] = [ROOT / "scripts/rollout", *inventory, *words]
    return {"args": whole, "cwd": folder, "env": environment, "text": True}


def rollout(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(folder, *words), capture_output=True, check=False)


def last_report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "rollouts/latest/report.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(("words", "code"), [(("--check",), 3), (("-e", "gpu_device_id=1"), 1)])
def test_an_encrypted_inventory_without_a_password(tmp_path: Path, words: tuple[str, ...], code: int) -> None:
    (tmp_path / "group_vars").mkdir()
    secret, password = tmp_path / "group_vars/vllm_gpu.yml", tmp_path / "password"
    secret.write_text("vllm_gpu_api_key: sk-1\n", encoding="utf-8")
    password.write_text("a password\n", encoding="utf-8")
    encrypt: list[str | Path] = [BIN / "ansible-vault", "encrypt", "--vault-password-file", password, secret]
    subprocess.run(encrypt, check=True, capture_output=True)
    done = rollout(tmp_path, *words)
    assert done.returncode == code
    assert "ansible-playbook ended before it had checked any host:" in done.stderr
    assert "no vault secrets found" in done.stderr
    assert "Give the vault password with --ask-vault-pass" in done.stderr
    assert "\x1b" not in done.stderr


LAST: dict[str, Any] = {
    "schema": 1, "id": "20261122T190301Z", "request": {"gpu_device_id": "1"}, "files": [], "inventory": "hosts.yml",
    "wave": None, "hosts": [{"name": "gpu01", "outcome": "failed"}, {"name": "gpu02", "outcome": "changed"}],
}  # fmt: skip


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-e", "vllm_gpu_api_key=sk-1"), "vllm_gpu_api_key looks like a secret"),
        (("-e", "gpu_device_id=1 ansible_become_password=x"), "ansible_become_password looks like a secret"),
        (("-e", "gpu_device_id"), "write KEY=VALUE, @FILE or a JSON object"),
        (("-e", "a=1 --b=1"), "--b cannot be the name of a variable"),
        (("-e", "a='"), "No closing quotation"),
        (("-e", "@nowhere.yml"), "this file does not exist"),
        (("-e", "@."), "this file does not exist"),
        (("--limit", "gpu1"), "Did you mean gpu01?"),
        (("--limit", "gpu01:gpu1"), "--limit gpu1: the inventory has no such host or group"),
        (("--limit", "~["), "--limit ~[: this is not a pattern of hosts"),
        (("--limit", "~("), "--limit ~(: the inventory has no such host"),
        (("--limit", ":"), "--limit :: this is not a pattern of hosts"),
        (("--limit", ""), "this is not a pattern of hosts"),
        (("--limit", "!"), "--limit !: the inventory has no such host"),
        (("--limit", "gpu01[9]"), "--limit gpu01[9]: the inventory has no such host"),
        (("--limit", "gpu01,localhost"), "--limit localhost: the inventory has no such host"),
        (("--limit", "@nowhere"), "this file of host names does not exist"),
        (("--limit", "@/proc"), "this file of host names does not exist"),
        (("-i", "/proc/version"), "The inventory cannot be read: "),
        (("-i", "nowhere.yml"), "The inventory nowhere.yml does not exist"),
        (("-i", "garbage"), "The inventory cannot be read: "),
        (("-i", "empty"), "The inventory cannot be read: "),
        (("-e", "vllm_gpu_hosts=nobody"), "has no host in the group nobody"),
        (("--wave", "1,0"), "--wave: the sizes of waves are"),
        (("--wave", "1,,2"), "--wave: the sizes of waves are"),
        (("--wave", ""), "--wave: the sizes of waves are"),
        (("--forks", "0"), "--forks 0: write a whole number from 1"),
        (("--forks", "-1"), "--forks -1: write a whole number from 1"),
        (("--forks", "abc"), "--forks abc: write a whole number from 1"),
        (("--reports", "hosts.yml"), "The reports cannot be written to hosts.yml"),
        (("--reports", "/dev/null/x"), "The reports cannot be written to /dev/null/x"),
        (("--vault-password-file", "nowhere"), "--vault-password-file nowhere: this file does not exist"),
        (("--vault-password-file", "."), "--vault-password-file .: this file does not exist"),
        (("--bel\x1b]0;x\x07",), r"unrecognized arguments: --bel\x1b]0;x\x07"),
        (("--resume",), "There is no rollout in rollouts to continue"),
        (("--resume", "--reports", "hosts.yml"), "hosts.yml/latest/report.json cannot be read"),
    ],
)
def test_wrong_usage_contacts_no_host(
    script: Script, tmp_path: Path, words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    code, out, err = script("-i", "hosts.yml", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("scripts/rollout: ")
    assert message in err
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("before", "words", "message"),
    [
        ({"hosts": [{"name": "gpu07", "outcome": "failed"}, *LAST["hosts"]]}, (), "is not done on gpu07, which the inventory"),
        # It is in the inventory, but in no group that gets a server.
        ({"hosts": [{"name": "web01", "outcome": "untouched"}]}, (), "is not done on web01, which the inventory"),
        ({"left_over": ["gpu07"]}, ("--limit", "gpu01"), "is not done on gpu07, which the inventory"),
        ({}, ("--limit", "gpu02"), "--limit gpu02 matches none of the hosts that the last rollout has left"),
        ({"hosts": LAST["hosts"][1:]}, (), "Nothing is left of the rollout 20261122T190301Z"),
        ({"files": ["/nowhere/vars.yml"]}, (), "-e @/nowhere/vars.yml: this file does not exist"),
        ({"inventory": "/nowhere/hosts.yml"}, (), "The inventory /nowhere/hosts.yml does not exist"),
        ({"wave": "0"}, (), "--wave: the sizes of waves are"),
        ({"request": {"x": {"api_key": "sk-1"}}}, (), "api_key looks like a secret"),
        ({"schema": 2}, (), "cannot be read as the report of a rollout"),
    ],
)  # fmt: skip
def test_what_cannot_be_resumed_is_named(
    script: Script, tmp_path: Path, before: dict[str, Any], words: tuple[str, ...], message: str
) -> None:
    (tmp_path / "rollouts/latest").mkdir(parents=True)
    report = json.dumps({**LAST, **before})
    (tmp_path / "rollouts/latest/report.json").write_text(report, encoding="utf-8")
    code, out, err = script("--resume", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["latest"]


def test_a_resumed_part_does_not_forget_the_rest(tmp_path: Path) -> None:
    """No host can be served, so all are left."""
    rollout(tmp_path)
    part = rollout(tmp_path, "--resume", "--limit", "gpu01")
    assert part.returncode == 3
    assert "Not done yet, because --limit excluded them: gpu02." in part.stdout
    whole = rollout(tmp_path, "--resume", "--json")
    assert whole.stdout.count('"event": "end"') == 1
    found = last_report(tmp_path)
    assert [host["name"] for host in found["hosts"]] == ["gpu01", "gpu02"]
    assert found["left_over"] == []


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_it_reaches_its_end_when_nothing_reads_its_output(tmp_path: Path, words: tuple[str, ...]) -> None:
    with subprocess.Popen(**command(tmp_path, *words), stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.close()
    assert process.returncode == 3
    found = last_report(tmp_path)
    assert (found["outcome"], len(found["ended_at"])) == ("refused", 32)


@pytest.mark.parametrize(("words", "signals"), [((), 2), (("--json",), 2), (("--check", "--json"), 1)])
def test_ctrl_c_ends_a_hanging_ansible_with_its_workers(
    tmp_path: Path, hosts: Path, words: tuple[str, ...], signals: int
) -> None:
    seconds = f"{os.getpid()}.{signals}"
    gpu = f"{{{{ lookup('ansible.builtin.pipe', 'sleep {seconds}') }}}}"
    hosts.write_text(f'{HOSTS}  vars:\n    gpu_device_id: "{gpu}"\n', encoding="utf-8")

    def hangs() -> bool:
        found = subprocess.run(["pgrep", "-f", f"^sleep {seconds}"], check=False, capture_output=True)
        return found.returncode == 0

    with subprocess.Popen(**command(tmp_path, *words), stdout=subprocess.PIPE) as process:
        try:
            deadline = time.monotonic() + 120
            while not hangs():
                assert time.monotonic() < deadline
                time.sleep(0.2)
            for number in range(signals):
                assert process.poll() is None, f"ended by signal {number}"
                process.send_signal(signal.SIGINT)
                time.sleep(1)
            assert process.wait(30) == 130
            assert process.stdout
            assert '"event": "check"' not in process.stdout.read()  # it has not checked every host
        finally:
            kill_tree(process.pid)
    assert not hangs()


@pytest.mark.parametrize("waves", [[0], [1, "150%"], ["10 %"], [1.5], [True], [], "1,2", 5], ids=str)
def test_the_playbook_refuses_waves_before_any_host_is_read(hosts: Path, waves: object) -> None:
    values = json.dumps({"vllm_gpu_waves": waves, "gpu_device_id": 1})
    play: list[str | Path] = [BIN / "ansible-playbook", "-i", hosts, "playbooks/rollout.yml", "-e", values]
    done = subprocess.run(play, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    message = f"vllm_gpu_waves is {json.dumps(waves)}, but must be a list of whole numbers"
    assert message in " ".join(done.stdout.split())
    assert done.stdout.count("TASK [") == 1
