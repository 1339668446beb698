"""The fault matrix: whatever goes wrong, a proven server runs, or the host is as it was.

Each row starts on a host with a proven server on GPU 0 and requests GPU 1 while
something is wrong. It names what the play must report, the card that must serve
afterwards, and which of the service's files may have changed. A refusal must leave
everything untouched. After any other failure the server must be as it was, and once
the fault is cured, a plain run must bring the requested server up.
"""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from fleet.processes import kill_tree

from tests.gpu_host import CARDS, DIRECTORY, ROOT, GpuHost, Result, gpuhost

FILES = ("docker-compose.serving.yml", ".env", "check_gpu_allocation.sh")
Step = Callable[[GpuHost], object]
Run = Callable[[GpuHost, dict[str, object]], Result]


def nothing(_host: GpuHost) -> None:
    """Do nothing."""


def fault(*settings: str) -> Step:
    return lambda host: host.fault(*settings)


def on_host(script: str) -> Step:
    return lambda host: host.ssh.check_output(script)


def simulate(verb: str, *options: str) -> Step:
    return lambda host: gpuhost(verb, host.name, *options)


def restart_docker(host: GpuHost) -> None:
    host.cure()
    simulate("engine", "restart")(host)
    host.wait_healthy()


def play(host: GpuHost, variables: dict[str, object]) -> Result:
    # As JSON, so that a value reaches the play exactly as it stands here.
    return host.play("serve.yml", "-e", json.dumps({"gpu_device_id": "1", **variables}))


@dataclass
class Row:
    """One fault and its expected result."""

    fault: str
    reports: str  # a regular expression; where the play fails, only this fault's message matches it
    prepare: Step = nothing
    variables: dict[str, object] = field(default_factory=dict)
    cure: Step = nothing
    serves: str = "0"
    changed: str = ""
    succeeds: bool = False
    run: Run = play


def other_cards(change: Callable[[dict[str, object], dict[str, object]], None]) -> Step:
    """The host's two cards as `change` makes them."""

    def step(host: GpuHost) -> None:
        cards = json.loads(CARDS.read_text(encoding="utf-8"))
        change(*cards["cards"])
        path = ROOT / f".cache/{host.name}-cards.json"
        path.write_text(json.dumps(cards), encoding="utf-8")
        gpuhost("cards", host.name, str(path))

    return step


def swap(first: dict[str, object], second: dict[str, object]) -> None:
    first["pci.bus_id"], second["pci.bus_id"] = second["pci.bus_id"], first["pci.bus_id"]


def divide_both(*cards: dict[str, object]) -> None:
    for card in cards:
        card["mig.mode.current"] = "Enabled"


def while_it_runs(line_with: str, act: Step) -> Run:
    """Start the play, act at its first line with this text, and let it end."""

    def run(host: GpuHost, variables: dict[str, object]) -> Result:
        words = ["ansible-playbook", "serve.yml", "-e", json.dumps({"gpu_device_id": "1", **variables})]
        output, acted, going_on = "", False, None
        with subprocess.Popen(
            words, cwd=ROOT, env=host.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, start_new_session=True,
        ) as process:  # fmt: skip
            assert process.stdout
            for line in process.stdout:
                output += line
                if line_with in line and not acted:
                    acted = True
                    if act is kill:
                        kill_tree(process.pid)
                    else:
                        going_on = act(host)
        if isinstance(going_on, threading.Thread):
            going_on.join()
        assert acted, output
        return Result(process.returncode, output)

    return run


def docker_away(host: GpuHost) -> threading.Thread:
    """Stop Docker for 8 s while the play continues, as an upgrade of its package does."""
    gpuhost("engine", host.name, "stop")
    back = threading.Timer(8, lambda: gpuhost("engine", host.name, "start"))
    back.start()
    return back


def kill(_host: GpuHost) -> None:
    """Stands for SIGKILL to the whole play."""


def killed(line_with: str, changed: str = ".env") -> Run:
    """Kill the play at a line of its output; the result is the next play's."""

    def run(host: GpuHost, variables: dict[str, object]) -> Result:
        before = digests(host)
        first = while_it_runs(line_with, kill)(host, variables)
        assert first.code == -signal.SIGKILL, first.output
        assert differing(before, digests(host)) == changed
        host.cure()
        return play(host, variables)

    return run


def two_plays(host: GpuHost, variables: dict[str, object]) -> Result:
    """Run a second play while the first one waits for the end of the fault."""
    results: list[Result] = []

    def second(host: GpuHost) -> None:
        results.append(host.play("serve.yml", gpu_device_id=0, vllm_gpu_shm_size="1gb"))
        host.cure()

    first = while_it_runs("waiting: ", second)(host, variables)
    assert first.code == 0, first.output
    return results[0]


def served_then_verified(*fault: str) -> Run:
    """What verify reports of a server that breaks once it is proven."""

    def run(host: GpuHost, variables: dict[str, object]) -> Result:
        done = play(host, variables)
        assert done.code == 0, done.output
        host.fault(*fault)
        for _ in range(20):
            result = host.play("playbooks/verify.yml")
            if result.code:
                break
        host.cure()
        host.wait_healthy()
        return result

    return run


def served_then_healthy(host: GpuHost, variables: dict[str, object]) -> Result:
    """The play; afterwards Docker's own health check agrees."""
    result = play(host, variables)
    for _ in range(60):
        health = host.ssh.check_output("docker inspect --format '{{.State.Health.Status}}' vllm-server")
        if health != "starting":
            break
        time.sleep(0.5)
    assert health == "healthy", result.output
    return result


def served_then_seen(host: GpuHost, variables: dict[str, object]) -> Result:
    """The play; afterwards the container sees its card, which it didn't before."""
    inside = "docker exec vllm-server nvidia-smi -L || false"  # 255 would mean to testinfra that SSH failed
    assert host.ssh.run(inside).rc != 0
    result = play(host, variables)
    assert host.ssh.run(inside).rc == 0, result.output
    return result


# A secret in several rows' settings; no output may have it.
PLANTED = "planted-7c1e04"
MOUNT_FULL = (
    f"cp -a {DIRECTORY} /tmp/full && mount -t tmpfs -o size=200k,mode=755 full {DIRECTORY} && "
    f"cp -a /tmp/full/. {DIRECTORY} && rm -rf /tmp/full; dd if=/dev/zero of={DIRECTORY}/fill bs=4k 2>/dev/null; true"
)
MOUNT_READ_ONLY = f"mount --bind {DIRECTORY} {DIRECTORY} && mount -o remount,ro,bind {DIRECTORY}"
UNMOUNT = f"umount {DIRECTORY}"
# The fault ends when the play starts to restore the host, so that the old server can start.
RESTORING = "Restore the files, the image names and the server"
until_restored = while_it_runs(RESTORING, GpuHost.cure)
VLLM_IMAGE = "vllm/vllm-openai:v0.32.0"
SLEEP = f"--entrypoint sleep {VLLM_IMAGE} 3600"
PROJECT = "--label com.docker.compose.project=vllm-gpu"
BY_HAND = (
    f"cd {DIRECTORY} && rm -r .proven && cp docker-compose.serving.yml edited && "
    "sed -i -e 's/shm_size:.*/shm_size: 1gb/' -e 's/init: true/&\\n    labels: [of=mine]/' edited && "
    "sed -i 's/:8000:8000/:8077:8000/' edited && "
    "GPU_DEVICE_ID=1 docker compose -p vllm-gpu -f edited up -d --wait; rm edited"
)
WITH_RM = (
    f"docker rm -f vllm-server && docker run -d --rm --name vllm-server {PROJECT} "
    f"--label com.docker.compose.service=vllm --label com.docker.compose.project.working_dir={DIRECTORY} {SLEEP}"
)
NOT_APPLIED = (
    f"cd {DIRECTORY} && sed -i s/^VLLM_API_KEY=.*/VLLM_API_KEY={PLANTED}/ .env && chmod 640 .env && "
    "chgrp ops .env && touch -d 2020-01-02 .env && sed -i 2i#older check_gpu_allocation.sh && "
    "chmod 700 check_gpu_allocation.sh"
)
NOWHERE: dict[str, object] = {"vllm_gpu_model": "acme/does-not-exist"}
NO_UUID = "GPU-00000000-0000-0000-0000-000000000000"
OLD_COMPOSE = (
    "mkdir -p ~/.docker/cli-plugins && cd ~/.docker/cli-plugins && "
    "printf '%s\\n' '#!/bin/sh' 'case \"$*\" in *\"version --short\"*) echo 2.10.0;; "
    '*) exec /usr/local/libexec/docker/cli-plugins/docker-compose "$@";; esac\' >docker-compose && '
    "chmod +x docker-compose"
)
REGISTRY = (
    "mkdir -p /etc/docker/certs.d/127.0.0.1:5000 && cd /etc/docker/certs.d/127.0.0.1:5000 && "
    "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=registry -addext subjectAltName=IP:127.0.0.1 "
    "-keyout /root/registry.key -out ca.crt 2>/dev/null && cp ca.crt /root/registry.crt && cd /root && "
    f"{{ python3 -c {shlex.quote((ROOT / 'tests/faults/registry.py').read_text(encoding='utf-8'))} >/dev/null 2>&1 & sleep 1; }}"
)
NO_REGISTRY = "pkill -f '^python3 -c .*A registry on loopback'; rm -rf /etc/docker/certs.d"
# What a play that failed reports about the host, one way or another.
ENDS = (
    "was left as it is, because|serves as before|is as it was before|HAS NO PROVEN SERVER NOW|"
    "the server is not proven|is changing this server"
)
SUCCESS = r"(?s)runs on GPU 1 .{0,120}and on no other"

ROWS = [
    Row("GPU id that doesn't exist (index 7)", "gpu_device_id is 7, but this host has no such GPU", variables={"gpu_device_id": "7"}),
    Row("GPU id that doesn't exist (UUID)", f"gpu_device_id is {NO_UUID}, but this host has no such GPU", variables={"gpu_device_id": NO_UUID}),
    Row("malformed id `0,1`", 'gpu_device_id is "0,1", which is not the id of one GPU', variables={"gpu_device_id": "0,1"}),
    Row("malformed id `$(reboot)`", r'gpu_device_id is "\$\(reboot\)", which is not the id of one GPU', variables={"gpu_device_id": "$(reboot)"}),
    Row("malformed id with a line break", r'gpu_device_id is "1\\nVLLM_MODEL=other", which is not the id of one GPU', variables={"gpu_device_id": "1\nVLLM_MODEL=other"}),
    Row("misspelt variables", "(?s)(?=.*GPU_DEVICE_ID is not)(?=.*gpu_id is not).*vllm_gpu_modle is not a variable of this role", variables={"gpu_id": 1, "GPU_DEVICE_ID": 1, "vllm_gpu_modle": 1}),
    Row("no driver", "The NVIDIA driver is not loaded", fault("driver=gone"), cure=GpuHost.cure),
    Row("driver/library mismatch", "NVIDIA driver and its libraries have different versions", fault("driver=mismatch"), cure=GpuHost.cure),
    Row("nvidia-smi hangs", "nvidia-smi gave no answer within 10 s", fault("nvidia_smi=hang"), cure=GpuHost.cure),
    Row("nvidia-smi missing", "nvidia-smi is not installed", fault("nvidia_smi=missing"), cure=GpuHost.cure),
    Row("Docker Engine stopped", "The Docker Engine is not running", simulate("engine", "stop"), cure=restart_docker),
    Row("Docker Engine stopped during the run", r"(?s)Docker Engine is not running.*HAS NO PROVEN SERVER NOW", fault("start_delay=20"), run=while_it_runs("waiting: ", simulate("engine", "stop")),
        # Without Docker nothing can be restored; once it runs again it starts its last container.
        cure=restart_docker, serves="1"),
    Row("no nvidia runtime", "The Docker Engine doesn't know the NVIDIA driver", simulate("engine", "restart", "--no-nvidia"), cure=restart_docker),
    Row("Compose too old", "The Compose plugin is 2.10.0; 2.18 or newer is needed", on_host(OLD_COMPOSE),
        cure=on_host("rm -rf ~/.docker/cli-plugins")),
    Row("image not found", "the image vllm/vllm-openai:v0.99.0 could not be pulled", variables={"vllm_gpu_image": "vllm/vllm-openai:v0.99.0"}),
    Row("image that its registry doesn't have", "127.0.0.1:5000/vllm:none could not be pulled: .*manifest unknown", on_host(REGISTRY), variables={"vllm_gpu_image": "127.0.0.1:5000/vllm:none"},
        cure=on_host(NO_REGISTRY)),
    Row("image pull cut off", "127.0.0.1:5000/vllm:cut could not be pulled: .*(EOF|size|reset|closed|206)", on_host(REGISTRY),
        variables={"vllm_gpu_image": "127.0.0.1:5000/vllm:cut"}, cure=on_host(NO_REGISTRY)),
    Row("port taken by another program", "Port 9000 on 127.0.0.1 is already in use by python3 .pid", on_host("setsid python3 -m http.server 9000 >/dev/null 2>&1 & sleep 1"),
        variables={"vllm_gpu_port": 9000}, cure=on_host("pkill -f http.server")),
    Row("port taken by another container", "Port 9000 on 127.0.0.1 is already in use by container grafana. Stop that container",
        on_host(f"docker run -d --name grafana -p 127.0.0.1:9000:3000 {SLEEP}"),
        variables={"vllm_gpu_port": 9000}, cure=on_host("docker rm -f grafana")),
    Row("the server is paused", "The container vllm-server is paused. Resume it with: docker unpause vllm-server", on_host("docker pause vllm-server"), cure=on_host("docker unpause vllm-server")),
    Row("another user's container has the server's name", r"It belongs to no Compose project\..*docker rm -f vllm-server", on_host(f"docker rm -f vllm-server && docker run -d --name vllm-server {SLEEP}"),
        cure=on_host("docker rm -f vllm-server"), serves=""),
    Row("another user's container in the Compose project", "The Compose project vllm-gpu on this host has containers that are not this role's: chat-db", on_host(f"docker run -d --name chat-db {PROJECT} {SLEEP}"),
        cure=on_host("docker rm -f chat-db")),
    Row("a server that was started from another directory", f"It was started from {DIRECTORY}, not from /opt/elsewhere", variables={"vllm_gpu_project_dir": "/opt/elsewhere"}),
    Row("a server that was started with --rm", "could not be restored if the change failed: it was started with --rm", on_host(WITH_RM), cure=on_host("docker rm -f vllm-server"), serves=""),
    Row("a server that was started with --rm, and may be replaced", SUCCESS, on_host(WITH_RM), variables={"vllm_gpu_force": ["irreversible"]}, serves="1", changed=".env", succeeds=True),
    Row("card full because of another tenant", r"GPU 1 .*MiB free, but the server needs .* MiB \(0.9 of 16311 MiB\).*held by", simulate("tenant", "--card", "1", "--mib", "9000"), cure=simulate("tenant", "--stop")),
    Row("crash at start (out of GPU memory)", "torch.OutOfMemoryError: CUDA out of memory", fault("crash=oom", "start_delay=1"), variables={"vllm_gpu_start_timeout": 60},
        run=until_restored),
    Row("crash loop", "(?s)The server died.*RuntimeError: simulated failure while the engine started", fault("crash=traceback"), run=until_restored),
    Row("bad model", "acme/does-not-exist is not a local folder and is not a valid model identifier", variables=NOWHERE),
    Row("wrong flag", "unrecognized arguments: --no-such-flag", variables={"vllm_gpu_extra_args": ["--no-such-flag"]}),
    Row("never healthy", "was not ready after 5 s: .*503", fault("health=503"), variables={"vllm_gpu_start_timeout": 5},
        run=until_restored),
    Row("port never opens", "was not ready after 5 s: .*no answer from", fault("health=closed"), variables={"vllm_gpu_start_timeout": 5},
        run=until_restored),
    Row("healthy but serving another model", "it serves acme/other, not Qwen/Qwen3-0.6B", fault("serve_as=acme/other"),
        run=until_restored),
    Row("wrong card", "runs on GPU 0 .*, not on GPU 1", fault("runtime=0"), run=until_restored),
    Row("two cards", "but holds GPU 0 .* as well", fault("runtime=two"), run=until_restored),
    Row("NVIDIA's hook refuses the card", r"(?s)unknown device.{0,80}Compare gpu_device_id with `nvidia-smi -L`", fault("runtime=7"),
        run=until_restored),
    Row("no card at all", "Failed to infer device type", fault("runtime=none"), run=until_restored),
    Row("server dies just after it was proven", "The container is restarting|has no process on any GPU|API: no answer|/health returned 503",
        run=served_then_verified("crash_after=0.1"), serves="1", changed=".env"),
    Row("vLLM's engine process dies while serving", "The container is restarting|has no process on any GPU|API: no answer|/health returned 503",
        run=served_then_verified("worker_dies_after=0.1"), serves="1", changed=".env"),
    Row("disk full while writing", "could not be written: No space left on device", on_host(MOUNT_FULL), cure=on_host(UNMOUNT)),
    Row("read-only target directory", "could not be written: Read-only file system", on_host(MOUNT_READ_ONLY), cure=on_host(UNMOUNT)),
    Row("unparseable existing .env", "the quote after MINE= is never closed", on_host(f"echo \"MINE='{PLANTED}\" >> {DIRECTORY}/.env"),
        cure=on_host(f"sed -i /^MINE=/d {DIRECTORY}/.env")),
    Row("hand-edited compose file", SUCCESS, on_host(f"sed -i 's/device_ids:.*/count: 1/' {DIRECTORY}/docker-compose.serving.yml"),
        serves="1", changed=".env docker-compose.serving.yml", succeeds=True),
    Row("hand-edited compose file without ports", SUCCESS, on_host(f"cd {DIRECTORY} && sed -i 's/^    ports:/    network_mode: host/; /VLLM_BIND_ADDRESS/d' docker-compose.serving.yml"),
        serves="1", changed=".env docker-compose.serving.yml", succeeds=True),
    Row("hand-edited API key", SUCCESS, on_host(f"sed -i s/^VLLM_API_KEY=.*/VLLM_API_KEY={PLANTED}/ {DIRECTORY}/.env"),
        serves="1", changed=".env", succeeds=True),
    Row("play killed while it reads the host", SUCCESS, run=killed("Read the host", ""), serves="1", changed=".env", succeeds=True),
    Row("play killed after writing", SUCCESS, fault("start_delay=2"), run=killed("Recreate the server"), serves="1", changed=".env", succeeds=True),
    Row("play killed while it recreates", SUCCESS, fault("start_delay=6"), run=killed("Wait until the server"), serves="1", changed=".env", succeeds=True),
    Row("play killed while it waits", SUCCESS, fault("health=503"), run=killed("waiting: "), serves="1", changed=".env", succeeds=True),
    Row("two plays at once", "is changing this server right now", fault("health=503"), run=two_plays, serves="1", changed=".env"),
    Row("card swapped", "GPU 0 is another card than it was", other_cards(swap), variables={"gpu_device_id": "0"}, cure=simulate("cards", str(CARDS))),
    Row("card divided into MIG instances", r"is divided \(MIG\), so vLLM would not get all of it", other_cards(divide_both), cure=simulate("cards", str(CARDS))),
    Row("bad model, and both cards were divided into MIG instances meanwhile", "acme/does-not-exist is not a local folder and is not a valid model identifier", other_cards(divide_both), variables={"vllm_gpu_model": "acme/does-not-exist", "vllm_gpu_force": "drift,mig"}, cure=simulate("cards", str(CARDS))),
    Row("card lost from the container's view", r"(?s)runs on GPU 0 .{0,120}and on no other", fault("lost_card=vllm-server"), variables={"gpu_device_id": "0"}, run=served_then_seen, succeeds=True),
    Row("an API key with a $ in it", SUCCESS, variables={"vllm_gpu_api_key": f"pa$word-{PLANTED}"}, serves="1", changed=".env", succeeds=True),
    Row("an option in the extra arguments that the role sets itself", "has --port, which is not allowed there. Use vllm_gpu_port", variables={"vllm_gpu_extra_args": ["--port", "8001"]}),
    Row("extra arguments that Compose would cut off", "Compose splits vllm_gpu_extra_args", variables={"vllm_gpu_extra_args": "--seed 3; --max-model-len 512"}),
    Row("extra arguments that -e cuts off", '"--max-model-len 512" was given with -e, but belongs to no variable', run=lambda host, _: host.play("serve.yml", gpu_device_id=1, vllm_gpu_extra_args="--enforce-eager --max-model-len 512")),
    Row("port 0", "vllm_gpu_port is 0; it must be a whole number from 1 to 65535", variables={"vllm_gpu_port": 0}),
    Row("an address that the host doesn't have", "This host can't listen on 192.0.2.7", variables={"vllm_gpu_bind_address": "192.0.2.7"}),
    Row("a training GPU that doesn't exist", 'names "01", but this host has no such GPU', variables={"vllm_gpu_training_gpus": ["01"]}),
    Row("an environment variable that chooses the card", "CUDA_VISIBLE_DEVICES: gpu_device_id alone decides", variables={"vllm_gpu_env": {"CUDA_VISIBLE_DEVICES": "0"}}),
    Row("nvidia-smi lists no processes", "nvidia-smi lists no process on any GPU of this host", fault("processes=none"), cure=GpuHost.cure),
    Row("an API that answers a byte at a time", "no complete answer to /v1/models within 10 s", fault("api=drip"), variables={"vllm_gpu_start_timeout": 15},
        run=until_restored),
    Row("Docker Engine restarted while the model loads", SUCCESS, fault("start_delay=12"), run=while_it_runs("waiting: ", docker_away), cure=GpuHost.cure, serves="1", changed=".env", succeeds=True),
    Row("a proxy in Docker's configuration", SUCCESS, on_host("mkdir -p ~/.docker && echo '{\"proxies\": {\"default\": {\"httpProxy\": \"http://127.0.0.1:9\"}}}' >~/.docker/config.json"), run=served_then_healthy,
        cure=on_host("rm ~/.docker/config.json"), serves="1", changed=".env", succeeds=True),
    Row("a directory that a plain user owns", rf"{DIRECTORY} \(owner .*can be changed by others than root", on_host(f"chown ops {DIRECTORY}"), cure=on_host(f"chown root {DIRECTORY}")),
    Row("a record that others could write", r"record\.json \(owner .*can be changed by others than root", on_host(f"chmod o+w {DIRECTORY}/.proven/current/record.json"), cure=on_host(f"chmod o-w {DIRECTORY}/.proven/current/record.json")),
    Row("a record that can't be read", "its record.json is not JSON of the expected form", on_host(f"cp -a {DIRECTORY}/.proven/current/record.json /root/ && echo '{{' >{DIRECTORY}/.proven/current/record.json"), cure=on_host(f"cp -a /root/record.json {DIRECTORY}/.proven/current/")),
    Row("a record that leads elsewhere", "it leads to /tmp", on_host(f"cd {DIRECTORY}/.proven && cp -P current /root/link && ln -sfn /tmp current"),
        cure=on_host(f"cp -P --remove-destination /root/link {DIRECTORY}/.proven/current")),
    Row("a directory of records that a plain user owns", r"\.proven \(owner .*can be changed by others than root", on_host(f"chown ops {DIRECTORY}/.proven"), cure=on_host(f"chown root {DIRECTORY}/.proven")),
    Row("a .env that anyone can write", r"\.env \(owner .*mode 0666\) can be changed by others than root", on_host(f"chmod 666 {DIRECTORY}/.env"), cure=on_host(f"chmod 600 {DIRECTORY}/.env")),
    Row("bad model, and a key in .env that was not applied yet", r"(?s)serves as before: .*Restored:\s+/opt/vllm-gpu/\.env,\s.*check_gpu_allocation\.sh,\s.*the container\s+vllm-server", on_host(NOT_APPLIED), variables=NOWHERE),
    Row("bad model, and a server that was started by hand with other settings", "serves as before: Qwen/Qwen3-0.6B on GPU 1", on_host(BY_HAND), variables={**NOWHERE, "gpu_device_id": "0"}, serves="1"),
    Row("bad model, and a server that was stopped", "is as it was before, which was not proven: The container is exited", on_host("docker stop vllm-server"), variables=NOWHERE, serves=""),
    Row("bad model, and the Docker Engine restarts while the old server is restored", "serves as before: Qwen/Qwen3-0.6B on GPU 0", variables=NOWHERE, run=while_it_runs(RESTORING, docker_away)),
    Row("card set aside for training", "GPU 1 .*is set aside for training", variables={"vllm_gpu_training_gpus": "0000:05:00.0, 1"}),
    Row("listening beyond loopback without a key", "would listen on 0.0.0.0:8000 without a key", variables={"vllm_gpu_bind_address": "0.0.0.0"}),
    Row("a model path that doesn't exist", "is not on this host: /srv/models/tiny does not exist", on_host("mkdir -p /srv/models"), variables={"vllm_gpu_models": "/srv/models", "vllm_gpu_model": "/models/tiny"}),
    Row("a cache directory that doesn't exist", "There is no directory /srv/nowhere on this host", variables={"vllm_gpu_hf_cache": "/srv/nowhere"}),
]  # fmt: skip


def digests(host: GpuHost) -> dict[str, str]:
    """The service's files: checksums, modes, owners, groups, times and link targets."""
    listing = host.ssh.run(
        f"cd {DIRECTORY} && for f in {' '.join(FILES)}; do echo $f $(md5sum <$f) $(stat -c '%a %u %g %Y %F' $f) $(readlink $f); done"
    ).stdout
    return dict(line.split(" ", 1) for line in listing.splitlines())


def seen(host: GpuHost) -> tuple[str, str, str]:
    """What a refusal must leave as it is, and the lock, which it need not even have taken."""
    return host.files(), host.container(), host.ssh.run("cat /run/vllm_gpu.lock").stdout


def differing(before: dict[str, str], after: dict[str, str]) -> str:
    return " ".join(sorted(name for name, digest in after.items() if digest != before.get(name)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_fault(started: GpuHost, matrix: list[str], row: Row) -> None:
    host = started
    host.restore()
    row.prepare(host)
    before, everything, made = digests(host), seen(host), host.made_from()

    result = row.run(host, row.variables)
    changed, after = differing(before, digests(host)), seen(host)
    snapshot = host.ssh.file(f"{DIRECTORY}/.proven/before.json").exists
    row.cure(host)

    match = re.search(row.reports, result.output)
    words = " ".join(match[0].split()) if match else "NOT REPORTED"
    if len(words) > 90:  # its end, in whole words
        words = f"… {words[-89:].partition(' ')[2]}"
    serves = host.served_gpu() if "running" in host.container() else ""
    matrix.append(
        f"| {row.fault} | {words} | {'GPU ' + serves if serves else 'nothing yet'} | {changed or 'none'} |\n"
    )
    assert match, result.output
    assert PLANTED not in result.output
    assert (result.code == 0) == row.succeeds
    assert (serves, changed) == (row.serves, row.changed)
    ending = re.search(ENDS, result.output)
    assert row.succeeds or ending, result.output
    # What could not be restored yet is kept for the next play.
    assert snapshot == (ending is not None and ending[0].startswith("HAS NO"))
    if ending and ending[0].startswith("was left"):
        assert after[:2] == everything[:2]
    if ending and ending[0] in ("serves as before", "is as it was before"):
        assert host.made_from() == made

    # Running the play again is all that is needed; where it did not even take the lock, that was shown before.
    host.cure()
    if not row.succeeds and after != everything:
        gpu = "1" if serves != "0" or changed else "0"
        host.serve(gpu_device_id=gpu)
        assert host.served_gpu() == gpu
