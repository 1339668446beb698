"""A container of a light host: what it was created from, and its state over time."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any, NamedTuple

# Above every PID of a kernel, so that none is a real process's.
FIRST_PID = 2**22 + 8
PROCESSES = ("docker-init", "vllm", "python3", "VLLM::EngineCor")
# When a server with the fault `crash` ends; seconds after its start.
CRASH_AFTER = 0.3


class Life(NamedTuple):
    """The state of a container."""

    status: str
    restarts: int = 0
    started: float = 0
    exit_code: int = 0


@dataclasses.dataclass
class Container:
    """A container as the engine stores it."""

    id: str
    name: str
    number: int  # decides the PIDs of its processes
    created: float
    body: dict[str, Any]  # what it was created from
    image_id: str
    started: float = 0
    stopped: bool = False
    error: str = ""
    # Since its start.
    cards: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""
    delay: float = 0

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.body["HostConfig"])

    @property
    def restart(self) -> str:
        return str((self.settings.get("RestartPolicy") or {}).get("Name") or "no")

    @property
    def ports(self) -> list[tuple[str, int]]:
        bindings = (self.settings.get("PortBindings") or {}).values()
        return [(port["HostIp"] or "0.0.0.0", int(port["HostPort"])) for ports in bindings for port in ports]

    def environment(self, name: str) -> str:
        pairs: dict[str, str] = dict(pair.partition("=")[::2] for pair in self.body.get("Env") or [])
        return pairs.get(name, "")

    def pids(self) -> dict[str, int]:
        """The PIDs of its processes on the host, by name."""
        return {name: FIRST_PID + self.number * 8 + n for n, name in enumerate(PROCESSES)}

    def life(self) -> Life:
        if self.error or not self.started:
            return Life("created", exit_code=128 if self.error else 0)
        if self.stopped:
            return Life("exited", 0, self.started)
        if not self.crash:
            return Life("running", 0, self.started)
        now, begin, restarts = time.time(), self.started, 0
        while now >= begin + CRASH_AFTER:
            if self.restart == "no":
                return Life("exited", 0, begin, 1)
            # Like Docker: after 0.1 s, and twice as long each time.
            again = begin + CRASH_AFTER + min(0.1 * 2**restarts, 60)
            if now < again:
                return Life("restarting", restarts, begin, 1)
            begin, restarts = again, restarts + 1
        return Life("running", restarts, begin)

    def loaded(self) -> float:
        """How far the server has loaded; from 1 on it answers."""
        if self.crash or self.life().status != "running":
            return 0
        return (time.time() - self.started) / self.delay if self.delay else 1

    def document(self) -> dict[str, Any]:
        """The output of `docker inspect`."""
        life = self.life()
        running = life.status == "running"
        health = {"Status": "healthy" if self.loaded() >= 1 else "starting"}
        config = {k: v for k, v in self.body.items() if k not in ("HostConfig", "NetworkingConfig")}
        endpoints = (self.body.get("NetworkingConfig") or {}).get("EndpointsConfig")
        networks = endpoints or {self.settings.get("NetworkMode") or "bridge": {}}
        return {
            "Id": self.id,
            "Created": moment(self.created),
            "Name": f"/{self.name}",
            "State": {
                "Status": life.status,
                "Running": life.status in ("running", "restarting"),
                "Restarting": life.status == "restarting",
                "Pid": self.pids()[PROCESSES[0]] if running else 0,
                "ExitCode": life.exit_code,
                "Error": self.error,
                "StartedAt": moment(life.started),
                **({"Health": health} if running else {}),
            },
            "Image": self.image_id,
            "RestartCount": life.restarts,
            "HostConfig": self.settings,
            "Config": {**config, "Entrypoint": config.get("Entrypoint") or ["vllm", "serve"]},
            "NetworkSettings": {"Networks": {n: {**(v or {}), "NetworkID": n} for n, v in networks.items()}},
            "Mounts": [],
        }

    def log(self) -> list[str]:
        """The server's log since its last start."""
        if self.life().status == "created":
            return []
        pids = self.pids()
        server, engine = f"(APIServer pid={pids['vllm']})", f"(EngineCore pid={pids[PROCESSES[-1]]})"
        lines = [f"{server} INFO vLLM API server version 0.32.0, model {self.names[0]}"]
        if self.crash:
            return [*lines, f"{engine} ERROR EngineCore failed to start.", f"{engine} {self.crash}"]
        if self.loaded() < 1:
            part = f"{100 * self.loaded():>3.0f}% Completed"
            return [*lines, f"{engine} Loading safetensors checkpoint shards: {part}"]
        return [*lines, f"{server} INFO:     Application startup complete."]


def moment(when: float) -> str:
    """Return a time as Docker writes it; 0 is never."""
    if not when:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
