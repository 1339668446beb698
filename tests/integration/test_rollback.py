"""Going back: by hand, after a failure, and what drift and a lost mode do."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

from tests.faults.test_matrix import kill, while_it_runs
from tests.gpu_host import DIRECTORY, ROOT, GpuHost, gpuhost


def test_rollback_goes_back_and_forth_between_the_last_two_proven_states(clean_host: GpuHost) -> None:
    clean_host.serve(gpu_device_id=0)
    result = clean_host.play("playbooks/rollback.yml")
    assert result.code != 0
    assert "has no previous proven state: it was left as it is" in result.output
    clean_host.serve(gpu_device_id=1)
    first = clean_host.look.check_output(f"cat {DIRECTORY}/.env")
    for gpu in ("0", "1", "0"):
        result = clean_host.play("playbooks/rollback.yml")
        assert result.code == 0, result.output
        assert clean_host.served_gpu() == gpu
        assert f"runs on GPU {gpu}" in result.output
    clean_host.play("playbooks/rollback.yml")
    assert clean_host.look.check_output(f"cat {DIRECTORY}/.env") == first


def test_going_back_is_refused_before_the_server_stops(clean_host: GpuHost) -> None:
    clean_host.serve(gpu_device_id=0)
    clean_host.serve(gpu_device_id=1)
    before = clean_host.container()
    plan = clean_host.play("playbooks/rollback.yml", "--check")
    assert plan.code == 0, plan.output
    assert "Qwen/Qwen3-0.6B would be served on GPU 0 (NVIDIA GeForce RTX 5090) again" in plan.output
    gpuhost("tenant", clean_host.name, "--card", "0", "--mib", "20000")
    try:
        refused = clean_host.play("playbooks/rollback.yml")
        assert refused.code != 0
        assert "was left as it is, because:" in refused.output
        assert "MiB free" in refused.output
    finally:
        gpuhost("tenant", clean_host.name, "--stop")
    assert clean_host.container() == before
    assert clean_host.play("playbooks/rollback.yml").code == 0
    assert clean_host.served_gpu() == "0"


def test_a_note_in_env_is_no_state_to_go_back_to(clean_host: GpuHost) -> None:
    clean_host.serve(gpu_device_id=0)
    clean_host.serve(gpu_device_id=1)
    clean_host.look.check_output(f"echo '# a note' >> {DIRECTORY}/.env")
    clean_host.serve(gpu_device_id=1)
    assert clean_host.play("playbooks/rollback.yml").code == 0
    assert clean_host.served_gpu() == "0"


def test_a_first_deployment_that_fails_leaves_nothing(clean_host: GpuHost) -> None:
    directory = "/srv/new/vllm"
    output = clean_host.fail_to_serve(
        gpu_device_id=1, vllm_gpu_model="acme/does-not-exist", vllm_gpu_project_dir=directory
    )
    assert "integration had no server before, and has none now." in output
    assert f"Removed: {directory}/docker-compose.serving.yml, {directory}/.env, " in output
    assert "the container that failed, the network vllm-gpu_default" in output
    assert "new volumes vllm-gpu_huggingface-cache" in output
    assert (
        clean_host.look.check_output("docker ps -aq; docker network ls -qf name=vllm; ls -d /srv/new || true")
        == ""
    )


def test_a_server_that_was_never_recorded_is_gone_back_to(served: GpuHost) -> None:
    """As a person leaves it who uses the files by hand, or a play that was killed before its end."""
    served.look.check_output(f"rm -r {DIRECTORY}/.proven")
    before = served.look.check_output(f"cat {DIRECTORY}/.env")
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_model="acme/does-not-exist")
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 0" in output
    assert served.served_gpu() == "0"
    assert served.look.check_output(f"cat {DIRECTORY}/.env") == before


def test_a_lost_mode_is_mended_without_a_restart(served: GpuHost) -> None:
    before = served.container()
    served.look.check_output(f"chmod 644 {DIRECTORY}/.env && rm {DIRECTORY}/check_gpu_allocation.sh")
    served.serve(gpu_device_id=0)
    assert served.look.file(f"{DIRECTORY}/.env").mode == 0o600
    assert served.look.file(f"{DIRECTORY}/check_gpu_allocation.sh").mode == 0o755
    assert served.container() == before


def test_an_index_that_means_another_card_after_a_reboot_is_reported(served: GpuHost, tmp_path: Path) -> None:
    cards = (ROOT / "molecule/simulated_host/cards.json").read_text(encoding="utf-8")
    swapped = cards.replace("01:00.0", "xx").replace("05:00.0", "01:00.0").replace("xx", "05:00.0")
    path = tmp_path / "cards.json"
    path.write_text(swapped, encoding="utf-8")
    gpuhost("cards", served.name, str(path))
    try:
        served.look.check_output("docker restart vllm-server")
        served.look.check_output(
            "for i in $(seq 50); do curl -sf 127.0.0.1:8000/health && break; sleep 0.2; done"
        )
        for playbook in ("serve.yml", "playbooks/verify.yml"):
            result = served.play(playbook, gpu_device_id=0)
            assert result.code != 0, result.output
            assert "GPU 0 is another card than it was" in result.output
        assert served.play("playbooks/verify.yml").code != 0
        referee = served.look.run(f"{DIRECTORY}/check_gpu_allocation.sh")
        assert referee.rc == 1
        assert "another card than GPU 0 was when vllm-server was proven" in " ".join(referee.stdout.split())
        served.serve("-e", '{"gpu_device_id": 0, "vllm_gpu_force": ["drift"]}')
    finally:
        gpuhost("cards", served.name, str(ROOT / "molecule/simulated_host/cards.json"))
        served.look.run(f"docker rm -f vllm-server; rm -rf {DIRECTORY}")


NOWHERE = "acme/does-not-exist"
LISTING = f"cd {DIRECTORY} && stat -c '%n %a %u %g %Y %N' . .[!.]* * && stat -Lc '%n %a %u %g %Y' .env && md5sum .env *"


def as_it_is(host: GpuHost) -> str:
    """The service's files, by all that may be lost of them, and the container by all that it was made from."""
    # Links as links, and what they lead to; the times of the directories are nobody's.
    files = host.look.check_output(LISTING)
    raw = json.loads(host.look.check_output("docker inspect vllm-server"))[0]
    made = raw["Config"], raw["HostConfig"], raw["Image"]
    raw["Config"].pop("Hostname")
    networks = raw["NetworkSettings"]["Networks"]
    mounts = sorted(f"{one['Type']} {one['Name']} {one['Destination']}" for one in raw["Mounts"])
    text = json.dumps([made, sorted(networks), mounts], indent=1, sort_keys=True)
    # An engine that was restarted has empty lists for what is not set.
    text = text.replace(": null", ": []")
    return re.sub(r"^\.(proven)? .*\n", "", files, flags=re.MULTILINE) + text


def test_a_failed_change_leaves_every_file_as_it_was(served: GpuHost) -> None:
    """A key that wasn't applied yet, another mode and group, an older referee."""
    served.look.check_output(
        f"cd {DIRECTORY} && echo VLLM_API_KEY=sk-not-applied-yet >>.env && chmod 640 .env && chgrp ops .env && "
        "touch -d 2020-01-02 .env && sed -i 2i#older check_gpu_allocation.sh && chmod 700 check_gpu_allocation.sh"
    )
    before = as_it_is(served)
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    assert served.served_gpu() == "0"
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 0" in output
    assert (
        f"Put back: {DIRECTORY}/.env, {DIRECTORY}/check_gpu_allocation.sh, the container vllm-server, with the "
        "settings that it had.\nRemoved: the container that failed.\n"
    ) in output
    assert "sk-not-applied-yet" not in output
    assert not served.look.file(f"{DIRECTORY}/.proven/before.json").exists


def test_a_link_stays_a_link(served: GpuHost) -> None:
    served.look.check_output(
        f"cd {DIRECTORY} && mkdir -p /etc/vllm && mv .env /etc/vllm/ && ln -s /etc/vllm/.env .env"
    )
    before = as_it_is(served)
    served.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    served.serve(gpu_device_id=1)
    assert served.look.file(f"{DIRECTORY}/.env").linked_to == "/etc/vllm/.env"
    assert "GPU_DEVICE_ID=1\n" in served.look.check_output("cat /etc/vllm/.env") + "\n"
    assert served.play("playbooks/rollback.yml").code == 0
    assert served.look.file(f"{DIRECTORY}/.env").linked_to == "/etc/vllm/.env"


def test_a_server_that_was_started_otherwise_by_hand_comes_back_the_same(served: GpuHost) -> None:
    served.look.check_output(
        f"cd {DIRECTORY} && rm -r .proven && cp docker-compose.serving.yml edited && "
        "sed -i -e 's/shm_size:.*/shm_size: 1gb/' -e 's/init: true/&\\n    hostname: by-hand\\n    labels: [of=mine]/' edited && "
        "sed -i 's/:8000:8000/:8077:8000/' edited && GPU_DEVICE_ID=1 docker compose -p vllm-gpu -f edited up -d --wait; rm edited"
    )
    before = as_it_is(served)
    output = served.fail_to_serve(gpu_device_id=0, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 1" in output
    assert served.served_gpu() == "1"
    assert not served.look.file(f"{DIRECTORY}/.proven/current").exists


def test_a_stopped_server_stays_stopped(served: GpuHost) -> None:
    served.look.check_output("docker stop vllm-server")
    before = as_it_is(served)
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE)
    assert "is as it was before, which was not proven: The container is exited, not running." in output
    assert "started again" not in output
    assert as_it_is(served) == before
    assert served.look.check_output("docker inspect -f '{{.State.Status}}' vllm-server") == "created"


def test_a_name_that_was_moved_to_another_image_means_that_one_again(served: GpuHost) -> None:
    image = "vllm/vllm-openai:v0.32.0"
    served.look.check_output(
        f"docker tag {image} old && printf 'FROM {image}\\nLABEL other=yes\\n' | docker build -q -t {image} -"
    )
    try:
        served.serve(gpu_device_id=0)
        before = as_it_is(served)
        moved = served.look.check_output(f"docker image inspect -f '{{{{.Id}}}}' {image}")
        served.fault("crash=traceback")
        result = served.play("playbooks/rollback.yml")
        served.fault("--clear")
        assert result.code != 0
        assert f"the image {image}" in result.output
        assert served.look.check_output(f"docker image inspect -f '{{{{.Id}}}}' {image}") == moved
        assert as_it_is(served) == before
    finally:
        served.fault("--clear")
        served.look.check_output(f"docker tag old {image} && docker rmi old")


def test_a_change_after_one_that_was_killed_goes_back_to_before_both(served: GpuHost) -> None:
    before = as_it_is(served)
    served.fault("start_delay=60")  # not of the server that runs
    while_it_runs("waiting: ", kill)(served, {"vllm_gpu_shm_size": "1gb"})
    served.fault("--clear")
    served.look.check_output("rm /run/vllm_gpu.lock; docker stop vllm-server")
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 0" in output
    assert "That is how the host was before an earlier change" in output


def test_a_docker_engine_that_is_restarted_is_waited_for_on_the_way_back(served: GpuHost) -> None:
    before = as_it_is(served)

    def away(host: GpuHost) -> None:
        gpuhost("engine", host.name, "stop")
        threading.Timer(8, lambda: gpuhost("engine", host.name, "start")).start()

    back = "Put the files, the images' names and the server back"
    result = while_it_runs(back, away)(served, {"vllm_gpu_model": NOWHERE})
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 0" in result.output
    assert as_it_is(served) == before


def test_what_could_not_be_put_back_is_not_replaced(served: GpuHost) -> None:
    compose = "com.docker.compose"
    labels = (
        f"--label {compose}.project=vllm-gpu --label {compose}.service=vllm "
        f"--label {compose}.project.working_dir={DIRECTORY}"
    )
    served.look.check_output(
        f"docker rm -f vllm-server && docker run -d --rm --name vllm-server {labels} --entrypoint sleep "
        "vllm/vllm-openai:v0.32.0 600"
    )
    before = as_it_is(served)
    output = served.fail_to_serve(gpu_device_id=1)
    assert "could not be put back if the change failed: it was started with --rm" in output
    assert as_it_is(served) == before
    served.serve("-e", '{"vllm_gpu_force": ["irreversible"]}', gpu_device_id=1)
    assert served.served_gpu() == "1"


def test_what_others_could_have_planted_is_refused(served: GpuHost) -> None:
    before = served.container()
    for path, how, cure in (
        (DIRECTORY, "chown ops", "chown root"),
        (f"{DIRECTORY}/.proven", "chown ops", "chown root"),
        (f"{DIRECTORY}/.proven/current/record.json", "chmod o+w", "chmod o-w"),
        (f"{DIRECTORY}/.env", "chmod 666", "chmod 600"),
    ):
        served.look.check_output(f"{how} {path}")
        output = served.fail_to_serve(gpu_device_id=1)
        served.look.check_output(f"{cure} {path}")
        assert "can be changed by others than root" in output, path
        assert f"chown root: {path.split('/current/')[0]}" in output
    served.look.check_output(f"cd {DIRECTORY}/.proven && echo '{{' >current/record.json")
    output = served.fail_to_serve(gpu_device_id=1)
    assert "its record.json is not JSON" in output
    served.look.check_output(f"cd {DIRECTORY}/.proven && rm current && ln -s /tmp current")
    output = served.fail_to_serve(gpu_device_id=1)
    assert "it leads to /tmp" in output
    assert served.container() == before
    served.look.check_output(f"rm -rf {DIRECTORY}/.proven/current")
    served.serve(gpu_device_id=1)
