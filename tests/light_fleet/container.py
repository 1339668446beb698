"""A container of a light host: what it was created from, and what becomes of it in time."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime
from typing import Any, NamedTuple

# Above every PID that a kernel gives, so that no fake one is another's.
FIRST_PID = 2**22 + 8
PROCESSES = ("docker-init", "vllm", "python3", "VLLM::EngineCor")
# How long a server lives that crashes while it starts; seconds.
CRASH_AFTER = 0.3


class Life(NamedTuple):
    """What has become of a container until now."""

    status: str
    restarts: int = 0
    started: float = 0
    exit_code: int = 0


@dataclasses.dataclass
class Container:
    """What the engine knows of a container."""

    id: str
    name: str
    number: int  # its processes have PIDs of their own
    created: float
    body: dict[str, Any]  # what it was created from
    image_id: str
    started: float = 0
    stopped: bool = False
    error: str = ""
    # What it was given when it was started.
    cards: list[str] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""
    delay: float = 0

    @property
    def settings(self) -> dict[str, Any]:
        """What the host does for it: cards, ports, restarts."""
        return dict(self.body["HostConfig"])

    @property
    def restart(self) -> str:
        """The restart policy."""
        return str((self.settings.get("RestartPolicy") or {}).get("Name") or "no")

    @property
    def ports(self) -> list[tuple[str, int]]:
        """The addresses and ports of this machine that lead to it."""
        bindings = (self.settings.get("PortBindings") or {}).values()
        return [(one["HostIp"] or "0.0.0.0", int(one["HostPort"])) for each in bindings for one in each]

    def environment(self, name: str) -> str:
        """Return one of its environment variables."""
        pairs: dict[str, str] = dict(one.partition("=")[::2] for one in self.body.get("Env") or [])
        return pairs.get(name, "")

    def pids(self) -> dict[str, int]:
        """Return its processes by name, as the host sees them."""
        return {name: FIRST_PID + self.number * 8 + n for n, name in enumerate(PROCESSES)}

    def life(self) -> Life:
        """Return what has become of it until now."""
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
            # As the engine does: after 0.1 s, and twice as long each time.
            again = begin + CRASH_AFTER + min(0.1 * 2**restarts, 60)
            if now < again:
                return Life("restarting", restarts, begin, 1)
            begin, restarts = again, restarts + 1
        return Life("running", restarts, begin)

    def loaded(self) -> float:
        """Return how far the server is: 0 just started, 1 and more answers."""
        if self.crash or self.life().status != "running":
            return 0
        return (time.time() - self.started) / self.delay if self.delay else 1

    def document(self) -> dict[str, Any]:
        """Return what `docker inspect` shows of it."""
        life = self.life()
        running = life.status == "running"
        config = {key: one for key, one in self.body.items() if key not in ("HostConfig", "NetworkingConfig")}
        asked = (self.body.get("NetworkingConfig") or {}).get("EndpointsConfig")
        networks = asked or {self.settings.get("NetworkMode") or "bridge": {}}
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
                **(
                    {"Health": {"Status": "healthy" if self.loaded() >= 1 else "starting"}} if running else {}
                ),
            },
            "Image": self.image_id,
            "RestartCount": life.restarts,
            "HostConfig": self.settings,
            "Config": {**config, "Entrypoint": config.get("Entrypoint") or ["vllm", "serve"]},
            "NetworkSettings": {
                "Networks": {name: {**(one or {}), "NetworkID": name} for name, one in networks.items()}
            },
            "Mounts": [],
        }

    def log(self) -> list[str]:
        """Return what the server has written since its last start."""
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
    """Return a time as the engine writes it; 0 is never."""
    if not when:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
