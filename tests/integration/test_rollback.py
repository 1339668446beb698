"""Rollback, by its playbook and after a failed change; drift of cards, modes and image names."""

from __future__ import annotations

from tests.faults.test_matrix import digests, kill, other_cards, simulate, swap, while_it_runs
from tests.gpu_host import CARDS, DIRECTORY, GpuHost, gpuhost

NOWHERE = "acme/does-not-exist"


def as_it_is(host: GpuHost) -> object:
    return digests(host), host.made_from()


def test_rollback_alternates_between_the_last_two_proven_states(served: GpuHost) -> None:
    refused = served.play("playbooks/rollback.yml")
    assert refused.code != 0
    assert "has no previous proven state: it was left as it is" in refused.output
    served.serve(gpu_device_id=1)
    # A comment makes no state of its own.
    served.ssh.check_output(f"echo '# a note' >> {DIRECTORY}/.env")
    served.serve(gpu_device_id=1)
    env = served.ssh.check_output(f"cat {DIRECTORY}/.env")
    for gpu in ("0", "1"):
        result = served.play("playbooks/rollback.yml")
        assert result.code == 0, result.output
        assert served.served_gpu() == gpu
        assert f"runs on GPU {gpu}" in result.output
    assert served.ssh.check_output(f"cat {DIRECTORY}/.env") == env


def test_a_link_stays_a_link(served: GpuHost) -> None:
    served.ssh.check_output(
        f"cd {DIRECTORY} && mkdir -p /etc/vllm && mv .env /etc/vllm/ && ln -s /etc/vllm/.env .env"
    )
    served.serve(gpu_device_id=1)
    assert served.ssh.file(f"{DIRECTORY}/.env").linked_to == "/etc/vllm/.env"
    assert "\nGPU_DEVICE_ID=1\n" in served.ssh.check_output("cat /etc/vllm/.env")
    before = as_it_is(served)
    served.fail_to_serve(gpu_device_id=0, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    result = served.play("playbooks/rollback.yml")
    assert result.code == 0, result.output
    assert served.ssh.file(f"{DIRECTORY}/.env").linked_to == "/etc/vllm/.env"
    assert "\nGPU_DEVICE_ID=0\n" in served.ssh.check_output("cat /etc/vllm/.env")


def test_rollback_is_refused_before_the_server_stops(served: GpuHost) -> None:
    served.serve(gpu_device_id=1)
    before = served.container()
    plan = served.play("playbooks/rollback.yml", "--check")
    assert plan.code == 0, plan.output
    assert "Qwen/Qwen3-0.6B would be served on GPU 0 (NVIDIA GeForce RTX 5090) again" in plan.output
    gpuhost("tenant", served.name, "--card", "0", "--mib", "20000")
    try:
        refused = served.play("playbooks/rollback.yml")
        assert refused.code != 0
        assert "was left as it is, because:" in refused.output
        assert "MiB free" in refused.output
    finally:
        gpuhost("tenant", served.name, "--stop")
    assert served.container() == before
    assert served.play("playbooks/rollback.yml").code == 0
    assert served.served_gpu() == "0"


def test_a_first_deployment_that_fails_leaves_nothing(clean_host: GpuHost) -> None:
    directory = "/srv/new/vllm"
    output = clean_host.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE, vllm_gpu_project_dir=directory)
    assert "integration had no server before, and has none now." in output
    assert f"Removed: {directory}/docker-compose.serving.yml, {directory}/.env, " in output
    assert "the container that failed, the network vllm-gpu_default" in output
    assert "new volumes vllm-gpu_huggingface-cache" in output
    assert (
        clean_host.ssh.check_output("docker ps -aq; docker network ls -qf name=vllm; ls -d /srv/new || true")
        == ""
    )


def test_lost_modes_and_files_are_restored_without_a_restart(served: GpuHost) -> None:
    before = served.container()
    served.ssh.check_output(f"chmod 644 {DIRECTORY}/.env && rm {DIRECTORY}/check_gpu_allocation.sh")
    served.serve(gpu_device_id=0)
    assert served.ssh.file(f"{DIRECTORY}/.env").mode == 0o600
    assert served.ssh.file(f"{DIRECTORY}/check_gpu_allocation.sh").mode == 0o755
    assert served.container() == before


def test_an_index_that_means_another_card_after_a_reboot_is_reported(served: GpuHost) -> None:
    other_cards(swap)(served)
    try:
        served.ssh.check_output("docker restart vllm-server")
        served.wait_healthy()
        for playbook in ("playbooks/verify.yml", "serve.yml"):
            result = served.play(playbook, gpu_device_id=0)
            assert result.code != 0, result.output
            assert "GPU 0 is another card than it was" in result.output
        referee = served.ssh.run(f"{DIRECTORY}/check_gpu_allocation.sh")
        assert referee.rc == 1
        assert "is not the GPU 0 on which vllm-server was proven" in " ".join(referee.stdout.split())
        served.serve("-e", '{"gpu_device_id": 0, "vllm_gpu_force": ["drift"]}')
    finally:
        simulate("cards", str(CARDS))(served)


def test_an_image_name_that_a_failed_rollback_moved_is_restored(served: GpuHost) -> None:
    image = "vllm/vllm-openai:v0.32.0"
    served.ssh.check_output(
        f"docker tag {image} old && printf 'FROM {image}\\nLABEL other=yes\\n' | docker build -q -t {image} -"
    )
    try:
        served.serve(gpu_device_id=0)
        before = as_it_is(served)
        moved = served.ssh.check_output(f"docker image inspect -f '{{{{.Id}}}}' {image}")
        served.fault("crash=traceback")
        result = served.play("playbooks/rollback.yml")
        served.cure()
        assert result.code != 0
        assert f"the image {image}" in result.output
        assert served.ssh.check_output(f"docker image inspect -f '{{{{.Id}}}}' {image}") == moved
        assert as_it_is(served) == before
    finally:
        served.cure()
        served.ssh.check_output(f"docker tag old {image} && docker rmi old")


def test_a_change_that_fails_after_a_killed_one_restores_what_ran_before_both(served: GpuHost) -> None:
    before = as_it_is(served)
    served.fault("start_delay=60")  # the server that runs has started already
    while_it_runs("waiting: ", kill)(served, {"vllm_gpu_shm_size": "1gb"})
    served.cure()
    served.ssh.check_output("rm /run/vllm_gpu.lock; docker stop vllm-server")
    output = served.fail_to_serve(gpu_device_id=1, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before
    assert "serves as before: Qwen/Qwen3-0.6B on GPU 0" in output
    assert "This is the state from before an earlier change" in output
