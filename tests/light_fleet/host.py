"""One light host as its engine stores it: images, containers, ports, and the API of the server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import io
import os
import time
from pathlib import Path
from typing import Any

import vllm_stand_in
from images import DEFAULT_IMAGE

from tests.light_fleet.cards import Card, Driver, read_json, write_json
from tests.light_fleet.container import PROCESSES, Container
from tests.light_fleet.http import Reply, Request, serve


class RefusedError(Exception):
    """The engine refuses a call, with this message and HTTP status."""

    def __init__(self, message: str, status: int = 500) -> None:
        super().__init__(message)
        self.status = status


class Host:
    """One light host."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        state = read_json(directory / "state.json")
        self.images: dict[str, str] = state.get("images") or {DEFAULT_IMAGE: image_id(DEFAULT_IMAGE)}
        self.containers = [Container(**fields) for fields in state.get("containers", [])]
        # Networks and volumes, as they were created.
        self.things: dict[str, dict[str, Any]] = state.get("things") or {"networks": {}, "volumes": {}}
        self.count: int = state.get("count", 0)
        self.ports: dict[str, list[asyncio.Server]] = {}

    def save(self) -> None:
        boxes = [dataclasses.asdict(box) for box in self.containers]
        state = {"images": self.images, "containers": boxes, "things": self.things, "count": self.count}
        write_json(self.directory / "state.json", state)

    def fault(self, name: str) -> str:
        return str(read_json(self.directory / "faults.json").get(name, ""))

    def find(self, name: str) -> Container:
        for box in self.containers:
            if name == box.name or (len(name) >= 12 and box.id.startswith(name)):
                return box
        raise RefusedError(f"No such container: {name}", 404)

    def create(self, name: str, body: dict[str, Any]) -> Container:
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
        """Free the container's ports and cards."""
        for port in self.ports.pop(box.id, []):
            port.close()
        if box.cards and box.started:
            (self.directory / "held.json").unlink(missing_ok=True)
        box.cards = []

    def stop(self, box: Container) -> None:
        self.close(box)
        box.stopped = True
        self.save()

    def remove(self, box: Container) -> None:
        self.close(box)
        self.containers.remove(box)
        self.save()

    async def start(self, box: Container) -> None:
        """Start the container, or store why that failed."""
        self.close(box)
        try:
            requests = box.settings.get("DeviceRequests") or []
            cards = [card for request in requests for card in self.requested(request)]
            await self.listen(box)
            box.error, box.stopped = "", False
            self.run(box, cards)
        except RefusedError as error:
            box.error = str(error)
            raise
        finally:
            self.save()

    def run(self, box: Container, cards: list[Card]) -> None:
        """Do what the container's program does: read its command line, and take memory of its cards."""
        crash = self.fault("crash")
        box.delay, box.started = float(self.fault("start_delay") or 0), time.time()
        failure = "RuntimeError: simulated failure while the engine started"
        box.crash = failure if crash == "any" or crash in [str(card.index) for card in cards] else ""
        with contextlib.redirect_stderr(io.StringIO()) as usage:
            try:
                options = vllm_stand_in.parse(box.body.get("Cmd") or [])
            except SystemExit:
                box.names, box.crash = ["?"], usage.getvalue().strip()
                return
        box.names = options.served_model_name or [options.model_tag or options.model]
        box.cards = [card.uuid for card in cards]
        if not box.crash:
            share = options.gpu_memory_utilization or 0.9
            since, pid = box.started + box.delay / 2, box.pids()[PROCESSES[-1]]
            held = {"cards": box.cards, "share": share, "since": since, "pid": pid}
            write_json(self.directory / "held.json", held)

    def requested(self, request: dict[str, Any]) -> list[Card]:
        """Return the cards of a device request: certain ones, or a number of them."""
        cards = Driver(self.directory).cards
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
        """Open the published ports, as Docker does before the server answers."""

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
        """Answer a request to the server's API, once it is ready."""
        if box.loaded() < 1:
            return None
        if request.words == ["health"]:
            return Reply()
        if request.words != ["v1", "models"]:
            return Reply(404, {"detail": "Not Found"})
        key, sent = box.environment("VLLM_API_KEY"), request.headers.get("authorization", "")
        if key and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
            return Reply(401, {"error": "Unauthorized"})
        data = [{"id": name, "object": "model", "owned_by": "vllm"} for name in box.names]
        return Reply(200, {"object": "list", "data": data})


def image_id(image: str) -> str:
    """Return the id of an image with this name, the same on every host."""
    return "sha256:" + hashlib.sha256(image.encode()).hexdigest()
