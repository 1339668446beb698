"""playbooks/acceptance.yml, as the owner of a GPU host runs it: afterwards the host is as it was before."""

from __future__ import annotations

import json
from pathlib import Path

import pexpect
import pytest

from tests.gpu_host import CARDS, DIRECTORY, ROOT, GpuHost, gpuhost

PLAYBOOK = "playbooks/acceptance.yml"
REPLACE = {"vllm_gpu_acceptance_replace": "true"}


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    return tmp_path / "evidence.md"


def accept(host: GpuHost, evidence: Path, gpus: str = "0,1", **variables: object) -> tuple[int, str]:
    done = host.play(PLAYBOOK, vllm_gpu_acceptance_gpus=gpus, vllm_gpu_acceptance_file=evidence, **variables)
    return done.code, " ".join(done.output.split())


def test_each_gpu_is_proven_and_nothing_is_left(clean_host: GpuHost, evidence: Path) -> None:
    code, output = accept(clean_host, evidence, vllm_gpu_api_key="sk-planted-5d1f07")
    assert code == 0, output
    first, second = evidence.read_text(encoding="utf-8").split("## Requested: GPU ")[1:]
    cards = json.loads(CARDS.read_text(encoding="utf-8"))["cards"]
    assert f"served on {cards[0]['uuid']} and on {cards[1]['uuid']}, each time proven" in output
    for number, text, other in ((0, first, 1), (1, second, 0)):
        processes = text.partition("--query-compute-apps")[2].partition("$ ")[0]
        assert (cards[number]["uuid"] in processes, cards[other]["uuid"] in processes) == (True, False)
        assert f'"DeviceIDs":["{number}"]' in text
        assert "VLLM::EngineCor" in text
        assert "$ nvidia-ctk --version (not installed)" in " ".join(text.split())
        assert '200 {"version":"' in text
        assert '"object":"text_completion"' in text
        assert "and on no other" in text
    assert "sk-planted" not in first + second + output
    assert clean_host.container() == ""
    assert not clean_host.ssh.file(DIRECTORY).exists


def test_a_server_is_replaced_only_after_a_yes_and_then_restored(served: GpuHost, evidence: Path) -> None:
    container, listing = served.container(), f"cd {DIRECTORY} && find . -type f | sort | xargs md5sum"
    files = served.ssh.check_output(listing)
    code, output = accept(served, evidence)
    assert code != 0
    assert "nobody confirmed that its server may be replaced" in output
    assert (served.container(), evidence.exists()) == (container, False)

    words = ["playbooks/acceptance.yml", "-e", "vllm_gpu_acceptance_gpus=1,0"]
    words += ["-e", f"vllm_gpu_acceptance_file={evidence}"]
    terminal = pexpect.spawn("ansible-playbook", words, cwd=ROOT, env=served.environment, timeout=300)
    terminal.expect("Type\\s+yes to continue")
    assert served.container() == container
    terminal.sendline("yes")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0, terminal.before
    assert served.served_gpu() == "0"
    assert served.ssh.check_output(listing) == files
    assert served.serve(gpu_device_id=0).changed == 0
    assert evidence.read_text(encoding="utf-8").count("and on no other") >= 2


@pytest.mark.parametrize(
    ("prepare", "variables", "reasons"),
    [
        (
            "true",
            {**REPLACE, "vllm_gpu_model": "acme/other"},
            ["could not be restored afterwards", "VLLM_MODEL"],
        ),
        (f"rm -r {DIRECTORY}", REPLACE, ["could not be restored afterwards"]),
        ("docker rm -f vllm-server", {}, ["has files of a service that doesn't run"]),
    ],
    ids=["other settings", "no files", "no server"],
)
def test_what_could_not_be_restored_is_left_alone(
    served: GpuHost, evidence: Path, prepare: str, variables: dict[str, str], reasons: list[str]
) -> None:
    served.ssh.check_output(prepare)
    before = (served.container(), served.files())
    code, output = accept(served, evidence, **variables)
    assert code != 0
    assert all(reason in output for reason in reasons), output
    assert (served.container(), served.files()) == before


@pytest.mark.parametrize(
    ("cards", "gpus", "reason"),
    [
        (2, "0", "Name two different GPUs of one host"),
        (2, "0,GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "are the same GPU"),
        (2, "0,7", "gpu_device_id is 7, but this host has no such GPU"),
        (1, "0,1", "Choose 0 (NVIDIA GeForce RTX 5090"),
        (0, "0,1", "nvidia-smi finds no GPU"),
    ],
)
def test_two_gpus_that_exist_are_needed(
    clean_host: GpuHost, evidence: Path, cards: int, gpus: str, reason: str
) -> None:
    description = json.loads(CARDS.read_text(encoding="utf-8"))
    file = evidence.with_name("cards.json")
    file.write_text(json.dumps({**description, "cards": description["cards"][:cards]}), encoding="utf-8")
    gpuhost("cards", clean_host.name, str(file))
    try:
        code, output = accept(clean_host, evidence, gpus=gpus)
    finally:
        gpuhost("cards", clean_host.name, str(CARDS))
    assert code != 0
    assert reason in output
    assert cards == 2 or "was left as it is, because:" in output
    assert (clean_host.container(), evidence.exists()) == ("", False)


def test_a_server_that_another_user_started_meanwhile_is_left_alone(served: GpuHost, tmp_path: Path) -> None:
    tasks = ROOT / "playbooks/tasks/acceptance"
    again = "docker compose --file docker-compose.serving.yml up --detach --force-recreate"
    play = {
        "hosts": "vllm_gpu", "gather_facts": False, "vars": {"__trial_server": None},
        "tasks": [
            {"ansible.builtin.include_tasks": str(tasks / "read.yml")},
            {"ansible.builtin.command": {"cmd": again, "chdir": DIRECTORY}},
            {"ansible.builtin.include_tasks": str(tasks / "restore.yml")},
        ],
    }  # fmt: skip
    (tmp_path / "trial.yml").write_text(json.dumps([play]), encoding="utf-8")
    before = served.container()
    done = served.play(str(tmp_path / "trial.yml"))
    assert done.code != 0
    assert f"its container is {served.container()[:12]}, which this test did not start" in " ".join(
        done.output.split()
    )
    assert served.container() not in ("", before)
