"""What teardown removes and what it leaves; a stalled play must not change what the next one did."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, Result

LOCK = "/run/vllm_gpu.lock"


def tear_down(host: GpuHost, *arguments: str, **variables: object) -> Result:
    """Tear down; return the output without line breaks, which Ansible sets anywhere."""
    result = host.play("playbooks/teardown.yml", *arguments, **variables)
    return Result(result.code, " ".join(result.output.split()))


def test_the_caches_and_the_users_own_files_stay(served: GpuHost) -> None:
    served.ssh.check_output(f"touch {DIRECTORY}/mine; printf '# mine\\nMY_KEY=1\\n' >> {DIRECTORY}/.env")
    before = (served.container(), served.files())
    planned = tear_down(served, "--check")
    assert planned.code == 0, planned.output
    assert (
        f"Would be removed: the container vllm-server, {DIRECTORY}/docker-compose.serving.yml"
        in planned.output
    )
    assert f"MY_KEY in {DIRECTORY}/.env" in planned.output.partition("Would be kept")[2]
    assert (served.container(), served.files()) == before

    done = tear_down(served)
    assert done.code == 0, done.output
    kept = done.output.partition("Kept: ")[2]
    for name in ("volume vllm-gpu_huggingface-cache", f"MY_KEY in {DIRECTORY}/.env", f"{DIRECTORY}/mine"):
        assert name in kept
    assert served.container() == ""
    assert served.ssh.check_output(f"ls -A {DIRECTORY}").split() == [".env", "mine"]
    assert served.ssh.check_output(f"cat {DIRECTORY}/.env") == "MY_KEY=1"
    assert served.ssh.file(f"{DIRECTORY}/.env").mode == 0o600
    assert "vllm-gpu_huggingface-cache" in served.ssh.check_output("docker volume ls -q")
    assert "vllm" not in served.ssh.check_output("docker network ls")

    again = tear_down(served)
    assert (again.code, again.changed) == (0, 0)
    assert "There was nothing to remove" in again.output
    served.ssh.check_output(f"rm -r {DIRECTORY}")


def test_without_files_of_the_user_nothing_is_left(served: GpuHost) -> None:
    served.serve(
        "-e", json.dumps({"vllm_gpu_secret_env": {"ACME_LICENSE_KEY": "planted-9d1f"}}), gpu_device_id=1
    )
    # A later inventory no longer has that key.
    result = tear_down(served)
    assert result.code == 0, result.output
    assert served.container() == ""
    assert not served.ssh.file(DIRECTORY).exists
    assert served.ssh.run("grep -rl planted-9d1f /opt /run /tmp /root").stdout == ""


def test_a_server_whose_files_are_gone_is_removed(served: GpuHost) -> None:
    served.ssh.check_output(f"rm -r {DIRECTORY}")
    assert tear_down(served).code == 0
    assert served.container() == ""


def test_a_server_started_from_another_directory_is_left_alone(served: GpuHost) -> None:
    served.ssh.check_output("mkdir -p /opt/elsewhere; echo HF_TOKEN=mine > /opt/elsewhere/.env")
    before = (served.container(), served.files())
    for arguments in ([], ["--check"]):
        result = tear_down(served, *arguments, vllm_gpu_project_dir="/opt/elsewhere")
        assert result.code != 0
        assert f"It was started from {DIRECTORY}, not from /opt/elsewhere" in result.output
        assert (served.container(), served.files()) == before
    # Without any server, a `.env` that the role never wrote stays, too.
    served.ssh.check_output("docker rm --force vllm-server")
    result = tear_down(served, vllm_gpu_project_dir="/opt/elsewhere")
    assert (result.code, result.changed) == (0, 0)
    assert "There was nothing to remove" in result.output
    assert served.ssh.check_output("cat /opt/elsewhere/.env; rm -r /opt/elsewhere") == "HF_TOKEN=mine"


def test_other_containers_of_the_project_are_left_alone(served: GpuHost) -> None:
    served.ssh.check_output(
        "docker run --detach --name chat-db --label com.docker.compose.project=vllm-gpu --network vllm-gpu_default "
        "--entrypoint sleep vllm/vllm-openai:v0.32.0 3600"
    )
    try:
        result = tear_down(served)
        assert result.code == 0, result.output
        assert served.ssh.check_output("docker inspect --format '{{.State.Running}}' chat-db") == "true"
        assert "vllm-gpu_default" in served.ssh.check_output("docker network ls")
        assert served.container() == ""
    finally:
        served.ssh.check_output("docker rm --force chat-db; docker network rm vllm-gpu_default")


def test_a_stopped_docker_engine_does_not_count_as_no_server(served: GpuHost) -> None:
    before = served.files()
    served.ssh.check_output("mv /var/run/docker.sock /var/run/away.sock")
    try:
        result = tear_down(served)
    finally:
        served.ssh.check_output("mv /var/run/away.sock /var/run/docker.sock")
    assert result.code != 0
    assert "The Docker Engine can't be reached" in result.output
    assert served.files() == before


def freeze(pid: int) -> list[int]:
    """Stop a process and all its descendants; return their ids."""
    found = [pid]
    for process in found:  # which grows meanwhile
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGSTOP)
            for thread in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (thread / "children").read_text(encoding="ascii").split())
    return found


@contextlib.contextmanager
def stalled(host: GpuHost, log: Path, task: str) -> Iterator[subprocess.Popen[bytes]]:
    """A serve.yml onto GPU 1 that is stopped at a task for longer than its lease, and continues after the block."""
    with (
        log.open("wb") as output,
        subprocess.Popen(
            ["ansible-playbook", "serve.yml", "-e", "gpu_device_id=1"],
            cwd=ROOT, env=host.environment, stdout=output, stderr=subprocess.STDOUT,
        ) as play,
    ):  # fmt: skip
        while task not in log.read_text(encoding="utf-8"):
            assert play.poll() is None, log.read_text(encoding="utf-8")
            time.sleep(0.01)
        frozen = freeze(play.pid)
        # As if it stood still until its lease had expired.
        host.ssh.check_output(
            f"python3 -c \"import json; f = open('{LOCK}', 'r+'); lease = json.load(f); lease['until'] = 0; f.seek(0); "
            'f.write(json.dumps(lease).ljust(1024))"'
        )
        try:
            yield play
        finally:
            for process in reversed(frozen):
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGCONT)


@pytest.mark.parametrize("task", ["Clear earlier results]", "Bring the server up]"])
def test_a_stalled_play_leaves_the_server_of_the_next_play_alone(
    served: GpuHost, tmp_path: Path, task: str
) -> None:
    with stalled(served, tmp_path / "log", task) as play:
        served.serve("-e", '{"vllm_gpu_extra_args": ["--max-model-len", "512"]}', gpu_device_id=0)
        before = (served.container(), served.files())
    output = " ".join((tmp_path / "log").read_text(encoding="utf-8").split())
    assert play.returncode != 0
    assert "has taken this host's lock, because this play had stalled" in output
    assert "serves as before" not in output
    assert (served.container(), served.files()) == before


def test_a_stalled_play_continues_if_no_other_play_came(served: GpuHost, tmp_path: Path) -> None:
    with stalled(served, tmp_path / "log", "Bring the server up]") as play:
        pass
    assert play.returncode == 0, (tmp_path / "log").read_text(encoding="utf-8")
    assert served.served_gpu() == "1"


def test_leftovers_of_killed_plays_are_removed_by_the_next_change(served: GpuHost) -> None:
    planted = f"{DIRECTORY}/.vllm_gpu.abcdefgh {DIRECTORY}/.proven.kept {DIRECTORY}/.proven/state.killed"
    for playbook, code in (("serve.yml", 0), ("playbooks/teardown.yml", 0)):
        served.ssh.check_output(f"touch {planted}")
        result = served.play(playbook, gpu_device_id=0 if served.served_gpu() == "1" else 1)
        assert result.code == code, result.output
        assert served.ssh.run(f"ls -d {planted}").stdout == ""
