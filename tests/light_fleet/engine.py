"""Docker Engine for all light hosts, in one process: the part of its API that docker and Compose use here.

Answers follow from what was created, the host's cards and its faults; an unknown call
is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import resource
import struct
import sys
from pathlib import Path
from typing import Any

from tests.light_fleet.cards import read_json, smi, write_json
from tests.light_fleet.container import Container
from tests.light_fleet.host import Host, RefusedError, image_id
from tests.light_fleet.http import Reply, Request, serve

ENGINE = "20.10.24"
VERSION = {"Version": ENGINE, "ApiVersion": "1.41", "MinAPIVersion": "1.12", "Os": "linux", "Arch": "amd64"}


def passes(filters: str, name: str, labels: dict[str, str]) -> bool:
    """Whether the --filter options match this name and these labels."""
    wanted: dict[str, Any] = json.loads(filters or "{}")
    if wanted.keys() - {"name", "label", "dangling"}:
        raise NotImplementedError(filters)
    pairs = {*labels, *(f"{key}={value}" for key, value in labels.items())}
    names = wanted.get("name") or []
    return pairs >= {*wanted.get("label", [])} and (not names or any(re.search(n, name) for n in names))


def frames(text: str) -> bytes:
    """Return a container's output as a frame of Docker's stream format."""
    data = text.encode()
    return struct.pack(">BxxxL", 1, len(data)) + data


class Engine:
    """One host's engine."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.execs: list[tuple[Container, list[str], int]] = []

    async def answer(self, request: Request) -> Reply:
        kind, *words = request.words[1:] if re.fullmatch(r"v\d\.\d+", request.words[0]) else request.words
        try:
            reply: Reply = await getattr(self, kind.strip("_"))(request, request.method, *words)
        except RefusedError as error:
            return Reply(error.status, {"message": str(error)})
        except Exception as error:  # noqa: BLE001 - the caller must see any
            line = f"{request.method} /{'/'.join(request.words)}"
            return Reply(501, {"message": f"light host: not simulated: {line} ({error!r})"})
        return reply

    async def ping(self, *_: object) -> Reply:
        return Reply(200, b"OK")

    async def version(self, *_: object) -> Reply:
        return Reply(200, VERSION)

    async def info(self, *_: object) -> Reply:
        runtimes = {"nvidia": {"path": "nvidia-container-runtime"}, "runc": {"path": "runc"}}
        # /opt is the host's only own directory; nothing is stored there.
        return Reply(200, {
            "ServerVersion": ENGINE, "Runtimes": runtimes, "DefaultRuntime": "runc", "DockerRootDir": "/opt",
            "Name": self.host.directory.name, "OSType": "linux", "Architecture": "x86_64",
        })  # fmt: skip

    async def containers(self, request: Request, method: str, *words: str) -> Reply:  # noqa: C901, PLR0911
        host, query = self.host, request.query
        if words == ("json",):
            return Reply(200, self.rows(query))
        if words == ("create",):
            return Reply(201, {"Id": host.create(query["name"], request.body).id, "Warnings": []})
        box = host.find(words[0])
        match [method, *words[1:]]:
            case ["GET", "json"]:
                return Reply(200, box.document())
            case ["POST", "start"]:
                await host.start(box)
                return Reply(204)
            case ["POST", "stop"]:
                host.stop(box)
                return Reply(204)
            case ["POST", "rename"]:
                box.name = query["name"]
                host.save()
                return Reply(204)
            case ["DELETE"]:
                host.remove(box)
                return Reply(204)
            case ["GET", "logs"]:
                lines = box.log()[-int(query["tail"]) if query["tail"].isdigit() else None :]
                return Reply(200, frames("".join(f"{line}\n" for line in lines)))
            case ["GET", "top"]:
                return Reply(200, self.top(box, query["ps_args"]))
            case ["POST", "exec"]:
                self.running(box)
                if request.body["Cmd"][0] != "nvidia-smi":
                    raise NotImplementedError(request.body["Cmd"])
                self.execs.append((box, request.body["Cmd"], 0))
                return Reply(201, {"Id": str(len(self.execs) - 1)})
        raise NotImplementedError

    def running(self, box: Container) -> None:
        """Refuse a call for a container that doesn't run."""
        status = box.life().status
        if status == "restarting":
            raise RefusedError(f"Container {box.id} is restarting, wait until the container is running", 409)
        if status != "running":
            raise RefusedError(f"Container {box.id} is not running", 409)

    def rows(self, query: dict[str, str]) -> list[dict[str, Any]]:
        """The output of `docker ps`."""
        rows = []
        for box in self.host.containers:
            document, labels = box.document(), box.body.get("Labels") or {}
            state = document["State"]
            shown = query.get("all") or state["Running"]
            if shown and passes(query.get("filters", ""), f"/{box.name}", labels):
                rows.append({
                    "Id": box.id, "Names": [f"/{box.name}"], "Image": box.body["Image"], "ImageID": box.image_id,
                    "Created": int(box.created), "State": state["Status"], "Status": state["Status"],
                    "Labels": labels, "NetworkSettings": document["NetworkSettings"], "Ports": [],
                })  # fmt: skip
        return rows

    def top(self, box: Container, columns: str) -> dict[str, Any]:
        """The output of `docker top`."""
        self.running(box)
        titles = {"-eo pid": ["PID"], "-eo pid,comm": ["PID", "COMMAND"]}[columns]
        rows = [[str(pid), name][: len(titles)] for name, pid in box.pids().items()]
        return {"Titles": titles, "Processes": rows}

    async def exec(self, _: Request, method: str, number: str, _verb: str) -> Reply:
        box, words, code = self.execs[int(number)]
        if method == "GET":
            return Reply(200, {"ID": number, "Running": False, "ExitCode": code, "ContainerID": box.id})
        text, code = smi(self.host.directory, words[1:], inside=box.cards)
        self.execs[int(number)] = (box, words, code)
        return Reply(101, frames(text))

    async def images(self, request: Request, method: str, *words: str) -> Reply:
        images, query = self.host.images, request.query
        if words == ("create",):
            image = f"{query['fromImage'].removeprefix('docker.io/')}:{query['tag']}"
            images[image] = image_id(image)
            self.host.save()
            return Reply(200, {"status": f"Status: Downloaded newer image for {image}"})
        *parts, verb = words
        name = "/".join(parts)
        id_ = images.get(name, name)
        if id_ not in images.values():
            raise RefusedError(f"No such image: {name}", 404)
        if verb == "tag":
            images[f"{query['repo']}:{query['tag']}"] = id_
            self.host.save()
            return Reply(201)
        if (method, verb) != ("GET", "json"):
            raise NotImplementedError
        tags = [tag for tag, image in images.items() if image == id_]
        document = {"Id": id_, "RepoTags": tags, "RepoDigests": [], "Os": "linux", "Architecture": "amd64"}
        return Reply(200, document)

    async def networks(self, request: Request, method: str, *words: str) -> Reply:
        return Reply(201 if method == "POST" else 200, self.thing("networks", request, method, words))

    async def volumes(self, request: Request, method: str, *words: str) -> Reply:
        rows = self.thing("volumes", request, method, words)
        return Reply(201 if method == "POST" else 200, rows if words else {"Volumes": rows})

    def thing(self, kind: str, request: Request, method: str, words: tuple[str, ...]) -> Any:  # noqa: ANN401 - JSON
        """List, inspect, create or remove networks or volumes."""
        things = self.host.things[kind]
        match [method, *words]:
            case ["GET"]:
                filters = request.query.get("filters", "")
                return [v for name, v in things.items() if passes(filters, name, v.get("Labels") or {})]
            case ["POST", "create"]:
                name = request.body["Name"]
                more = {"Id": name, "Driver": "local", "Mountpoint": "/nonexistent"}
                things.setdefault(name, {**request.body, **more})
                self.host.save()
                return things[name]
            case ["GET", name] if name in things:
                return things[name]
            case ["DELETE", name] if name in things:
                gone = things.pop(name)
                self.host.save()
                return gone
            case ["GET" | "DELETE", name]:
                raise RefusedError(f"{kind[:-1]} {name} not found", 404)
        raise NotImplementedError


class Engines:
    """The engines of all hosts in a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.hosts: dict[str, tuple[Host, asyncio.Server]] = {}

    async def open(self, name: str) -> None:
        """Start to answer on a host's docker.sock, and on the ports of its containers."""
        host = Host(self.directory / name)
        for box in host.containers:
            if box.life().status not in ("created", "exited"):
                with contextlib.suppress(RefusedError):
                    await host.listen(box)
        # Through /proc, as the path of a socket may have 107 characters only.
        directory = os.open(host.directory / "run", os.O_PATH)
        api = await asyncio.start_unix_server(
            serve(Engine(host).answer), f"/proc/self/fd/{directory}/docker.sock"
        )
        os.close(directory)
        self.hosts[name] = host, api

    def close(self, name: str) -> None:
        """Stop to answer for a host that was removed."""
        host, api = self.hosts.pop(name)
        api.close()
        for box in host.containers:
            for port in host.ports.get(box.id, []):
                port.close()

    async def live(self) -> None:
        """Answer until the directory is removed or has another engine."""
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        mine = None
        while mine in (None, read_json(self.directory / "engine.json").get("pid")):
            names = {path.name for path in self.directory.glob("light-*")}
            for name in sorted(names - self.hosts.keys()):
                await self.open(name)
            for name in self.hosts.keys() - names:
                self.close(name)
            if not mine:
                mine = os.getpid()
                write_json(self.directory / "engine.json", {"pid": mine})
            await asyncio.sleep(0.2)


if __name__ == "__main__":
    asyncio.run(Engines(Path(sys.argv[1])).live())
