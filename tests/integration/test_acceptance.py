"""playbooks/acceptance.yml, as the owner of a GPU host runs it: the host ends as it began."""

from __future__ import annotations

import json
from pathlib import Path

import pexpect
import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, gpuhost

PLAYBOOK = "playbooks/acceptance.yml"


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    return tmp_path / "evidence.md"


def accept(host: GpuHost, evidence: Path, gpus: str = "0,1", **variables: object) -> tuple[int, str]:
    done = host.play(PLAYBOOK, vllm_gpu_acceptance_gpus=gpus, vllm_gpu_acceptance_file=evidence, **variables)
    return done.code, " ".join(done.output.split())


def test_each_gpu_is_proven_and_nothing_is_left(clean_host: GpuHost, evidence: Path) -> None:
    code, said = accept(clean_host, evidence, vllm_gpu_api_key="sk-planted-5d1f07")
    assert code == 0, said
    first, second = evidence.read_text(encoding="utf-8").split("## Requested: GPU ")[1:]
    cards = json.loads((ROOT / "molecule/simulated_host/cards.json").read_text(encoding="utf-8"))["cards"]
    assert f"served on {cards[0]['uuid']} and on {cards[1]['uuid']}, each time proven" in said
    for number, text, other in ((0, first, 1), (1, second, 0)):
        processes = text.partition("--query-compute-apps")[2].partition("$ ")[0]
        assert (cards[number]["uuid"] in processes, cards[other]["uuid"] in processes) == (True, False)
        assert f'"DeviceIDs":["{number}"]' in text
        assert "VLLM::EngineCor" in text
        assert "$ nvidia-ctk --version (not installed)" in " ".join(text.split())
        assert '200 {"version":"' in text
        assert '"object":"text_completion"' in text
        assert "and on no other" in text
    assert "sk-planted" not in first + second + said
    assert clean_host.container() == ""
    assert not clean_host.look.file(DIRECTORY).exists


def test_a_server_is_replaced_only_after_a_yes_and_put_back(served: GpuHost, evidence: Path) -> None:
    container, listing = served.container(), f"cd {DIRECTORY} && find . -type f | sort | xargs md5sum"
    files = served.look.check_output(listing)
    code, said = accept(served, evidence)
    assert code != 0
    assert "nobody confirmed that its server may be replaced" in said
    assert (served.container(), evidence.exists()) == (container, False)

    words = ["playbooks/acceptance.yml", "-e", "vllm_gpu_acceptance_gpus=1,0"]
    words += ["-e", f"vllm_gpu_acceptance_file={evidence}"]
    asked = pexpect.spawn("ansible-playbook", words, cwd=ROOT, env=served.environment, timeout=300)
    asked.expect("Type\\s+yes to continue")
    assert served.container() == container
    asked.sendline("yes")
    asked.expect(pexpect.EOF)
    asked.close()
    assert asked.exitstatus == 0, asked.before
    assert served.served_gpu() == "0"
    assert served.look.check_output(listing) == files
    assert served.serve(gpu_device_id=0).changed == 0
    assert evidence.read_text(encoding="utf-8").count("and on no other") >= 2


def test_what_could_not_be_put_back_is_left_alone(served: GpuHost, evidence: Path) -> None:
    container = served.container()
    code, said = accept(served, evidence, vllm_gpu_acceptance_replace="true", vllm_gpu_model="acme/other")
    assert code != 0
    assert "could not be restored afterwards" in said
    assert "VLLM_MODEL" in said
    assert served.container() == container


@pytest.mark.parametrize(
    ("gpus", "reason"),
    [
        ("0", "Name two different GPUs of one host"),
        ("0,GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "are the same GPU"),
        ("0,7", "gpu_device_id is 7, but this host has no such GPU"),
    ],
)
def test_two_gpus_that_are_there_are_needed(
    clean_host: GpuHost, evidence: Path, gpus: str, reason: str
) -> None:
    code, said = accept(clean_host, evidence, gpus=gpus)
    assert code != 0
    assert reason in said
    assert (clean_host.container(), evidence.exists()) == ("", False)


def test_files_without_a_server_are_left_alone(served: GpuHost, evidence: Path) -> None:
    served.look.check_output("docker rm -f vllm-server")
    before = served.files()
    code, said = accept(served, evidence)
    assert code != 0
    assert "has files of a service that doesn't run" in said
    assert served.files() == before


def test_a_server_whose_files_are_gone_is_left_alone(served: GpuHost, evidence: Path) -> None:
    container = served.container()
    served.look.check_output(f"rm -r {DIRECTORY}")
    code, said = accept(served, evidence, vllm_gpu_acceptance_replace="true")
    assert code != 0
    assert "could not be restored afterwards" in said
    assert served.container() == container


def test_a_server_that_somebody_else_started_meanwhile_is_left_alone(served: GpuHost, tmp_path: Path) -> None:
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


def test_a_host_with_one_gpu_or_none_says_so(clean_host: GpuHost, evidence: Path, tmp_path: Path) -> None:
    cards = json.loads((ROOT / "molecule/simulated_host/cards.json").read_text(encoding="utf-8"))
    try:
        for left, reason in ((1, "Choose 0 (NVIDIA GeForce RTX 5090"), (0, "nvidia-smi finds no GPU")):
            file = tmp_path / "cards.json"
            file.write_text(json.dumps({**cards, "cards": cards["cards"][:left]}), encoding="utf-8")
            gpuhost("cards", clean_host.name, str(file))
            code, said = accept(clean_host, evidence)
            assert code != 0
            assert "was left as it is, because:" in said
            assert reason in said
            assert clean_host.container() == ""
    finally:
        gpuhost("cards", clean_host.name, str(ROOT / "molecule/simulated_host/cards.json"))
