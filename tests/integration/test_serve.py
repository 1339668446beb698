"""serve.yml against a simulated GPU host: what it changes, and what it doesn't."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.gpu_host import DIRECTORY, ROOT, GpuHost, gpuhost


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


def test_check_mode_where_nothing_would_change(served: GpuHost) -> None:
    result = served.serve("--check", "--diff", gpu_device_id=0)
    assert result.changed == 0
    assert "nothing would change" in result.output


def test_a_second_run_changes_nothing(served: GpuHost) -> None:
    before = (served.container(), served.files())
    assert served.serve(gpu_device_id=0).changed == 0
    assert (served.container(), served.files()) == before


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


def test_an_existing_env_keeps_its_keys_comments_and_order(clean_host: GpuHost) -> None:
    mine = "# by hand\nMY_KEY='keep $me'\nexport GPU_DEVICE_ID=0\n\n# last\nVLLM_PORT=8000 # usual\nZ=\xe4"
    clean_host.look.check_output(f"mkdir -p {DIRECTORY}")
    clean_host.look.run(f"printf '%s' {shell(mine)} > {DIRECTORY}/.env")
    clean_host.serve(gpu_device_id=1)
    lines = clean_host.look.check_output(f"cat {DIRECTORY}/.env").splitlines()
    assert lines[:7] == mine.replace("ID=0", "ID=1").splitlines()
    assert clean_host.served_gpu() == "1"
    assert clean_host.look.file(f"{DIRECTORY}/.env").mode == 0o600


def test_a_comment_in_env_does_not_recreate_the_server(served: GpuHost) -> None:
    before = served.container()
    served.look.check_output(f"echo '# a note' >> {DIRECTORY}/.env")
    # Only the record of what was proven is made anew, with the note in it.
    assert served.serve(gpu_device_id=0).changed == 1
    assert served.serve(gpu_device_id=0).changed == 0
    assert served.container() == before
    assert "# a note" in served.look.check_output(f"cat {DIRECTORY}/.env")


def test_a_key_of_mine_that_compose_reads_recreates_it(served: GpuHost) -> None:
    before = served.container()
    served.look.check_output(f"sed -i s/^HF_TOKEN=.*/HF_TOKEN=hf_mine/ {DIRECTORY}/.env")
    served.serve(gpu_device_id=0)
    assert served.container() != before
    assert "HF_TOKEN=hf_mine" in served.look.check_output(f"cat {DIRECTORY}/.env")


def test_files_without_their_server_are_finished_by_the_next_run(served: GpuHost) -> None:
    # As after a play that was killed between writing and recreating.
    served.look.check_output(f"sed -i s/^GPU_DEVICE_ID=.*/GPU_DEVICE_ID=1/ {DIRECTORY}/.env")
    assert served.served_gpu() == "0"
    served.serve(gpu_device_id=1)
    assert served.served_gpu() == "1"


@pytest.mark.parametrize("spelling", ["UUID", "short"])
def test_every_spelling_of_a_card_becomes_its_uuid(served: GpuHost, spelling: str) -> None:
    ask = "nvidia-smi -i 1 --query-gpu=uuid,pci.bus_id --format=csv,noheader"
    uuid, bus = served.look.check_output(ask).strip().split(", ")
    named = {"UUID": uuid.upper(), "short": bus.removeprefix("00000000:")}
    variables = json.dumps({"gpu_device_id": named[spelling]})
    served.serve("-e", variables)
    assert served.served_gpu() == "1"
    requests = served.look.check_output("docker inspect -f '{{json .HostConfig.DeviceRequests}}' vllm-server")
    assert f'"DeviceIDs":["{uuid}"]' in requests
    assert f"\nGPU_DEVICE_ID={uuid}\n" in served.look.check_output(f"cat {DIRECTORY}/.env")
    assert served.serve("-e", variables).changed == 0


def test_the_wait_goes_on_while_the_model_loads_and_says_so(served: GpuHost) -> None:
    served.fault("start_delay=20")
    result = served.serve(gpu_device_id=1)
    assert f"{served.name}: " in result.output
    assert "waiting: " in result.output
    assert "Loading safetensors" in result.output
    assert served.served_gpu() == "1"


def test_an_image_that_is_there_is_not_pulled(served: GpuHost) -> None:
    gpuhost("load", served.name, "vllm/vllm-openai:v0.31.0")
    result = served.serve(gpu_device_id=0, vllm_gpu_image="vllm/vllm-openai:v0.31.0")
    assert "Pull " not in result.output
    assert served.look.check_output("docker inspect -f '{{.Config.Image}}' vllm-server") == (
        "vllm/vllm-openai:v0.31.0"
    )


def test_extra_arguments_reach_the_server_word_by_word(served: GpuHost) -> None:
    words = ["--served-model-name", "my chat", "it's", "--max-model-len", "512"]
    served.serve("-e", f'{{"vllm_gpu_extra_args": {words!r}}}'.replace("'", '"').replace('it"s', "it's"))
    arguments = served.look.check_output("docker inspect -f '{{json .Args}}' vllm-server")
    assert '"--served-model-name","my chat","it\'s","--max-model-len","512"' in arguments
    models = served.look.check_output("curl -s http://127.0.0.1:8000/v1/models")
    assert '"id":"my chat"' in models


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("GPU_DEVICE_ID", "0"),
        ("VLLM_API_KEY", "sk-exported-0815"),
        ("DOCKER_TLS_VERIFY", "1"),
        ("DOCKER_HOST", "tcp://192.0.2.1:2376"),
    ],
)
def test_what_the_host_exports_does_not_beat_the_inventory(
    served: GpuHost, tmp_path: Path, key: str, value: str
) -> None:
    playbook = exporting(tmp_path, key, value)
    result = served.play(str(playbook), gpu_device_id=1)
    assert result.code == 0, result.output
    assert served.served_gpu() == "1"


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
    clean_host.look.check_output(
        "for i in $(seq 100); do curl -sf 127.0.0.1:8000/health && break; sleep 0.2; done"
    )
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


@pytest.fixture
def foreign(clean_host: GpuHost) -> Iterator[GpuHost]:
    """A host where somebody else's container has the server's name."""
    clean_host.look.check_output(
        "docker run -d --name vllm-server --entrypoint sleep vllm/vllm-openai:v0.32.0 600"
    )
    yield clean_host
    clean_host.look.check_output("docker rm -f vllm-server")


def test_a_container_of_somebody_else_is_left_alone(foreign: GpuHost) -> None:
    before = foreign.container()
    output = foreign.fail_to_serve(gpu_device_id=1)
    assert "exists already, of no Compose project" in output
    assert "docker rm -f vllm-server" in output
    assert foreign.container() == before
    assert not foreign.look.file(DIRECTORY).exists


def test_a_server_started_from_another_directory_is_left_alone(clean_host: GpuHost) -> None:
    """Its files are not here, so that it could not be gone back to."""
    clean_host.serve(gpu_device_id=0)
    before = clean_host.container()
    output = clean_host.fail_to_serve(gpu_device_id=1, vllm_gpu_project_dir="/opt/elsewhere")
    assert f"started from {DIRECTORY} and not from /opt/elsewhere" in output
    assert clean_host.container() == before
    assert not clean_host.look.file("/opt/elsewhere").exists


def test_other_peoples_containers_of_the_same_project_are_left_alone(served: GpuHost) -> None:
    served.look.check_output(
        "docker run --detach --name chat-db --label com.docker.compose.project=vllm-gpu --entrypoint sleep "
        "vllm/vllm-openai:v0.32.0 3600"
    )
    before = served.container()
    try:
        output = served.fail_to_serve(gpu_device_id=1)
        assert (
            "The Compose project vllm-gpu on this host has containers that are not this role's: chat-db."
            in output
        )
        assert served.container() == before
    finally:
        served.look.check_output("docker rm --force chat-db")


@pytest.mark.parametrize("name", ["gpu_id", "GPU_DEVICE_ID", "vllm_gpu_modle"])
def test_a_variable_of_no_meaning_is_refused(served: GpuHost, name: str) -> None:
    """What is passed over in silence lets the server go, or seem to be, where nobody asked for."""
    before = (served.container(), served.files())
    for playbook in ("serve.yml", "playbooks/verify.yml"):
        result = served.play(playbook, "-e", f"{name}=1")
        assert result.code != 0
        assert f"{name} is not a variable of this role" in " ".join(result.output.split())
    assert (served.container(), served.files()) == before


def test_an_inventory_that_is_not_there_is_no_empty_fleet(served: GpuHost) -> None:
    assert "nowhere.yml" in served.fail_to_serve("--inventory", "nowhere.yml")


def test_a_broken_env_is_refused_without_quoting_it(served: GpuHost) -> None:
    before = served.container()
    served.look.check_output(f'echo "MY_SECRET=\'s3cr3t-never-closed" >> {DIRECTORY}/.env')
    output = served.fail_to_serve(gpu_device_id=1)
    assert "the quote after MY_SECRET= is never closed" in output
    assert "s3cr3t" not in output
    assert served.container() == before
    served.look.check_output(f"sed -i '/MY_SECRET/d' {DIRECTORY}/.env")


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


def test_verify_changes_nothing_and_says_where_the_server_is(served: GpuHost) -> None:
    before = (served.container(), served.files())
    result = served.play("playbooks/verify.yml")
    assert result.code == 0, result.output
    assert result.changed == 0
    assert "runs on GPU 0" in result.output
    assert (served.container(), served.files()) == before


def test_verify_judges_what_was_installed_unless_told_otherwise(served: GpuHost) -> None:
    served.serve(gpu_device_id=1)
    assert served.play("playbooks/verify.yml").code == 0
    result = served.play("playbooks/verify.yml", gpu_device_id=0)
    assert result.code != 0
    assert "runs on GPU 1" in result.output
    assert "not on GPU 0" in result.output


def test_verify_fails_when_the_server_is_gone_or_unlike_its_files(served: GpuHost) -> None:
    served.look.check_output(f"sed -i s/^GPU_DEVICE_ID=.*/GPU_DEVICE_ID=1/ {DIRECTORY}/.env")
    result = served.play("playbooks/verify.yml")
    assert result.code != 0
    assert "made from other settings" in result.output
    served.look.check_output("docker stop vllm-server")
    result = served.play("playbooks/verify.yml")
    assert result.code != 0
    assert "The container is exited" in result.output


def test_a_server_that_was_moved_by_hand_is_moved_back(served: GpuHost) -> None:
    """The files are as they were when they were proven; the container is not."""
    served.look.check_output(
        f"cd {DIRECTORY} && GPU_DEVICE_ID=1 docker compose -f docker-compose.serving.yml up -d"
    )
    result = served.play("playbooks/verify.yml")
    assert result.code != 0
    assert "made from other settings" in result.output
    served.serve(gpu_device_id=0)
    assert served.served_gpu() == "0"


def test_what_another_version_of_compose_hashed_is_no_reason_to_doubt(served: GpuHost) -> None:
    """As after an upgrade of Compose: the files are those that were proven, their hash then was another."""
    served.look.check_output(
        f'cd {DIRECTORY}/.proven/current && sed -i \'s/"config_hash": "[0-9a-f]*/&0/\' record.json'
    )
    served.look.check_output("docker rm --force vllm-server")
    assert served.serve(gpu_device_id=0, vllm_gpu_start_timeout=30).changed
    assert served.served_gpu() == "0"
    assert served.serve(gpu_device_id=0).changed == 0


def test_a_longer_patience_does_not_restart_the_server(served: GpuHost) -> None:
    before = served.container()
    assert served.serve(gpu_device_id=0, vllm_gpu_start_timeout=3600).changed == 0
    assert served.container() == before


def test_caches_may_be_directories_of_another_user(served: GpuHost) -> None:
    served.look.check_output("install -d -o 1000 -m 0700 /srv/hf")
    served.serve(gpu_device_id=0, vllm_gpu_hf_cache="/srv/hf")
    served.look.check_output("docker exec vllm-server sh -c 'echo x > /root/.cache/huggingface/x'")


def test_a_stopped_server_is_started_again(served: GpuHost) -> None:
    served.look.check_output("docker stop vllm-server")
    time.sleep(1)
    served.serve(gpu_device_id=0)
    assert served.served_gpu() == "0"


def shell(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def exporting(directory: Path, key: str, value: str) -> Path:
    """A play in whose environment the host exports a key, as /etc/environment would."""
    playbook = directory / "exporting.yml"
    playbook.write_text(
        "- hosts: vllm_gpu\n  gather_facts: false\n  become: true\n"
        f"  environment: {{{key}: '{value}'}}\n"
        "  roles: [mlops.vllm_gpu.vllm_gpu]\n",
        encoding="utf-8",
    )
    return playbook


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


def test_a_text_does_where_a_list_is_asked_for(served: GpuHost) -> None:
    """As `-e key=value` gives it, and as one writes it in a hurry: never letter by letter."""
    served.serve("-e", '{"vllm_gpu_extra_args": "--served-model-name \'my chat\' --max-model-len 512"}')
    arguments = served.look.check_output("docker inspect -f '{{json .Args}}' vllm-server")
    assert '"--served-model-name","my chat","--max-model-len","512"' in arguments
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_training_gpus="10,1")
    assert "is set aside for training" in output
    served.serve(
        "-e", '{"gpu_device_id": 1, "vllm_gpu_training_gpus": "1", "vllm_gpu_force": "training,drift"}'
    )
    assert served.play("playbooks/rollback.yml", vllm_gpu_force="drift").code == 0


def test_no_restart_may_be_written_as_yaml_has_it(served: GpuHost) -> None:
    served.serve("-e", '{"vllm_gpu_restart": false}')
    policy = served.look.check_output("docker inspect -f '{{.HostConfig.RestartPolicy.Name}}' vllm-server")
    assert policy == "no"


def test_a_compose_file_without_ports_is_put_right(served: GpuHost) -> None:
    served.look.check_output(
        f"cd {DIRECTORY} && sed -i 's/^    ports:/    network_mode: host/; /VLLM_BIND_ADDRESS/d' docker-compose.serving.yml"
    )
    result = served.play("playbooks/verify.yml")
    assert "has been edited by hand" in " ".join(result.output.split())
    served.serve(gpu_device_id=1)
    assert served.served_gpu() == "1"
