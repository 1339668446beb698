#!/usr/bin/env python3
"""The Docker engines of all light hosts (see light_fleet.py), in one process.

A host's `docker` and `nvidia-smi` are light_cli, which asks here. What is
answered follows from what `up` was given, the host's cards and its faults,
never from what a test hopes for; a call that isn't known is refused. Words and
formats are those of Engine 20.10, Compose 2.26 and driver 580. What a compose
file means is not guessed: the real Compose plugin is asked, once for each
different question.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import light_template
from light_host import CONTAINER, Answer, Container, Host, RefusedError, image_id, read_json, write_json
from machine import PLUGIN

LABEL = "com.docker.compose"
SERVICE = "vllm"
ENGINE = "20.10.24"
COMPOSE_VALUES = (
    *("--ansi", "--progress", "--project-directory", "--project-name", "--file", "--env-file"),
    *("--format", "--hash", "--pull"),
)
# Answers of Compose that are kept for a host.
KEPT = 8


class Call(NamedTuple):
    """One call of a host's program."""

    pid: int
    directory: str
    program: str
    arguments: Sequence[str]

    def environment(self) -> dict[str, str]:
        """Return what the caller's environment holds."""
        entries = Path(f"/proc/{self.pid}/environ").read_bytes().decode(errors="surrogateescape").split("\0")
        return dict(entry.split("=", 1) for entry in entries if "=" in entry)

    def path(self, name: str) -> Path:
        """Return where this process finds a file that the caller names."""
        path = os.path.join(self.directory, name)  # noqa: PTH118 (pathlib would drop the leading /)
        return Path(path if path.startswith("/proc/") else f"/proc/{self.pid}/root{path}")


def options_of(words: Sequence[str], with_value: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Split a command line into options (those without a value have an empty list) and other words."""
    options: dict[str, list[str]] = {}
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if word == "--" or not word.startswith("-"):
            others += [one for one in (word, *rest) if one != "--"] if word == "--" else [word]
        elif name in with_value:
            options.setdefault(name, []).append(value if equals else next(rest, ""))
        else:
            options[word] = []
    return options, others


def fits(box: Container, condition: str) -> bool:
    """Whether a --filter of `docker ps` lets the container through."""
    kind, _, value = condition.partition("=")
    if kind == "name":
        return bool(re.search(value, f"/{CONTAINER}"))
    if kind == "label":
        key, equals, label = value.partition("=")
        return box.labels.get(key) == label if equals else key in box.labels
    raise NotImplementedError


class Docker:
    """The docker command of one call."""

    def __init__(self, host: Host, call: Call) -> None:
        """Answer for this host."""
        self.host, self.call = host, call

    async def answer(self) -> Answer:
        """Answer the call."""
        words = list(self.call.arguments)
        while words[:1] == ["--host"]:
            del words[:2]
        commands: dict[str, Callable[[list[str]], Answer]] = {
            "version": self.version,
            "info": self.info,
            "inspect": self.inspect,
            "image": self.image,
            "ps": self.ps,
            "top": self.top,
            "exec": self.execute,
            "logs": self.logs,
            "manifest": self.manifest,
            "pull": self.pull,
            "stop": self.stop,
            "rm": self.remove,
            "network": self.nothing,
            "volume": self.nothing,
        }
        verb = words[0] if words else ""
        try:
            if verb == "compose":
                return await Compose(self.host, self.call, words[1:]).answer()
            if verb == "start":
                await self.host.start(self.find(words[1]))
                return Answer(0, f"{words[1]}\n")
            if verb in commands:
                return commands[verb](words[1:])
        except RefusedError as error:
            return Answer(1, "", f"{error}\n")
        raise NotImplementedError

    def formatted(self, options: Mapping[str, list[str]], *documents: object) -> Answer:
        """Return the documents in the form that --format asks for, each on a line."""
        if "--format" not in options:
            return Answer(0, json.dumps(documents) + "\n")
        form = options["--format"][0]
        return Answer(0, "".join(light_template.render(form, one) + "\n" for one in documents))

    def version(self, words: list[str]) -> Answer:
        """Answer `docker version`."""
        client = {"Version": ENGINE, "ApiVersion": "1.41", "Os": "linux", "Context": "default"}
        server = {"Version": ENGINE, "ApiVersion": "1.41", "MinAPIVersion": "1.12", "Os": "linux"}
        return self.formatted(options_of(words, ["--format"])[0], {"Client": client, "Server": server})

    def info(self, words: list[str]) -> Answer:
        """Answer `docker info`."""
        document = {
            "ServerVersion": ENGINE,
            "Runtimes": {"nvidia": {"path": "nvidia-container-runtime"}, "runc": {"path": "runc"}},
            "DefaultRuntime": "runc",
            "CDISpecDirs": None,
            # The only room that the host has; nothing is stored there.
            "DockerRootDir": "/opt",
            "Name": self.host.name,
            "ClientInfo": {"Version": ENGINE, "Plugins": []},
        }
        return self.formatted(options_of(words, ["--format"])[0], document)

    def find(self, name: str) -> Container:
        """Return the container, if it is called so."""
        box = self.host.container
        if box and (name == CONTAINER or (len(name) >= 12 and box.id.startswith(name))):
            return box
        raise RefusedError(f"Error response from daemon: No such container: {name}")

    def inspect(self, words: list[str]) -> Answer:
        """Answer `docker inspect`."""
        options, (name,) = options_of(words, ["--type", "--format"])
        try:
            return self.formatted(options, self.host.document(self.find(name)))
        except RefusedError as error:
            # An empty line, then the reason: as the real one does.
            known = options.get("--type") == ["container"]
            return Answer(1, "\n", f"{error}\n" if known else f"Error: No such object: {name}\n")

    def image(self, words: list[str]) -> Answer:
        """Answer `docker image inspect` and `docker image tag`."""
        verb, *rest = words
        options, names = options_of(rest, ["--format"])
        known = {**self.host.images, **{one: one for one in self.host.images.values()}}
        if names[0] not in known:
            missing = f"no such image: {names[0]}: No such image: {names[0]}"
            return Answer(1, "\n", f"Error response from daemon: {missing}\n")
        if verb == "inspect":
            tags = [tag for tag, one in self.host.images.items() if one == known[names[0]]]
            document = {"Id": known[names[0]], "RepoTags": tags, "RepoDigests": []}
            return self.formatted(options, document)
        if verb == "tag":
            self.host.images[names[1]] = known[names[0]]
            self.host.save()
            return Answer()
        raise NotImplementedError

    def ps(self, words: list[str]) -> Answer:
        """Answer `docker ps`."""
        options, _ = options_of(words, ["--filter", "--format"])
        box = self.host.container
        if not box or not all(fits(box, condition) for condition in options.get("--filter", [])):
            return Answer()
        status = box.life().status
        if status not in ("running", "restarting") and not {"--all", "-a"} & set(options):
            return Answer()
        short = box.id if "--no-trunc" in options else box.id[:12]
        if "--quiet" in options:
            return Answer(0, f"{short}\n")
        row = {"ID": short, "Names": CONTAINER, "Image": box.service["image"], "State": status}
        return self.formatted(options, row)

    def running(self, name: str) -> Container:
        """Return the container, or refuse where it doesn't run."""
        box = self.find(name)
        status = box.life().status
        if status == "restarting":
            raise RefusedError(
                f"Error response from daemon: Container {box.id} is restarting, wait until the container is running"
            )
        if status != "running":
            raise RefusedError(f"Error response from daemon: Container {box.id} is not running")
        return box

    def top(self, words: list[str]) -> Answer:
        """Answer `docker top`: the processes as they would be on the host."""
        name, *columns = words
        self.running(name)
        rows = {"PID": "COMMAND", **{str(pid): comm for comm, pid in self.host.pids().items()}}
        if columns == ["-eo", "pid"]:
            return Answer(0, "".join(f"{pid}\n" for pid in rows))
        if columns == ["-eo", "pid,comm"]:
            return Answer(0, "".join(f"{pid:<20}{comm}\n" for pid, comm in rows.items()))
        raise NotImplementedError

    def execute(self, words: list[str]) -> Answer:
        """Answer `docker exec` of nvidia-smi; no other program is in there."""
        name, program, *arguments = words
        self.running(name)
        if program != "nvidia-smi":
            raise NotImplementedError
        return self.host.smi(arguments, inside=True)

    def logs(self, words: list[str]) -> Answer:
        """Answer `docker logs`."""
        options, (name,) = options_of(words, ["--tail"])
        lines = self.host.log(self.find(name))
        return Answer(0, "".join(f"{line}\n" for line in lines[-int(options.get("--tail", ["1000"])[0]) :]))

    def stop(self, words: list[str]) -> Answer:
        """Answer `docker stop`."""
        self.host.stop(self.find(words[-1]))
        return Answer(0, f"{words[-1]}\n")

    def remove(self, words: list[str]) -> Answer:
        """Answer `docker rm --force`."""
        self.find(words[-1])
        self.host.remove()
        return Answer(0, f"{words[-1]}\n")

    def nothing(self, words: list[str]) -> Answer:
        """Answer `docker network ls` and `docker volume ls`: a light host has neither."""
        if words[0] == "ls":
            return Answer()
        raise NotImplementedError

    def manifest(self, words: list[str]) -> Answer:
        """Answer `docker manifest inspect`."""
        _, image = words
        if self.host.fault("pull") == "missing":
            return Answer(1, "", f"no such manifest: docker.io/{image}\n")
        return Answer(0, '{"schemaVersion": 2}\n')

    def pull(self, words: list[str]) -> Answer:
        """Answer `docker pull`: takes no time."""
        _, (image,) = options_of(words, [])
        fault = self.host.fault("pull")
        if fault == "missing":
            raise RefusedError(
                f"Error response from daemon: manifest for {image} not found: manifest unknown: manifest unknown"
            )
        if fault:
            raise RefusedError("Error response from daemon: unexpected EOF")
        self.host.images[image] = image_id(image)
        self.host.save()
        return Answer(0, f"docker.io/{image}\n")


class Compose:
    """The Compose plugin of one call: the real one says what a file means, this one what is done."""

    turn = asyncio.Semaphore(os.cpu_count() or 1)

    def __init__(self, host: Host, call: Call, words: list[str]) -> None:
        """Read the command line."""
        self.host, self.call = host, call
        self.options, others = options_of(words, COMPOSE_VALUES)
        self.verb = others[0] if others else ""

    def option(self, name: str) -> str:
        """Return an option's value, or nothing."""
        return (self.options.get(name) or [""])[-1]

    async def answer(self) -> Answer:
        """Answer the call."""
        if self.verb == "config":
            return await self.ask(
                *(f"{n}={self.option(n)}" for n in ("--format", "--hash") if self.option(n))
            )
        if self.verb == "up":
            return await self.up()
        if self.verb == "version":
            form = "--short" if "--short" in self.options else "--format=json"
            return await self.plugin(("version", form), ["version", form], {})
        if self.verb in ("down", "ps", "images"):
            answer: Answer = getattr(self, self.verb)()
            return answer
        raise NotImplementedError

    async def plugin(
        self, question: tuple[object, ...], arguments: Sequence[str], environment: Mapping[str, str]
    ) -> Answer:
        """Return what the real plugin says; from memory where the question is one of the last few."""
        kept = self.host.said
        if question in kept:
            return kept[question]
        async with self.turn:
            process = await asyncio.create_subprocess_exec(
                PLUGIN,
                *arguments,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
            )
            out, err = await process.communicate()
        answer = Answer(process.returncode or 0, out.decode(), err.decode())
        if answer.code == 0:
            kept[question] = answer
            for old in list(kept)[:-KEPT]:
                del kept[old]
        return answer

    async def ask(self, *form: str) -> Answer:
        """Ask the real plugin what the caller's files mean, in the caller's environment."""
        names = [(flag, name) for flag in ("--file", "--env-file") for name in self.options.get(flag, [])]
        paths = {name: self.call.path(name) for _, name in names}
        try:
            contents = [path.read_bytes() for path in paths.values()]
        except OSError as error:
            return Answer(14, "", f"open {error.filename}: no such file or directory\n")
        asked = b"".join(contents).decode(errors="replace")
        # What no file asks for can't change the answer.
        environment = {
            key: value
            for key, value in self.call.environment().items()
            if key == "HOME" or key.startswith("COMPOSE_") or f"${key}" in asked or f"${{{key}" in asked
        }
        project = [f"{name}={self.option(name)}" for name in ("--project-name", "--project-directory")]
        answer = await self.plugin(
            (*project, *form, *contents, *sorted(environment.items())),
            [*project, *(f"{flag}={paths[name]}" for flag, name in names), "config", *form],
            environment,
        )
        said = answer.err
        for name, path in paths.items():
            said = said.replace(str(path), name)
        return answer._replace(err=said)

    def told(self, *events: str, kind: str = "Container", name: str = CONTAINER) -> str:
        """Return the events in the form that --progress asks for."""
        if self.option("--progress") == "json":
            rows = [{"id": f"{kind} {name}", "status": event} for event in events]
            return "".join(json.dumps(row) + "\n" for row in rows)
        return "".join(f" {kind} {name}  {event}\n" for event in events)

    async def up(self) -> Answer:
        """Make the container what the files say, and start it."""
        host = self.host
        config, hashed = await self.ask("--format=json"), await self.ask(f"--hash={SERVICE}")
        if config.code or hashed.code:
            return config if config.code else hashed
        service = json.loads(config.out)["services"][SERVICE]
        image, config_hash = host.images.get(service["image"]), hashed.out.split()[-1]
        if image is None:
            missing = f"no such image: {service['image']}: No such image: {service['image']}"
            return Answer(1, "", self.told("Creating") + f"Error response from daemon: {missing}\n")
        box = host.container
        before: tuple[str, ...] = ()
        same = box and box.labels[f"{LABEL}.config-hash"] == config_hash and box.image_id == image
        if box and same and "--force-recreate" not in self.options:
            if box.life().status == "running":
                return Answer(0, "", self.told("Running"))
            work = host.start(box)
        else:
            before = ("Recreate", "Recreated") if box else ("Creating", "Created")
            work = host.create(service, image, self.labels(config_hash, image))
        try:
            await work
        except RefusedError as error:
            return Answer(1, "", self.told(*before, "Starting") + f"{error}\n")
        return Answer(0, "", self.told(*before, "Starting", "Started"))

    def labels(self, config_hash: str, image: str) -> dict[str, str]:
        """Return what Compose notes on the container."""
        directory = Path(self.option("--project-directory"))
        return {
            f"{LABEL}.config-hash": config_hash,
            f"{LABEL}.image": image,
            f"{LABEL}.oneoff": "False",
            f"{LABEL}.project": self.option("--project-name"),
            f"{LABEL}.project.config_files": str(directory / self.option("--file")),
            f"{LABEL}.project.environment_file": str(directory / self.option("--env-file")),
            f"{LABEL}.project.working_dir": str(directory),
            f"{LABEL}.service": SERVICE,
        }

    def ours(self) -> Container | None:
        """Return the container where it is of this project."""
        box = self.host.container
        return box if box and box.labels[f"{LABEL}.project"] == self.option("--project-name") else None

    def down(self) -> Answer:
        """Remove the project's container."""
        project = self.option("--project-name")
        if not self.ours():
            return Answer(0, "", f'Warning: No resource found to remove for project "{project}".\n')
        self.host.remove()
        said = self.told("Stopping", "Stopped", "Removing", "Removed")
        return Answer(
            0, "", said + self.told("Removing", "Removed", kind="Network", name=f"{project}_default")
        )

    def ps(self) -> Answer:
        """List the project's containers."""
        box = self.ours()
        if not box:
            return Answer()
        row = {
            "ID": box.id,
            "Name": CONTAINER,
            "Names": CONTAINER,
            "Image": box.service["image"],
            "Project": self.option("--project-name"),
            "Service": SERVICE,
            "State": box.life().status,
            "ExitCode": box.life().exit_code,
            "Labels": ",".join(f"{key}={value}" for key, value in box.labels.items()),
            "Networks": f"{self.option('--project-name')}_default",
            "Publishers": [],
        }
        return Answer(0, json.dumps(row) + "\n")

    def images(self) -> Answer:
        """List the images of the project's containers."""
        box = self.ours()
        if not box:
            return Answer(0, "[]\n")
        repository, _, tag = box.service["image"].rpartition(":")
        row = {"ID": box.image_id, "ContainerName": CONTAINER, "Repository": repository, "Tag": tag}
        return Answer(0, json.dumps([row]) + "\n")


class Fleet:
    """All hosts of a directory."""

    def __init__(self, directory: Path) -> None:
        """Begin with the hosts that the directory holds."""
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.hosts: dict[str, Host] = {}

    def host(self, name: str) -> Host:
        """Return a host, which may be new."""
        if name not in self.hosts:
            self.hosts[name] = Host(self.directory / name)
        return self.hosts[name]

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer one call of a host's program, as light_cli sends it."""
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ValueError):
            token, name, pid, directory, count = [await self.word(reader) for _ in range(5)]
            program, *arguments = [await self.word(reader) for _ in range(int(count))]
            if hmac.compare_digest(token.encode(), self.token.encode()):
                call = Call(int(pid), directory, program, arguments)
                host = self.host(name)
                if not host.api:
                    await self.open_api(host)
                code, out, err = await self.run(host, call)
                said = out.encode(), err.encode()
                writer.write(f"{code} {len(said[0])} {len(said[1])}\n".encode() + b"".join(said))
                await writer.drain()
        writer.close()

    async def open_api(self, host: Host) -> None:
        """Listen on the host's /run/docker.sock."""

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = re.search(r"(?i)^content-length: (\d+)", head, re.MULTILINE)
            body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
            status, said = (
                "501 Not Implemented",
                {"message": f"light host: not simulated: {head.splitlines()[0]}"},
            )
            if head.startswith(f"POST /containers/create?name={CONTAINER} "):
                status, said = "201 Created", {"Id": host.create_again(body["Labels"])}
            content = json.dumps(said)
            form = "Content-Type: application/json\r\nConnection: close\r\n"
            writer.write(
                f"HTTP/1.1 {status}\r\n{form}Content-Length: {len(content)}\r\n\r\n{content}".encode()
            )
            await writer.drain()
            writer.close()

        # By a short path: a socket's may have 107 characters.
        directory = os.open(host.directory / "run", os.O_PATH)
        host.api = await asyncio.start_unix_server(answer, f"/proc/self/fd/{directory}/docker.sock")
        os.close(directory)

    async def word(self, reader: asyncio.StreamReader) -> str:
        """Read one word of a call."""
        return (await reader.readuntil(b"\0"))[:-1].decode(errors="surrogateescape")

    async def run(self, host: Host, call: Call) -> Answer:
        """Do what the call says, or say that nobody has taught it to this engine."""
        line = shlex.join([call.program, *call.arguments])
        try:
            if call.program == "nvidia-smi":
                return host.smi(call.arguments)
            return await Docker(host, call).answer()
        except Exception as error:  # noqa: BLE001 (whatever it is, the caller must see it)
            return Answer(125, "", f"light host: not simulated: {line} ({error!r})\n")

    async def live(self) -> None:
        """Answer until the directory says that this engine is its own no more."""
        control = await asyncio.start_server(self.answer, "127.0.0.1", 0)
        port = control.sockets[0].getsockname()[1]
        for path in sorted(self.directory.glob("light-*")):
            host = self.host(path.name)
            if host.container and not host.container.error:
                await host.listen(host.container)
        write_json(self.directory / "engine.json", {"pid": os.getpid(), "port": port, "token": self.token})
        while read_json(self.directory / "engine.json").get("pid") == os.getpid():
            await asyncio.sleep(0.5)
            for name in [name for name in self.hosts if not (self.directory / name).exists()]:
                self.hosts.pop(name).close()


if __name__ == "__main__":
    asyncio.run(Fleet(Path(sys.argv[1])).live())
