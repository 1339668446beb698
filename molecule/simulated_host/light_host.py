"""One light host as its engine, its driver and its clients see it: images, a container, cards, an API."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import nvidia_smi
import simulated_gpu

CONTAINER = "vllm-server"
IMAGE = "vllm/vllm-openai:v0.32.0"
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


class Answer(NamedTuple):
    """What a program says, and how it ends."""

    code: int = 0
    out: str = ""
    err: str = ""


class RefusedError(Exception):
    """The engine says no, in these words."""


class Life(NamedTuple):
    """What has become of a container until now."""

    status: str
    restarts: int = 0
    started: float = 0
    exit_code: int = 0


@dataclasses.dataclass
class Container:
    """What the engine knows of its only container."""

    id: str
    created: float
    service: dict[str, Any]
    image_id: str
    labels: dict[str, str]
    # How many there were before; its processes have PIDs of their own.
    count: int = 0
    started: float = 0
    stopped: bool = False
    error: str = ""
    # What it was given when it was started.
    cards: list[str] = dataclasses.field(default_factory=list)
    crash: str = ""
    delay: float = 0

    @property
    def command(self) -> list[str]:
        """The server's command line."""
        return [str(word) for word in self.service["command"]]

    @property
    def restart(self) -> str:
        """The restart policy."""
        return str(self.service.get("restart", "no"))

    @property
    def devices(self) -> list[dict[str, Any]]:
        """The service's requests for devices."""
        reservations = self.service.get("deploy", {}).get("resources", {}).get("reservations", {})
        return list(reservations.get("devices", []))

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


class Card(simulated_gpu.Card):
    """A card of a light host; what is held of it stands among its properties."""

    @property
    def held(self) -> int:
        """MiB that the container's server holds."""
        return int(self.properties["held"])

    @property
    def used_mib(self) -> int:
        """What is in use of it."""
        return self.held + simulated_gpu.DRIVER_MIB if self.held else 0


class Driver:
    """What nvidia_smi.py asks in the place of simulated_gpu.py: one host's cards."""

    LostCardError = simulated_gpu.LostCardError

    def __init__(self, description: dict[str, Any], cards: list[Card], pid: int) -> None:
        """Show these cards, with this process on those that are held."""
        self.description, self.cards, self.pid = description, cards, pid

    def visible_cards(self) -> list[Card]:
        """Return the cards."""
        return self.cards

    def read_json(self, _name: str) -> dict[str, Any]:
        """Return the description of the driver."""
        return self.description

    def fault(self, _name: str) -> str:
        """Say that this driver works: light hosts have no fault there."""
        return ""

    def processes(self, card: Card) -> dict[int, int]:
        """Return the MiB that each process holds, by PID."""
        return {self.pid: card.held} if card.held else {}

    def is_tenant(self, _pid: int) -> bool:
        """Say that nobody else uses the cards."""
        return False

    def process_name(self, _pid: int) -> str:
        """Return what the only process there can be calls itself."""
        return "VLLM::EngineCore"


class Host:
    """One light host."""

    def __init__(self, directory: Path) -> None:
        """Take up what the directory holds."""
        self.directory = directory
        self.name = directory.name
        self.number = int(self.name.rpartition("-")[2])
        self.port: asyncio.Server | None = None
        # What the Compose plugin said to the last few questions.
        self.said: dict[tuple[object, ...], Answer] = {}
        state = read_json(directory / "state.json")
        self.images: dict[str, str] = state.get("images") or {IMAGE: image_id(IMAGE)}
        box = state.get("container")
        self.container = Container(**box) if box else None
        # What can be made again from its description.
        self.removed: dict[str, Container] = {}
        self.api: asyncio.Server | None = None

    def save(self) -> None:
        """Keep the state, for people and for the next engine."""
        box = self.container and dataclasses.asdict(self.container)
        write_json(self.directory / "state.json", {"images": self.images, "container": box})

    def fault(self, name: str) -> str:
        """Return how the host was told to misbehave just now; empty for not at all."""
        return str(read_json(self.directory / "faults.json").get(name, ""))

    # --- its cards ----------------------------------------------------------

    def pids(self) -> dict[str, int]:
        """Return the container's processes by name, as the host sees them."""
        count = self.container.count if self.container else 0
        first = FIRST_PID + (self.number * 1000 + count % 1000) * 8
        return {name: first + n for n, name in enumerate(PROCESSES)}

    def cards(self) -> list[Card]:
        """Return the host's cards, with what is held of them just now."""
        box = self.container
        # A process shows up on its card some time after its start.
        given = box.cards if box and box.loaded() >= 0.5 else []
        share = float(argument(box.command, "--gpu-memory-utilization", ["0.9"])[0]) if box else 0
        cards = []
        for index, properties in enumerate(read_json(self.directory / "cards.json")["cards"]):
            card = Card(index, index, {**properties, "held": 0}, Path("/nonexistent"))
            if card.uuid in given:
                # The first one is worked on; every other one gets a context.
                first = card.uuid == given[0]
                held = int(card.usable_mib * share) if first else simulated_gpu.CONTEXT_MIB
                card.properties["held"] = held
            cards.append(card)
        return cards

    def smi(self, arguments: Sequence[str], *, inside: bool = False) -> Answer:
        """Answer nvidia-smi, on the host or inside the container."""
        cards = self.cards()
        if inside and self.container:
            given = [card for card in cards if card.uuid in self.container.cards]
            cards = [Card(n, card.minor, card.properties, card.path) for n, card in enumerate(given)]
        description = read_json(self.directory / "cards.json")
        # One call at a time has its eyes: nothing in there waits.
        vars(nvidia_smi)["gpu"] = Driver(description, cards, self.pids()[PROCESSES[-1]])
        said, code = io.StringIO(), 0
        with contextlib.redirect_stdout(said):
            try:
                nvidia_smi.main(list(arguments))
            except SystemExit as end:
                code = int(end.code or 0)
        return Answer(code, said.getvalue())

    # --- its container ------------------------------------------------------

    def close(self) -> None:
        """Close the container's port."""
        if self.port:
            self.port.close()
        self.port = None

    def remove(self) -> None:
        """Take the container away."""
        self.close()
        if self.container:
            self.removed[json.dumps(self.container.labels, sort_keys=True)] = self.container
        self.container = None
        self.save()

    def create_again(self, labels: Mapping[str, str]) -> str:
        """Make a container like the removed one of these labels, and return its id."""
        like = self.removed[json.dumps(labels, sort_keys=True)]
        id_ = secrets.token_hex(32)
        self.container = dataclasses.replace(
            like,
            id=id_,
            created=time.time(),
            started=0,
            stopped=False,
            cards=[],
            error="",
            count=like.count + 1,
        )
        self.save()
        return id_

    def stop(self, box: Container) -> None:
        """Stop the container."""
        self.close()
        box.stopped, box.cards = True, []
        self.save()

    async def create(self, service: dict[str, Any], image: str, labels: dict[str, str]) -> None:
        """Make a container in the place of the one that may be there, and start it."""
        count = self.container.count + 1 if self.container else 0
        self.remove()
        self.container = Container(secrets.token_hex(32), time.time(), service, image, labels, count)
        await self.start(self.container)

    async def start(self, box: Container) -> None:
        """Start the container, or note why it can't be."""
        self.close()
        try:
            asked = [card for request in box.devices for card in self.asked(request)]
            given = asked
            if hits(self.fault("wrong_card"), asked):
                given = [card for card in self.cards() if card not in asked][:1]
            box.cards = [card.uuid for card in given]
            box.crash = hits(self.fault("crash"), given)
            box.delay = float(self.fault("start_delay") or 0)
            box.error, box.stopped = "", False
            await self.listen(box)
            box.started = time.time()
        except RefusedError as error:
            box.error = str(error).removeprefix("Error response from daemon: ")
            raise
        finally:
            self.save()

    def asked(self, request: Mapping[str, Any]) -> list[Card]:
        """Return the cards that a service asks for: certain ones, or a number of them."""
        if "device_ids" in request:
            return [self.find(str(name)) for name in request["device_ids"]]
        count = int(request.get("count", 0))
        return self.cards() if count < 0 else self.cards()[:count]

    def find(self, name: str) -> Card:
        """Return the card of that index, UUID or bus id, or refuse as NVIDIA's hook does."""
        for card in self.cards():
            if card.is_called(name):
                return card
        raise RefusedError(
            "Error response from daemon: failed to create shim task: OCI runtime create failed: runc create failed: "
            "unable to start container process: error during container init: error running hook #0: error running "
            "hook: exit status 1, stdout: , stderr: Auto-detected mode as 'legacy'\n"
            f"nvidia-container-cli: device error: {name}: unknown device: unknown"
        )

    async def listen(self, box: Container) -> None:
        """Open the published port, as the engine does before the server answers."""
        for port in box.service.get("ports", []):
            address, number = str(port.get("host_ip") or "0.0.0.0"), int(port["published"])  # noqa: S104
            try:
                self.port = await asyncio.start_server(self.serve, address, number)
            except OSError as error:
                raise RefusedError(
                    "Error response from daemon: driver failed programming external connectivity on endpoint "
                    f"{CONTAINER}: Error starting userland proxy: listen tcp4 {address}:{number}: bind: "
                    f"{os.strerror(error.errno or 0).lower()}"
                ) from error

    def document(self, box: Container) -> dict[str, Any]:
        """Return what `docker inspect` shows of the container."""
        life, service = box.life(), box.service
        running = life.status == "running"
        health = {"Status": "healthy" if box.loaded() >= 1 else "starting"}
        return {
            "Id": box.id,
            "Created": moment(box.created),
            "Name": f"/{CONTAINER}",
            "State": {
                "Status": life.status,
                "Running": life.status in ("running", "restarting"),
                "Restarting": life.status == "restarting",
                "OOMKilled": False,
                "Pid": self.pids()[PROCESSES[0]] if running else 0,
                "ExitCode": life.exit_code,
                "Error": box.error,
                "StartedAt": moment(life.started),
                **({"Health": health} if running else {}),
            },
            "Image": box.image_id,
            "RestartCount": life.restarts,
            "HostConfig": {
                "PortBindings": {
                    f"{port['target']}/{port['protocol']}": [
                        {"HostIp": port.get("host_ip", ""), "HostPort": str(port["published"])}
                    ]
                    for port in service.get("ports", [])
                },
                "RestartPolicy": {"Name": box.restart, "MaximumRetryCount": 0},
                "DeviceRequests": [device_request(one) for one in box.devices] or None,
            },
            "Config": {
                "Env": [f"{key}={value}" for key, value in service.get("environment", {}).items()],
                "Cmd": box.command,
                "Entrypoint": ["vllm", "serve"],
                "Image": service["image"],
                "StopTimeout": seconds(service.get("stop_grace_period", "10s")),
                "Labels": box.labels,
            },
        }

    def log(self, box: Container) -> list[str]:
        """Return what the server has written since its last start."""
        if box.life().status == "created":
            return []
        pids = self.pids()
        server, engine = f"(APIServer pid={pids['vllm']})", f"(EngineCore pid={pids[PROCESSES[-1]]})"
        lines = [f"{server} INFO vLLM API server version 0.32.0, model {box.command[0]}"]
        if box.crash:
            trouble = "RuntimeError: simulated failure while the engine started"
            return [*lines, f"{engine} ERROR EngineCore failed to start.", f"{engine} {trouble}"]
        if box.loaded() < 1:
            part = f"{100 * box.loaded():>3.0f}% Completed"
            return [*lines, f"{engine} Loading safetensors checkpoint shards: {part}"]
        return [*lines, f"{server} INFO:     Application startup complete."]

    # --- its API ------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one request; not at all as long as the server isn't ready."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).decode("latin-1")
            box = self.container
            if box and box.loaded() >= 1 and self.fault("health") != "closed":
                status, body = self.reply(box, head)
                writer.write(
                    f"HTTP/1.1 {status}\r\nServer: uvicorn\r\nContent-Type: application/json\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
                )
                await writer.drain()
        writer.close()

    def reply(self, box: Container, head: str) -> tuple[str, str]:
        """Return the status and the body for a request."""
        path = head.split()[1].partition("?")[0]
        key = str(box.service.get("environment", {}).get("VLLM_API_KEY") or "")
        sent = re.search(r"^authorization: bearer (.*?)\r$", head, re.IGNORECASE | re.MULTILINE)
        if path == "/health":
            return ("503 Service Unavailable" if self.fault("health") == "503" else "200 OK"), ""
        if path != "/v1/models":
            return "404 Not Found", '{"detail":"Not Found"}'
        if key and not (sent and hmac.compare_digest(sent[1].encode(), key.encode())):
            return "401 Unauthorized", '{"error":"Unauthorized"}'
        names = argument(box.command, "--served-model-name", box.command[:1])
        data = [{"id": name, "object": "model", "owned_by": "vllm"} for name in names]
        return "200 OK", json.dumps({"object": "list", "data": data})


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that may not be there (yet)."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return value


def write_json(path: Path, value: object) -> None:
    """Write a file that is never seen half-written; only its owner may read it."""
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def moment(when: float) -> str:
    """Return a time as the engine writes it; 0 is never."""
    if not when:
        return "0001-01-01T00:00:00Z"
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def seconds(text: str) -> int:
    """Return the seconds of a Go duration such as 1m30s."""
    factors = {"h": 3600, "m": 60, "s": 1}
    return int(sum(float(number) * factors[unit] for number, unit in re.findall(r"([\d.]+)([hms])", text)))


def image_id(image: str) -> str:
    """Return the id that an image of this name has on every host."""
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()


def device_request(device: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the engine notes what a service asks for."""
    return {
        "Driver": device.get("driver", ""),
        "Count": device.get("count", 0),
        "DeviceIDs": device.get("device_ids"),
        "Capabilities": [device.get("capabilities", [])],
        "Options": None,
    }


def argument(command: Sequence[str], name: str, default: Sequence[str]) -> list[str]:
    """Return the words that stand behind an option; the last one of that name counts."""
    values: list[str] = []
    for position, word in enumerate(command):
        if word.startswith(name + "="):
            values = [word.partition("=")[2]]
        elif word == name:
            values = []
            for one in command[position + 1 :]:
                if one.startswith("-"):
                    break
                values.append(one)
    return values or list(default)


def hits(fault: str, cards: Sequence[Card]) -> str:
    """Return the fault where it means one of these cards, or nothing."""
    return fault if fault == "any" or fault in [str(card.index) for card in cards] else ""
