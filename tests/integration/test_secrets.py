"""A planted secret is found in no output, diff, process list, log or artifact."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import ansible_runner
import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost

KEY = "sk-planted-4f9c1d"
TOKEN = "hf_planted_b7e2a0"
MINE = "planted-by-hand-93ad"


@pytest.fixture
def vault(tmp_path: Path) -> str:
    """Variables in a file, as from a vault, never on the command line."""
    path = tmp_path / "vault.yml"
    path.write_text(f"vllm_gpu_api_key: {KEY}\nvllm_gpu_hf_token: {TOKEN}\n", encoding="utf-8")
    return f"@{path}"


def test_secrets_reach_the_server_and_nothing_else(clean_host: GpuHost, vault: str) -> None:
    clean_host.ssh.check_output(f"mkdir -p {DIRECTORY} && echo MY_SECRET={MINE} > {DIRECTORY}/.env")
    seen: list[str] = []
    done = threading.Event()

    def watch_processes() -> None:
        while not done.is_set():
            # The controller's processes and the host's, which is a container of this machine.
            seen.append(subprocess.check_output(["ps", "-eo", "args"], text=True))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch_processes)
    watcher.start()
    try:
        outputs = [
            clean_host.serve("-e", vault, "--check", "--diff", "-vvvvv", gpu_device_id=1).output,
            clean_host.serve("-e", vault, "--diff", "-vvvvv", gpu_device_id=1).output,
            clean_host.serve("-e", vault, "--diff", "-vvvvv", gpu_device_id=0).output,
            clean_host.play("playbooks/verify.yml", "-e", vault, "-vvvvv").output,
        ]
        # A failing run prints the most.
        clean_host.fault("crash=traceback")
        outputs.append(clean_host.fail_to_serve("-e", vault, "--diff", "-vvvvv", gpu_device_id=1))
    finally:
        done.set()
        watcher.join()
    assert any("docker compose" in listing or "compose --" in listing for listing in seen)
    for secret in (KEY, TOKEN, MINE):
        for text in [*outputs, *seen]:
            assert secret not in text
        # The server has it, so the search was for the right text.
        assert secret in clean_host.ssh.check_output(f"cat {DIRECTORY}/.env")
    env = clean_host.ssh.file(f"{DIRECTORY}/.env")
    assert (env.mode, env.user, env.group) == (0o600, "root", "root")
    # Of the files only .env and its copies hold them, and only root may read those.
    kept = f"grep -rlE '{KEY}|{TOKEN}|{MINE}' {DIRECTORY} /run/vllm_gpu.lock /var/log /tmp 2>/dev/null"
    for name in clean_host.ssh.run(kept).stdout.split():
        assert name.endswith("/.env"), name
        assert clean_host.ssh.file(name).mode == 0o600
    assert clean_host.ssh.file(f"{DIRECTORY}/.proven").mode == 0o700
    clean_host.cure()


def test_secrets_are_in_no_artifact_of_the_runner(clean_host: GpuHost, vault: str, tmp_path: Path) -> None:
    (tmp_path / "runner").mkdir()
    run = ansible_runner.run(
        private_data_dir=str(tmp_path / "runner"),
        project_dir=str(ROOT),
        playbook="serve.yml",
        inventory=str(clean_host.inventory),
        cmdline=f"-e {vault} -e gpu_device_id=1 --diff",
        envvars={
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        },
        verbosity=5,
        quiet=True,
    )
    assert run.status == "successful"
    artifacts = [path for path in (tmp_path / "runner/artifacts").rglob("*") if path.is_file()]
    assert len(artifacts) > 5
    for path in artifacts:
        text = path.read_text(encoding="utf-8", errors="replace")
        assert KEY not in text, path
        assert TOKEN not in text, path


def test_log_lines_leave_the_host_without_secrets_and_control_characters(served: GpuHost) -> None:
    """Even of a key that only the host's .env has, and no variable of the play."""
    served.ssh.check_output(f"sed -i s/^VLLM_API_KEY=.*/VLLM_API_KEY={KEY}/ {DIRECTORY}/.env")
    served.fault("log_secret=1", "log_escape=1", "health=503")
    output = served.fail_to_serve("-vvvvv", gpu_device_id=1, vllm_gpu_start_timeout=5)
    served.cure()
    assert KEY not in output
    assert "VLLM_API_KEY=********" in output
    assert "owned" in output
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", output)


def test_a_key_is_required_kept_changed_and_removed(served: GpuHost, vault: str) -> None:
    def models(key: str) -> str:
        request = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1:8000/v1/models"
        return str(served.ssh.check_output(f"{request} -H 'Authorization: Bearer {key}'"))

    served.serve("-e", vault, gpu_device_id=0)
    assert (models("none"), models(KEY)) == ("401", "200")
    # A second run knows the key from the host's .env, and changes nothing.
    assert served.serve(gpu_device_id=0).changed == 0
    # Changed in .env by hand: the next run applies it, and keeps it; dollar signs are literal.
    served.ssh.check_output(
        f"sed -i \"s/^VLLM_API_KEY=.*/VLLM_API_KEY='\\$\\${{x}}by-hand-1234'/\" {DIRECTORY}/.env"
    )
    served.serve(gpu_device_id=0)
    assert (models(KEY), models("$${x}by-hand-1234")) == ("401", "200")
    assert served.serve(gpu_device_id=0).changed == 0
    served.serve(gpu_device_id=0, vllm_gpu_api_key="")
    assert "VLLM_API_KEY=\n" in served.ssh.check_output(f"cat {DIRECTORY}/.env")
    assert models("none") == "200"
