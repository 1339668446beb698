"""What scripts/rollout says before it has looked at any host."""

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
# Hosts without an engine or a way to root: each would be refused.
HOSTS = """
all: {hosts: {web01: {}}, vars: {ansible_connection: local, ansible_become_exe: /nowhere/sudo}}
vllm_gpu:
  hosts: {gpu01: {}, gpu02: {}}
"""


def command(folder: Path, *words: str, inventory: str = "hosts.yml") -> list[str | Path]:
    if not (folder / "hosts.yml").exists():
        (folder / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    return [ROOT / "scripts/rollout", *(("-i", inventory) if inventory else ()), *words]


def where(folder: Path) -> dict[str, Any]:
    """Return the folder and the environment of a command."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    return {"cwd": folder, "env": environment, "text": True}


def rollout(folder: Path, *words: str, inventory: str = "hosts.yml") -> subprocess.CompletedProcess[str]:
    whole = command(folder, *words, inventory=inventory)
    return subprocess.run(whole, **where(folder), capture_output=True, check=False)


@pytest.mark.parametrize("words", [("--check",), ("-e", "gpu_device_id=1")])
def test_why_ansible_never_began_is_told(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Here the inventory is encrypted, and nobody gave the password."""
    (tmp_path / "group_vars").mkdir()
    secret, password = tmp_path / "group_vars/vllm_gpu.yml", tmp_path / "password"
    secret.write_text("vllm_gpu_api_key: sk-1\n", encoding="utf-8")
    password.write_text("a password\n", encoding="utf-8")
    vault = Path(sys.executable).parent / "ansible-vault"
    subprocess.run(
        [vault, "encrypt", "--vault-password-file", password, secret], check=True, capture_output=True
    )
    done = rollout(tmp_path, *words)
    assert done.returncode in (1, 3)
    assert "ansible-playbook ended before it had looked at any host:" in done.stderr
    assert "no vault secrets found" in done.stderr
    assert "\x1b" not in done.stderr


LAST: dict[str, Any] = {
    "schema": 1, "id": "20261122T190301Z", "request": {"gpu_device_id": "1"}, "files": [], "inventory": "hosts.yml",
    "wave": None, "hosts": [{"name": "gpu01", "outcome": "failed"}, {"name": "gpu02", "outcome": "changed"}],
}  # fmt: skip


def last(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    """Leave the report of a roll-out before this one."""
    (folder / "rollouts/latest").mkdir(parents=True)
    (folder / "rollouts/latest/report.json").write_text(json.dumps({**LAST, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("-e", "vllm_gpu_api_key=sk-1"), "vllm_gpu_api_key looks like a secret"),
        (("-e", "gpu_device_id=1 ansible_become_password=x"), "ansible_become_password looks like a secret"),
        (("-e", "gpu_device_id"), "write KEY=VALUE, @FILE or a JSON object"),
        (("-e", "a=1 --b=1"), "--b can't be the name of a variable"),
        (("-e", "a='"), "No closing quotation"),
        (("-e", "@nowhere.yml"), "there is no such file"),
        (("-e", "@."), "there is no such file"),
        (("--limit", "gpu1"), "Did you mean gpu01?"),
        (("--limit", "gpu01:gpu1"), "--limit gpu1: the inventory has no such host or group"),
        (("--limit", "~["), "--limit ~[: this is no pattern of hosts"),
        (("--limit", "~("), "--limit ~(: the inventory has no such host"),
        (("--limit", ":"), "--limit :: this is no pattern of hosts"),
        (("--limit", ""), "this is no pattern of hosts"),
        (("--limit", "!"), "--limit !: the inventory has no such host"),
        (("--limit", "gpu01[9]"), "--limit gpu01[9]: the inventory has no such host"),
        (("--limit", "gpu01,localhost"), "--limit localhost: the inventory has no such host"),
        (("--limit", "@nowhere"), "there is no such file with names of hosts"),
        (("--limit", "@/proc"), "there is no such file with names of hosts"),
        (("-i", "/proc/version"), "The inventory can't be read: "),
        (("-i", "nowhere.yml"), "There is no inventory nowhere.yml"),
        (("-i", "garbage"), "The inventory can't be read: "),
        (("-i", "empty"), "The inventory can't be read: "),
        (("--wave", "1,0"), "--wave: the sizes of waves are"),
        (("--wave", "1,,2"), "--wave: the sizes of waves are"),
        (("--wave", ""), "--wave: the sizes of waves are"),
        (("--forks", "0"), "--forks 0: write a whole number from 1"),
        (("--forks", "-1"), "--forks -1: write a whole number from 1"),
        (("--forks", "abc"), "--forks abc: write a whole number from 1"),
        (("--reports", "hosts.yml"), "The reports can't be written to hosts.yml"),
        (("--reports", "/dev/null/x"), "The reports can't be written to /dev/null/x"),
        (("--vault-password-file", "nowhere"), "--vault-password-file nowhere: there is no such file"),
        (("--vault-password-file", "."), "--vault-password-file .: there is no such file"),
        (("--bel\x1b]0;x\x07",), r"unrecognized arguments: --bel\x1b]0;x\x07"),
        (("--resume",), "There is no roll-out in rollouts to go on with"),
        (("--resume", "--reports", "hosts.yml"), "hosts.yml/latest/report.json can't be read"),
    ],
)
def test_wrong_usage_asks_nothing_of_any_host(
    script: Script, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    (tmp_path / "garbage").write_bytes(bytes(range(256)))
    (tmp_path / "empty").mkdir()
    code, out, err = script("-i", "hosts.yml", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("scripts/rollout: ")
    assert said in err
    assert not (tmp_path / "rollouts").exists()


@pytest.mark.parametrize(
    ("before", "words", "said"),
    [
        ({"hosts": [{"name": "gpu07", "outcome": "failed"}, *LAST["hosts"]]}, (), "is not done on gpu07, and the inventory"),
        # It is in the inventory, but in no group that gets a server.
        ({"hosts": [{"name": "web01", "outcome": "untouched"}]}, (), "is not done on web01, and the inventory"),
        ({"left_over": ["gpu07"]}, ("--limit", "gpu01"), "is not done on gpu07, and the inventory"),
        ({}, ("--limit", "gpu02"), "--limit gpu02 leaves none of the hosts that the last roll-out has left"),
        ({"hosts": LAST["hosts"][1:]}, (), "Nothing is left of the roll-out 20261122T190301Z"),
        ({"files": ["/nowhere/vars.yml"]}, (), "-e @/nowhere/vars.yml: there is no such file"),
        ({"inventory": "/nowhere/hosts.yml"}, (), "There is no inventory /nowhere/hosts.yml"),
        ({"wave": "0"}, (), "--wave: the sizes of waves are"),
        ({"request": {"x": {"api_key": "sk-1"}}}, (), "api_key looks like a secret"),
        ({"schema": 2}, (), "can't be read as the report of a roll-out"),
    ],
)  # fmt: skip
def test_what_can_not_be_resumed_is_named(
    script: Script, tmp_path: Path, before: dict[str, Any], words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    last(tmp_path, **before)
    code, out, err = script("--resume", *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert said in err
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == ["latest"]


def test_a_resumed_part_does_not_forget_the_rest(tmp_path: Path) -> None:
    """Neither of the hosts can be served: what counts is who is still on the list."""
    rollout(tmp_path)
    part = rollout(tmp_path, "--resume", "--limit", "gpu01", inventory="")
    assert part.returncode == 3
    assert "Not done yet, as --limit left them out: gpu02." in part.stdout
    whole = rollout(tmp_path, "--resume", "--json", inventory="")
    assert whole.stdout.count('"event": "end"') == 1
    found = json.loads((tmp_path / "rollouts/latest/report.json").read_text(encoding="utf-8"))
    assert [host["name"] for host in found["hosts"]] == ["gpu01", "gpu02"]
    assert found["left_over"] == []


def test_nobody_reads_the_output(tmp_path: Path) -> None:
    """It goes on to its end, and the report is whole."""
    for words in ((), ("--json",)):
        with subprocess.Popen(
            command(tmp_path, *words), **where(tmp_path), stdout=subprocess.PIPE
        ) as process:
            assert process.stdout
            process.stdout.close()
        assert process.returncode == 3
        found = json.loads((tmp_path / "rollouts/latest/report.json").read_text(encoding="utf-8"))
        assert (found["outcome"], len(found["ended_at"])) == ("refused", 32)


@pytest.mark.parametrize(("words", "signals"), [((), 2), (("--json",), 2), (("--check",), 1)])
def test_ctrl_c_ends_an_ansible_that_hangs_with_its_workers(
    tmp_path: Path, words: tuple[str, ...], signals: int
) -> None:
    seconds = f"{os.getpid()}.{signals}"
    (tmp_path / "hosts.yml").write_text(
        f"{HOSTS}  vars:\n    gpu_device_id: \"{{{{ lookup('ansible.builtin.pipe', 'sleep {seconds}') }}}}\"\n",
        encoding="utf-8",
    )

    def hangs() -> bool:
        return (
            subprocess.run(["pgrep", "-f", f"^sleep {seconds}"], check=False, capture_output=True).returncode
            == 0
        )

    with subprocess.Popen(command(tmp_path, *words), **where(tmp_path)) as process:
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
        finally:
            kill_tree(process.pid)
    assert not hangs()


@pytest.mark.parametrize("waves", [[0], [1, "150%"], ["10 %"], [1.5], [True], [], "1,2", 5], ids=str)
def test_the_playbook_refuses_waves_before_any_host_is_read(tmp_path: Path, waves: object) -> None:
    (tmp_path / "hosts.yml").write_text(HOSTS, encoding="utf-8")
    words: list[str | Path] = [
        Path(sys.executable).parent / "ansible-playbook",
        "-i",
        tmp_path / "hosts.yml",
        "playbooks/rollout.yml",
    ]
    done = subprocess.run(
        [*words, "-e", json.dumps({"vllm_gpu_waves": waves, "gpu_device_id": 1})], cwd=ROOT,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"vllm_gpu_waves is {json.dumps(waves)}, but has to be a list of whole numbers" in " ".join(
        done.stdout.split()
    )
    assert done.stdout.count("TASK [") == 1
