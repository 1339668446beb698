"""One light host as its engine knows it: images, containers, what they are given, and the API of the server in one."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import io
import os
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import vllm_stand_in
from images import DEFAULT_IMAGE

from tests.light_fleet.cards import Card, Driver, read_json, write_json
from tests.light_fleet.http import Reply, Request, serve

# Above every PID that a kernel gives, so that no fake one is another's.
FIRST_PID = 2**22 + 8
PROCESSES = ("docker-init", "vllm", "python3", "VLLM::EngineCor")
# How long a server lives that crashes while it starts; seconds.
CRASH_AFTER = 0.3

FAULTS = {
    "crash": "servers that are given this card (index, or any) crash while they start",
    "wrong_card": "servers that ask for this card (index, or any) are given another one",
    "pull": "an image that isn't there can't be pulled: missing (in the registry) | cut (off half-way)",
    "nvidia_smi": "missing",
    "start_delay": "seconds from a server's start until it answers",
    "health": "503 | closed (the API never answers)",
}


class RefusedError(Exception):
    """The engine says no, in these words."""

    def __init__(self, message: str, status: int = 500) -> None:
        """Say so with that status."""
        super().__init__(message)
        self.status = status


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


class Host:
    """One light host."""

    def __init__(self, directory: Path) -> None:
        """Take up what the directory holds."""
        self.directory = directory
        state = read_json(directory / "state.json")
        self.images: dict[str, str] = state.get("images") or {DEFAULT_IMAGE: image_id(DEFAULT_IMAGE)}
        self.containers = [Container(**one) for one in state.get("containers", [])]
        # Networks and volumes, as they were created.
        self.things: dict[str, dict[str, Any]] = state.get("things") or {"networks": {}, "volumes": {}}
        self.count: int = state.get("count", 0)
        self.ports: dict[str, list[asyncio.Server]] = {}

    def save(self) -> None:
        """Keep the state, for people and for the next engine."""
        boxes = [dataclasses.asdict(box) for box in self.containers]
        state = {"images": self.images, "containers": boxes, "things": self.things, "count": self.count}
        write_json(self.directory / "state.json", state)

    def fault(self, name: str) -> str:
        """Return how the host was told to misbehave just now; empty for not at all."""
        return str(read_json(self.directory / "faults.json").get(name, ""))

    def find(self, name: str) -> Container:
        """Return the container of that name or id."""
        for box in self.containers:
            if name == box.name or (len(name) >= 12 and box.id.startswith(name)):
                return box
        raise RefusedError(f"No such container: {name}", 404)

    def create(self, name: str, body: dict[str, Any]) -> Container:
        """Make a container, and don't start it."""
        image = self.images.get(body["Image"], body["Image"])
        if image not in self.images.values():
            raise RefusedError(f"No such image: {body['Image']}", 404)
        if name in [box.name for box in self.containers]:
            raise RefusedError(f'Conflict. The container name "/{name}" is already in use', 409)
        self.count += 1
        number = int(self.directory.name.rpartition("-")[2]) * 1000 + self.count % 1000
        id_ = hashlib.sha256(f"{self.directory} {self.count} {time.time()}".encode()).hexdigest()
        self.containers.append(Container(id_, name, number, time.time(), body, image))
        self.save()
        return self.containers[-1]

    def close(self, box: Container) -> None:
        """Take its port and its cards from a container."""
        for port in self.ports.pop(box.id, []):
            port.close()
        if box.cards and box.started:
            (self.directory / "held.json").unlink(missing_ok=True)
        box.cards = []

    def stop(self, box: Container) -> None:
        """Stop the container."""
        self.close(box)
        box.stopped = True
        self.save()

    def remove(self, box: Container) -> None:
        """Take the container away."""
        self.close(box)
        self.containers.remove(box)
        self.save()

    async def start(self, box: Container) -> None:
        """Start the container, or note why it can't be."""
        self.close(box)
        try:
            asked = [
                card for request in box.settings.get("DeviceRequests") or [] for card in self.asked(request)
            ]
            given = asked
            if hits(self.fault("wrong_card"), asked):
                given = [card for card in Driver(self.directory, None).cards if card not in asked][:1]
            await self.listen(box)
            box.error, box.stopped = "", False
            self.run(box, given)
        except RefusedError as error:
            box.error = str(error)
            raise
        finally:
            self.save()

    def run(self, box: Container, given: list[Card]) -> None:
        """Do what the container's program does: read its command line, and take memory of its cards."""
        box.delay, box.started = float(self.fault("start_delay") or 0), time.time()
        box.crash = "RuntimeError: simulated failure while the engine started" * bool(
            hits(self.fault("crash"), given)
        )
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                options = vllm_stand_in.parse(box.body.get("Cmd") or [])
            except SystemExit:
                box.names, box.crash = ["?"], said.getvalue().strip()
                return
        box.names = options.served_model_name or [options.model_tag or options.model]
        box.cards = [card.uuid for card in given]
        if not box.crash:
            share = options.gpu_memory_utilization or 0.9
            since, pid = box.started + box.delay / 2, box.pids()[PROCESSES[-1]]
            write_json(
                self.directory / "held.json", {"cards": box.cards, "share": share, "since": since, "pid": pid}
            )

    def asked(self, request: dict[str, Any]) -> list[Card]:
        """Return the cards that a container asks for: certain ones, or a number of them."""
        cards = Driver(self.directory, None).cards
        if not request.get("DeviceIDs"):
            return cards if request["Count"] < 0 else cards[: request["Count"]]
        found = []
        for name in request["DeviceIDs"]:
            match = [card for card in cards if card.is_called(name)]
            if not match:
                raise RefusedError(
                    "failed to create shim task: OCI runtime create failed: runc create failed: unable to start "
                    "container process: error during container init: error running hook #0: error running hook: exit "
                    "status 1, stdout: , stderr: Auto-detected mode as 'legacy'\n"
                    f"nvidia-container-cli: device error: {name}: unknown device: unknown"
                )
            found += match
        return found

    async def listen(self, box: Container) -> None:
        """Open the published ports, as the engine does before the server answers."""

        async def answer(request: Request) -> Reply | None:
            return self.reply(box, request)

        for address, port in box.ports:
            try:
                server = await asyncio.start_server(serve(answer), address, port)
            except OSError as error:
                raise RefusedError(
                    f"driver failed programming external connectivity on endpoint {box.name}: Error starting userland "
                    f"proxy: listen tcp4 {address}:{port}: bind: {os.strerror(error.errno or 0).lower()}"
                ) from error
            self.ports.setdefault(box.id, []).append(server)

    def reply(self, box: Container, request: Request) -> Reply | None:
        """Answer a request to the server's API; not at all as long as the server isn't ready."""
        if box.loaded() < 1 or self.fault("health") == "closed":
            return None
        if request.words == ["health"]:
            return Reply(503 if self.fault("health") == "503" else 200)
        if request.words != ["v1", "models"]:
            return Reply(404, {"detail": "Not Found"})
        key, sent = box.environment("VLLM_API_KEY"), request.headers.get("authorization", "")
        if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return Reply(401, {"error": "Unauthorized"})
        data = [{"id": name, "object": "model", "owned_by": "vllm"} for name in box.names]
        return Reply(200, {"object": "list", "data": data})


def moment(when: float) -> str:
    """Return a time as the engine writes it; 0 is never."""
    if not when:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def image_id(image: str) -> str:
    """Return the id that an image of this name has on every host."""
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


def hits(fault: str, cards: Sequence[Card]) -> str:
    """Return the fault where it means one of these cards, or nothing."""
    return fault if fault == "any" or fault in [str(card.index) for card in cards] else ""
