"""Real vLLM on a simulated GPU host, by the same role, compose file and playbooks.

Each test continues from the one before it, as a start takes almost a minute.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, Result
from tests.gpu_host import started as start

VARIABLES = {
    "vllm_gpu_image": "vllm/vllm-openai-cpu:v0.32.0",
    "vllm_gpu_model": "/models/tiny",
    "vllm_gpu_models": "/srv/models",
    "vllm_gpu_start_timeout": 300,
}
EVIDENCE = ROOT / ".cache/acceptance.md"


@pytest.fixture(scope="module")
def host() -> Iterator[GpuHost]:
    EVIDENCE.unlink(missing_ok=True)
    with start("acceptance") as started:
        subprocess.run(
            [sys.executable, ROOT / "molecule/simulated_host/real_vllm.py", started.name],
            check=True,
            timeout=2400,
        )
        yield started


def play(host: GpuHost, playbook: str = "serve.yml", /, **variables: object) -> Result:
    return host.play(playbook, "-e", json.dumps({**VARIABLES, **variables}))


def serve(host: GpuHost, gpu: int, **variables: object) -> None:
    done = play(host, gpu_device_id=gpu, **variables)
    assert done.code == 0, done.output


def note(what: str, text: str) -> None:
    """Record for a person what was observed."""
    with EVIDENCE.open("a", encoding="utf-8") as file:
        file.write(f"### {what}\n\n```\n{text.strip()}\n```\n\n")


def request(host: GpuHost, path: str, body: object = None, key: str = "") -> tuple[int, Any]:
    """Send a request to the API from the host itself; return the status and the answer."""
    words = f"curl -s -o /root/answer -w '%{{http_code}}' http://127.0.0.1:8000/{path}"
    if key:
        words += f" -H 'Authorization: Bearer {key}'"
    if body is not None:
        words += f" -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    status = int(host.ssh.run(words).stdout)
    text = host.ssh.run("cat /root/answer").stdout
    return status, json.loads(text) if text else None


def complete(host: GpuHost) -> list[str]:
    body = {
        "model": "/models/tiny", "prompt": "Beautiful is", "max_tokens": 12, "temperature": 0, "logprobs": 0
    }  # fmt: skip
    status, answer = request(host, "v1/completions", body)
    assert status == 200, answer
    tokens: list[str] = answer["choices"][0]["logprobs"]["tokens"]
    assert len(tokens) > 1
    return tokens


def proof(host: GpuHost, gpu: int) -> None:
    """The server is on this card and on no other, by nvidia-smi, Docker, and the referee."""
    rows = host.ssh.check_output(
        "nvidia-smi --query-compute-apps=gpu_uuid,pid,process_name --format=csv,noheader"
    )
    uuids = host.ssh.check_output("nvidia-smi --query-gpu=uuid --format=csv,noheader").split()
    top = host.ssh.check_output("docker top vllm-server -eo pid,ppid,comm")
    requests = host.ssh.check_output(
        "docker inspect --format '{{json .HostConfig.DeviceRequests}}' vllm-server"
    )
    referee = host.ssh.run(f"{DIRECTORY}/check_gpu_allocation.sh --deep --expect {gpu}")
    note(f"GPU {gpu}", f"{rows}\n\n{top}\n\n{requests}\n\n{referee.stdout}")
    (row,) = rows.splitlines()
    uuid, pid, _name = row.split(", ")
    assert uuid == uuids[gpu]
    # The API server has no card; the worker of its engine process has this one.
    processes = {line.split()[0]: line.split()[1:] for line in top.splitlines()}
    parent, name = processes[pid]
    assert name == "VLLM::Worker", top
    grandparent, name = processes[parent]
    assert name.startswith("VLLM::Engine"), top
    assert processes[grandparent][1] == "vllm", top
    assert json.loads(requests)[0]["DeviceIDs"] == [str(gpu)]
    assert referee.rc == 0, referee.stdout


def test_on_gpu_0_then_on_gpu_1_it_gives_the_same_tokens(host: GpuHost) -> None:
    serve(host, 0)
    proof(host, 0)
    assert request(host, "health") == (200, None)
    status, models = request(host, "v1/models")
    assert (status, [model["id"] for model in models["data"]]) == (200, ["/models/tiny"])
    assert request(host, "version")[1]["version"].startswith("0.32.0")
    tokens = complete(host)
    assert play(host, gpu_device_id=0).changed == 0

    serve(host, 1)
    proof(host, 1)
    assert complete(host) == tokens
    note("Tokens on both", repr(tokens))


def test_rollback(host: GpuHost) -> None:
    done = play(host, "playbooks/rollback.yml")
    assert done.code == 0, done.output
    proof(host, 0)
    complete(host)


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"vllm_gpu_model": "/models/nowhere"}, "/srv/models/nowhere does not exist"),
        # This is real vLLM's message with HF_HUB_OFFLINE, which the image sets.
        ({"vllm_gpu_model": "acme/does-not-exist"}, "Cannot find an appropriate cached snapshot folder"),
        ({"vllm_gpu_extra_args": ["--no-such-flag"]}, "unrecognized arguments: --no-such-flag"),
    ],
    ids=["no such path", "no such model", "a wrong flag"],
)
def test_after_a_refusal_of_real_vllm_the_old_server_is_restored(
    host: GpuHost, variables: dict[str, object], reason: str
) -> None:
    done = play(host, gpu_device_id=1, **variables)
    note(f"Refused: {variables}", done.output.rpartition("fatal: ")[2] or done.output[-3000:])
    assert done.code != 0
    assert reason in done.output
    proof(host, 0)
    complete(host)


def test_a_key_guards_the_api(host: GpuHost, tmp_path: Path) -> None:
    key = "sk-acceptance-3f81"
    vault = tmp_path / "vault.yml"
    vault.write_text(f"vllm_gpu_api_key: {key}\n", encoding="utf-8")
    done = host.play("serve.yml", "-e", json.dumps({**VARIABLES, "gpu_device_id": 0}), "-e", f"@{vault}")
    assert done.code == 0, done.output
    assert key not in done.output
    assert request(host, "v1/models")[0] == 401
    assert request(host, "v1/models", key=key)[0] == 200
    assert request(host, "health")[0] == 200
    serve(host, 0, vllm_gpu_api_key="")


def test_a_worker_that_is_killed(host: GpuHost) -> None:
    pid = host.ssh.check_output("nvidia-smi --query-compute-apps=pid --format=csv,noheader")
    host.ssh.check_output(f"kill -KILL {pid}")
    deadline = time.monotonic() + 60
    while (referee := host.ssh.run(f"{DIRECTORY}/check_gpu_allocation.sh --json")).rc == 0:
        assert time.monotonic() < deadline
    note("The worker was killed", referee.stdout)
    assert play(host, "playbooks/verify.yml").code != 0
    # Whether its restart policy has restarted it by then or not.
    serve(host, 0)
    proof(host, 0)
    complete(host)
