"""Going back: by hand, after a failure, and what drift and a lost mode do."""

from __future__ import annotations

from pathlib import Path

from tests.faults.test_matrix import digests, kill, while_it_runs
from tests.gpu_host import DIRECTORY, ROOT, GpuHost, gpuhost

NOWHERE = "acme/does-not-exist"


def test_rollback_goes_back_and_forth_between_the_last_two_proven_states(served: GpuHost) -> None:
    refused = served.play("playbooks/rollback.yml")
    assert refused.code != 0
    assert "has no previous proven state: it was left as it is" in refused.output
    served.serve(gpu_device_id=1)
    # A note is no state to go back to.
    served.look.check_output(f"echo '# a note' >> {DIRECTORY}/.env")
    served.serve(gpu_device_id=1)
    env = served.look.check_output(f"cat {DIRECTORY}/.env")
    for gpu in ("0", "1"):
        result = served.play("playbooks/rollback.yml")
        assert result.code == 0, result.output
        assert served.served_gpu() == gpu
        assert f"runs on GPU {gpu}" in result.output
    assert served.look.check_output(f"cat {DIRECTORY}/.env") == env


def test_a_link_stays_a_link(served: GpuHost) -> None:
    served.look.check_output(
        f"cd {DIRECTORY} && mkdir -p /etc/vllm && mv .env /etc/vllm/ && ln -s /etc/vllm/.env .env"
    )
    served.serve(gpu_device_id=1)
    assert served.look.file(f"{DIRECTORY}/.env").linked_to == "/etc/vllm/.env"
    assert "\nGPU_DEVICE_ID=1\n" in served.look.check_output("cat /etc/vllm/.env")
    before = as_it_is(served)
    served.fail_to_serve(gpu_device_id=0, vllm_gpu_model=NOWHERE)
    assert as_it_is(served) == before


def test_going_back_is_refused_before_the_server_stops(served: GpuHost) -> None:
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
        clean_host.look.check_output("docker ps -aq; docker network ls -qf name=vllm; ls -d /srv/new || true")
        == ""
    )


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
        served.wait_healthy()
        result = served.play("playbooks/verify.yml")
        assert result.code != 0, result.output
        assert "GPU 0 is another card than it was" in result.output
        referee = served.look.run(f"{DIRECTORY}/check_gpu_allocation.sh")
        assert referee.rc == 1
        assert "another card than GPU 0 was when vllm-server was proven" in " ".join(referee.stdout.split())
        served.serve("-e", '{"gpu_device_id": 0, "vllm_gpu_force": ["drift"]}')
    finally:
        gpuhost("cards", served.name, str(ROOT / "molecule/simulated_host/cards.json"))


def as_it_is(host: GpuHost) -> object:
    return digests(host), host.made()


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
    assert "This is the state from before an earlier change" in output
