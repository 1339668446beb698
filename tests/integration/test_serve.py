"""serve.yml against a simulated GPU host: what it changes, and what it doesn't."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, Result


def test_check_mode_on_a_host_that_was_never_provisioned(clean_host: GpuHost) -> None:
    result = clean_host.serve("--check", "--diff", gpu_device_id=1)
    assert "the container would be created on GPU 1 (NVIDIA GeForce RTX 5060 Ti)" in result.output
    assert f"{DIRECTORY}/.env is new" in result.output
    assert "+GPU_DEVICE_ID=1" in result.output
    assert not clean_host.look.file(DIRECTORY).exists
    assert clean_host.container() == ""


def test_check_mode_on_a_provisioned_host(served: GpuHost) -> None:
    before = (served.container(), served.files())
    result = served.serve("--check", "--diff", gpu_device_id=1)
    assert "GPU 0 → 1; the container would be recreated" in result.output
    assert "-GPU_DEVICE_ID=0" in result.output
    assert "+GPU_DEVICE_ID=1" in result.output
    assert (served.container(), served.files()) == before


def test_a_second_run_changes_nothing(served: GpuHost) -> None:
    before = (served.container(), served.files())
    assert served.serve(gpu_device_id=0).changed == 0
    plan = served.serve("--check", "--diff", gpu_device_id=0)
    assert plan.changed == 0
    assert "nothing would change" in plan.output
    # Longer patience is no other server.
    assert served.serve(gpu_device_id=0, vllm_gpu_start_timeout=3600).changed == 0
    assert (served.container(), served.files()) == before


def test_a_comment_in_env_does_not_recreate_the_server(served: GpuHost) -> None:
    before = served.container()
    served.look.check_output(f"echo '# a note' >> {DIRECTORY}/.env")
    # Only the record of what was proven is made anew, with the note in it.
    assert served.serve(gpu_device_id=0).changed == 1
    assert served.serve(gpu_device_id=0).changed == 0
    assert served.container() == before
    assert "# a note" in served.look.check_output(f"cat {DIRECTORY}/.env")


def test_every_spelling_of_a_card_becomes_its_uuid(served: GpuHost) -> None:
    ask = "nvidia-smi -i 1 --query-gpu=uuid,pci.bus_id --format=csv,noheader"
    uuid, bus = served.look.check_output(ask).strip().split(", ")
    served.serve("-e", json.dumps({"gpu_device_id": bus.removeprefix("00000000:")}))
    assert served.served_gpu() == "1"
    requests = served.look.check_output("docker inspect -f '{{json .HostConfig.DeviceRequests}}' vllm-server")
    assert f'"DeviceIDs":["{uuid}"]' in requests
    assert f"\nGPU_DEVICE_ID={uuid}\n" in served.look.check_output(f"cat {DIRECTORY}/.env")
    assert served.serve("-e", json.dumps({"gpu_device_id": uuid.upper()})).changed == 0


def test_extra_arguments_and_caches_reach_the_server(served: GpuHost) -> None:
    served.look.check_output("install -d -o 1000 -m 0700 /srv/hf")
    for words in (["--served-model-name", "my chat", "it's"], "--served-model-name 'my chat' 'it'\\''s'"):
        variables = {"gpu_device_id": 0, "vllm_gpu_extra_args": words, "vllm_gpu_hf_cache": "/srv/hf"}
        served.serve("-e", json.dumps(variables))
        arguments = served.look.check_output("docker inspect -f '{{json .Args}}' vllm-server")
        assert '"--served-model-name","my chat","it\'s"' in arguments
    served.look.check_output("docker exec vllm-server sh -c 'echo x > /root/.cache/huggingface/x'")
    assert '"id":"my chat"' in served.look.check_output("curl -s http://127.0.0.1:8000/v1/models")


def test_what_the_host_exports_does_not_beat_the_inventory(served: GpuHost, tmp_path: Path) -> None:
    """A play in whose environment the host exports keys, as /etc/environment would."""
    exported = {
        "GPU_DEVICE_ID": "0",
        "VLLM_API_KEY": "sk-exported-0815",
        "DOCKER_TLS_VERIFY": "1",
        "DOCKER_HOST": "tcp://192.0.2.1:2376",
    }
    play = {
        "hosts": "vllm_gpu",
        "gather_facts": False,
        "environment": exported,
        "roles": ["mlops.vllm_gpu.vllm_gpu"],
    }
    (tmp_path / "exporting.yml").write_text(json.dumps([play]), encoding="utf-8")
    result = served.play(str(tmp_path / "exporting.yml"), gpu_device_id=1)
    assert result.code == 0, result.output
    assert served.served_gpu() == "1"
    assert "VLLM_API_KEY=\n" in served.look.check_output(f"cat {DIRECTORY}/.env")


def test_verify_judges_what_was_installed_and_changes_nothing(served: GpuHost) -> None:
    before = (served.container(), served.files())

    def verify(**variables: object) -> Result:
        result = served.play("playbooks/verify.yml", **variables)
        return Result(result.code, " ".join(result.output.split()))

    result = verify()
    assert (result.code, result.changed) == (0, 0)
    assert "runs on GPU 0" in result.output
    result = verify(gpu_device_id=1)
    assert result.code != 0
    assert re.search("runs on GPU 0 .*not on GPU 1", result.output)
    result = verify(vllm_gpu_modle=1)
    assert result.code != 0
    assert "vllm_gpu_modle is not a variable of this role" in result.output
    assert (served.container(), served.files()) == before


def test_a_server_that_was_moved_by_hand_is_moved_back(served: GpuHost) -> None:
    """The files are as they were when they were proven; the container is not."""
    served.look.check_output(
        f"cd {DIRECTORY} && GPU_DEVICE_ID=1 docker compose -f docker-compose.serving.yml up -d"
    )
    result = served.play("playbooks/verify.yml")
    assert result.code != 0
    assert "created from other settings" in result.output
    served.serve(gpu_device_id=0)
    assert served.served_gpu() == "0"


def test_a_user_who_has_sudo_serves_as_root_does(clean_host: GpuHost) -> None:
    assert clean_host.serve(ansible_user="ops", gpu_device_id=1).changed > 0
    assert clean_host.served_gpu() == "1"
    for file in clean_host.look.file(DIRECTORY).listdir():
        assert clean_host.look.file(f"{DIRECTORY}/{file}").user == "root"
    assert clean_host.serve(ansible_user="ops", gpu_device_id=1).changed == 0
    # Whoever comes next: the files are the same ones.
    assert clean_host.serve(gpu_device_id=1).changed == 0
    for playbook in ("verify", "status", "preflight", "teardown"):
        result = clean_host.play(f"playbooks/{playbook}.yml", ansible_user="ops")
        assert result.code == 0, result.output
    assert clean_host.container() == ""


def test_a_user_of_the_engine_who_is_not_root_is_told_so(clean_host: GpuHost) -> None:
    clean_host.look.check_output("chmod 666 /var/run/docker.sock")
    try:
        output = clean_host.fail_to_serve(ansible_user="ops", ansible_become="false", gpu_device_id=1)
    finally:
        clean_host.look.check_output("chmod 660 /var/run/docker.sock")
    assert "The play must be root on this host: add -K" in " ".join(output.split())
    assert clean_host.container() == ""
    assert not clean_host.look.file(DIRECTORY).exists


def test_a_user_who_may_not_is_told_so(served: GpuHost) -> None:
    before = (served.container(), served.files())
    served.look.check_output("cp -p /etc/sudoers /root/; echo 'root ALL=(ALL) ALL' > /etc/sudoers")
    try:
        output = served.fail_to_serve(ansible_user="ops", gpu_device_id=1)
    finally:
        served.look.check_output("mv /root/sudoers /etc/sudoers")
    assert "Missing sudo password" in output, output
    assert (served.container(), served.files()) == before


def test_the_inventory_names_any_environment_variable_of_the_server(served: GpuHost) -> None:
    variables = {
        "vllm_gpu_env": {"HF_ENDPOINT": "https://hub.example.com", "MY_FLAG": "a b$c"},
        "vllm_gpu_secret_env": {"MY_TOKEN": "tok$en-12345678"},
    }
    output = served.serve("-e", json.dumps(variables), "--diff", gpu_device_id=1).output
    assert "tok$en" not in output
    assert "MY_FLAG='a b$c'" in output
    environment = served.look.check_output("docker exec vllm-server env").splitlines()
    assert {"HF_ENDPOINT=https://hub.example.com", "MY_FLAG=a b$c", "MY_TOKEN=tok$en-12345678"} <= {
        *environment
    }
    assert served.serve("-e", json.dumps(variables), gpu_device_id=1).changed == 0
    # Without them, neither the server nor the file has them any more; what somebody adds by hand is told.
    served.look.check_output(f"echo HF_HUB_OFFLINE=1 >> {DIRECTORY}/.env")
    output = " ".join(served.serve(gpu_device_id=1).output.split())
    assert "Note: HF_HUB_OFFLINE in .env has no effect" in output
    assert not {"MY_FLAG", "MY_TOKEN", "HF_HUB_OFFLINE"} & {
        line.partition("=")[0]
        for line in served.look.check_output("docker exec vllm-server env").splitlines()
    }
    assert "MY_TOKEN" not in served.look.check_output(f"cat {DIRECTORY}/.env")


@pytest.fixture
def earlier(clean_host: GpuHost) -> GpuHost:
    """A server on GPU 0 as version 0.1 set it up: the Compose project vllm, and volumes that have its name."""
    clean_host.serve(gpu_device_id=0)
    clean_host.look.check_output(
        f"cd {DIRECTORY} && docker rm -f vllm-server && docker volume ls -q | xargs -r docker volume rm && "
        "docker network prune -f && "
        "sed -i '/^    name: /d' docker-compose.serving.yml && rm -r .proven && "
        "sed -i 's/^COMPOSE_PROJECT_NAME=.*/COMPOSE_PROJECT_NAME=vllm/; /^VLLM_VOLUME_PREFIX=/d' .env && "
        "docker compose -f docker-compose.serving.yml up -d && "
        "docker exec vllm-server sh -c 'echo weights > /root/.cache/huggingface/weights'"
    )
    clean_host.wait_healthy()
    return clean_host


def test_a_server_of_the_earlier_project_moves_over_with_its_volumes(earlier: GpuHost) -> None:
    before = earlier.container()
    plan = earlier.serve("--check", gpu_device_id=0).output
    assert "as its Compose project is called vllm-gpu now" in " ".join(plan.split())
    # A move that fails is undone like any change.
    output = earlier.fail_to_serve(gpu_device_id=0, vllm_gpu_model="acme/does-not-exist")
    assert "serves as before" in output
    label = "docker inspect -f '{{index .Config.Labels \"com.docker.compose.project\"}}' vllm-server"
    assert earlier.look.check_output(label) == "vllm"
    earlier.serve(gpu_device_id=0)
    assert earlier.look.check_output(label) == "vllm-gpu"
    assert earlier.container() != before
    assert "weights" in earlier.look.check_output(
        "docker exec vllm-server cat /root/.cache/huggingface/weights"
    )
    assert "vllm_default" not in earlier.look.check_output("docker network ls").split()
    assert earlier.serve(gpu_device_id=0).changed == 0


def test_hosts_without_gpu_or_engine_are_told_what_to_do() -> None:
    done = subprocess.run(
        # Wherever this runs, nothing may come of it.
        [ROOT / ".venv/bin/ansible-playbook", "serve.yml", "--check", "-e", "gpu_device_id=1"],
        env={"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]},
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode != 0
    assert "nvidia-smi is not installed" in done.stdout
    assert "localhost was left as it is" in done.stdout


def test_what_another_version_of_compose_hashed_is_no_reason_to_doubt(served: GpuHost) -> None:
    """As after an upgrade of Compose: the files are those that were proven, their hash then was another."""
    served.look.check_output(
        f'cd {DIRECTORY}/.proven/current && sed -i \'s/"config_hash": "[0-9a-f]*/&0/\' record.json'
    )
    served.look.check_output("docker rm --force vllm-server")
    assert served.serve(gpu_device_id=0, vllm_gpu_start_timeout=30).changed
    assert served.served_gpu() == "0"
    assert served.serve(gpu_device_id=0).changed == 0


def test_a_stopped_server_is_started_again(served: GpuHost) -> None:
    served.look.check_output("docker stop vllm-server")
    time.sleep(1)
    served.serve(gpu_device_id=0)
    assert served.served_gpu() == "0"


def test_status_tells_each_state_in_a_terminal_of_80_columns(served: GpuHost, tmp_path: Path) -> None:
    lost = tmp_path / "hosts.yml"
    lost.write_text("vllm_gpu:\n  hosts:\n    the-lost-host: {ansible_host: 127.0.0.1, ansible_port: 1}\n")

    def status() -> str:
        result = served.play("playbooks/status.yml", "-i", str(served.inventory), "-i", str(lost))
        assert result.code == 0, result.output
        assert not re.search(r"changed=[1-9]", result.output)
        return result.output[result.output.index("HOST ") :].split("PLAY RECAP")[0]

    table = status()
    assert re.search(rf"^ *{served.name} +0 GeForce RTX 5090 +proven +Qwen/Qwen3-0.6B$", table, re.MULTILINE)
    assert re.search(r"^ *the-lost-host +- +unreachable +see the error above$", table, re.MULTILINE)
    assert "1 of 2 hosts has a proven server." in table
    served.look.check_output("docker stop vllm-server")
    table = status()
    assert re.search(rf"^ *{served.name} +0 GeForce RTX 5090 +NOT PROVEN$", table, re.MULTILINE)
    assert re.search(r"^ +The container is exited, not running\.$", table, re.MULTILINE)
    assert "ansible-playbook -i INVENTORY playbooks/verify.yml -l HOST" in table
    assert max(map(len, table.splitlines())) <= 80, table
    served.look.check_output("docker rm vllm-server")
    for _ in ("its files are there", "not even those"):
        assert re.search(rf"^ *{served.name} +- +no server$", status(), re.MULTILINE)
        served.look.check_output(f"rm -rf {DIRECTORY}")


def test_where_docker_points_to_does_not_matter(served: GpuHost) -> None:
    """Cards, container and compose are of this very host, whatever context its user works with."""
    served.look.check_output(
        "docker context create elsewhere --docker host=unix:///nowhere.sock && docker context use elsewhere"
    )
    try:
        served.serve(gpu_device_id=1)
        output = served.fail_to_serve(gpu_device_id=0, vllm_gpu_model="acme/does-not-exist")
        assert "serves as before" in output
        assert served.play("playbooks/teardown.yml").code == 0
    finally:
        served.look.check_output("docker context use default && docker context rm elsewhere")
    assert served.container() == ""
