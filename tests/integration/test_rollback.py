"""Going back: by hand, after a failure, and what drift and a lost mode do."""

from __future__ import annotations

from pathlib import Path

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


def test_a_first_deployment_that_fails_leaves_no_crash_loop(clean_host: GpuHost) -> None:
    output = clean_host.fail_to_serve(gpu_device_id=1, vllm_gpu_model="acme/does-not-exist")
    assert "There is no proven state to go back to. No server runs on integration now." in output
    assert clean_host.container() == ""
    assert "acme/does-not-exist" in clean_host.look.check_output(f"cat {DIRECTORY}/.env")


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
