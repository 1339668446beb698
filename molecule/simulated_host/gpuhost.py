#!/usr/bin/env python3
"""Simulated GPU hosts: real Docker engines behind SSH, where only the card is not real.

  up        start a host, or leave it alone where it runs
  down      remove hosts
  list      the hosts, and whether they answer
  load      put the stand-in for vLLM's image into a host, under any tag
  inventory an Ansible inventory of hosts, as YAML
  ssh       a shell or a command on a host, as root
  fault     make a host misbehave
  tenant    another user's process on a card
  cards     change the cards of a running host
  engine    start, stop or restart a host's Docker engine
  reboot    as after a loss of power

`setup` beside this file must have run once.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / ".cache"
HOSTS = CACHE / "simulated-hosts"
CLIENT_KEY = HOSTS / "id_ed25519"
PLUGIN = CACHE / "docker/cli-plugins/docker-compose"
SOCKET = "/var/run/docker.sock"
LABEL = "simulated-gpu-host"
# Two clones of the project on one machine don't meet.
CLONE = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
DEFAULT_IMAGE = "vllm/vllm-openai:v0.32.0"
# The user id of `ops`, who may do everything, but through sudo only.
OPS = 1000
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,40}")

FAULTS = {
    "runtime": "gives other cards than asked: other | two | all | none | ids, e.g. 0,1",
    "nvidia_smi": "hang | missing | flood (prints without end)",
    "processes": "nvidia-smi lists no processes, as in an LXC guest: none",
    "odd_rows": "rows of tenants' processes (see tenant): pid | memory | digits | uuid | fields, or several: pid,memory",
    "odd_card": "a card's row in the list of cards, e.g. 0:memory (or digits | driver | bus | uuid | name | fields)",
    "driver": "gone | mismatch",
    "lost_card": "a running container (name or id) loses its card, until it is started again",
    "start_delay": "seconds that the server takes longer to start",
    "crash": "the server crashes while it starts: oom | traceback",
    "crash_after": "the server crashes so many seconds after it is ready",
    "worker_dies_after": "the engine process dies so many seconds after it is ready",
    "health": "never healthy: 503 | closed (the port never opens)",
    "serve_as": "the server serves this model name instead",
    "api": "what it answers below /v1: drip (a byte every 3 s, without end) | drip_headers (likewise) | flood",
    "log_secret": "the server's log holds its API key: 1",
    "log_escape": "the server's log holds control characters: 1",
}


class HostError(Exception):
    """Something that the user can do something about."""


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Say what starts, and how long it took."""
    started = time.monotonic()
    print(text, end=" ", file=sys.stderr, flush=True)
    try:
        yield
    except BaseException:
        print("failed", file=sys.stderr)
        raise
    print(f"{time.monotonic() - started:.1f} s", file=sys.stderr)


@functools.cache
def docker_command() -> tuple[str, ...]:
    """Return how to call the client, which needs sudo where the socket isn't ours."""
    client = next(
        (path for path in ("/usr/bin/docker", "/usr/local/bin/docker") if os.access(path, os.X_OK)), None
    )
    if client is None or not Path(SOCKET).exists():
        raise HostError(f"no Docker engine here: run {HERE / 'setup'}")
    command = (client, "--host", f"unix://{SOCKET}")
    return command if os.access(SOCKET, os.W_OK) else ("sudo", *command)


def docker(*arguments: str, data: bytes | None = None, check: bool = True) -> str:
    """Run a command of the Docker client and return its output."""
    done = subprocess.run([*docker_command(), *arguments], input=data, capture_output=True, check=False)
    if check and done.returncode:
        raise HostError(f"docker {arguments[0]}: {done.stderr.decode().strip()}")
    return done.stdout.decode().strip()


# --- images -------------------------------------------------------------------


class Archive:
    """A tar file in the making that is the same for the same content."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self.buffer = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)
        self.names: set[str] = set()

    def add(self, info: tarfile.TarInfo, data: bytes | None = None) -> None:
        """Add one member, with the folders above it; whose home it is in owns it, else root."""
        info.name = info.name.strip("/")
        if info.name in self.names:
            return
        self.names.add(info.name)
        parent = info.name.rpartition("/")[0]
        if parent:
            self.folder(parent)
        info.uid = info.gid = OPS if info.name.startswith("home/ops") else 0
        info.uname = info.gname = ""
        self.tar.addfile(info, None if data is None else io.BytesIO(data))

    def folder(self, name: str, mode: int = 0o755) -> None:
        """Add a folder, or what this machine has in its place: /lib may be a link."""
        here = Path("/", name)
        # In this order: what is below /root is for root's eyes only.
        if here.parent == Path("/") and here.is_symlink():
            self.link(name, str(here.readlink()))
            return
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.add(info)

    def link(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        self.add(info)

    def text(self, name: str, data: str | bytes, mode: int = 0o644) -> None:
        """Add a file of the given content."""
        data = data.encode() if isinstance(data, str) else data
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), mode
        self.add(info, data)

    def machine(self, path: Path) -> None:
        """Add a file, link or folder of this machine under its own name, where it can be read."""
        if not (path.exists() or path.is_symlink()):
            return
        name = str(path).strip("/")
        # Below a linked folder (/lib64 -> usr/lib64) nothing can be unpacked.
        name = str(path.parent.resolve() / path.name).strip("/")
        if path.is_symlink():
            self.link(name, str(path.readlink()))
        elif path.is_dir():
            self.folder(name)
            for child in sorted(path.iterdir()):
                self.machine(child)
        else:
            info = self.tar.gettarinfo(path, name)
            # Links between files would need both; the content is small.
            info.type, info.linkname = tarfile.REGTYPE, ""
            with contextlib.suppress(PermissionError):
                self.add(info, path.read_bytes())

    def bytes(self) -> bytes:
        """Return the finished archive."""
        self.tar.close()
        return self.buffer.getvalue()


def host_archive() -> bytes:
    """Return the file system of a host: all but /usr, which it has from this machine."""
    archive = Archive()
    for folder in (
        "bin",
        "sbin",
        "lib",
        "lib64",
        "usr",
        "proc",
        "sys",
        "dev",
        "run",
        "srv",
        "mnt",
        "opt",
        "var/log",
    ):
        if Path("/", folder).exists():
            archive.folder(folder)
    archive.link("var/run", "/run")
    archive.folder("root", 0o700)
    for folder in ("tmp", "var/tmp"):
        archive.folder(folder, 0o1777)
    for path in (
        "alternatives",
        "ld.so.conf",
        "ld.so.conf.d",
        "ld.so.cache",
        "nsswitch.conf",
        "os-release",
        "lsb-release",
        "debian_version",
        "protocols",
        "services",
        "ssl/openssl.cnf",
        "localtime",
    ):
        archive.machine(Path("/etc") / path)
    for python in sorted(Path("/etc").glob("python3*")):
        archive.machine(python)
    shell = "/usr/local/sbin/login-shell"
    archive.text(
        "etc/passwd",
        f"root:x:0:0:root:/root:{shell}\nops:x:{OPS}:{OPS}::/home/ops:{shell}\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    )
    archive.text("etc/group", f"root:x:0:\ntty:x:5:\ndocker:x:990:\nops:x:{OPS}:\nnogroup:x:65534:\n")
    archive.text("etc/shadow", "root:*:19000:0:99999:7:::\nops:*:19000:0:99999:7:::\n", 0o600)
    archive.text("etc/sudoers", "ops ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    archive.text(
        "etc/pam.d/sudo",
        "".join(f"{kind} required pam_permit.so\n" for kind in ("auth", "account", "session")),
    )
    archive.text("etc/shells", f"/bin/sh\n/bin/bash\n{shell}\n")
    for home in ("root", "home/ops"):
        archive.folder(f"{home}/.ssh", 0o700)
        archive.text(f"{home}/.ssh/authorized_keys", CLIENT_KEY.with_suffix(".pub").read_bytes(), 0o600)
    # dropbear's own PATH knows no /usr/local, OpenSSH's on a real host does.
    archive.text(
        shell,
        "#!/bin/bash\nexport PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
        'exec /bin/bash "$@"\n',
        0o755,
    )
    for name in ("simulated_gpu.py", "nvidia_smi.py", "nvidia_hook.py", "gpu_tenant.py"):
        archive.text(f"usr/local/lib/simulated-gpu/{name}", (HERE / name).read_bytes(), 0o755)
    archive.link("usr/local/bin/nvidia-smi", "../lib/simulated-gpu/nvidia_smi.py")
    archive.link("usr/local/sbin/simulated-driver", "../lib/simulated-gpu/simulated_gpu.py")
    archive.text("usr/local/sbin/simulated-engine", (HERE / "host_engine").read_bytes(), 0o755)
    archive.text("usr/local/sbin/simulated-init", (HERE / "host_init").read_bytes(), 0o755)
    return archive.bytes()


def host_image() -> str:
    """Build the host's image where it isn't there yet; return its name."""
    archive = host_archive()
    image = f"{LABEL}:{hashlib.sha256(archive).hexdigest()[:12]}"
    if not docker("image", "ls", "-q", image):
        with step("building the host's image"):
            docker(
                "import",
                "--change",
                f"LABEL {LABEL}={CLONE}",
                "--change",
                'CMD ["/usr/local/sbin/simulated-init"]',
                "-",
                image,
                data=archive,
            )
    return image


# What the stand-in's image holds of this machine beside Python.
COMMANDS = """
    bash cat chmod cp cut date df dirname env false grep head hostname id kill ls mkdir mktemp mv
    printenv ps pwd rm sed sh sleep sort tail tee timeout touch tr true uname wc python3
"""


def libraries(files: list[Path]) -> set[Path]:
    """Return the shared libraries that the files load, and the loader."""
    done = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False)
    return {Path(path) for path in re.findall(r"(?:=> )?(/[^\s:]+) \(0x", done.stdout)}


def stand_in_files() -> list[Path]:
    """Return the files of this machine that go into the stand-in's image."""
    standard_library = Path("/usr/lib") / Path("/usr/bin/python3").resolve().name
    found = [Path(shutil.which(name, path="/usr/bin:/bin") or "/nonexistent") for name in COMMANDS.split()]
    commands = [path for path in found if path.exists()]
    left_out = re.compile(
        r"/(test|tests|ensurepip|idlelib|lib2to3|pydoc_data|turtledemo|tkinter|config-[^/]*)/"
    )
    modules = [
        path
        for path in sorted(standard_library.rglob("*"))
        if not path.is_dir() and not left_out.search(str(path))
    ]
    binaries = [path.resolve() for path in commands] + [path for path in modules if path.suffix == ".so"]
    needed = sorted(libraries(binaries))
    return [*commands, *binaries, *modules, *needed, *(path.resolve() for path in needed)]


def stand_in_layer() -> bytes:
    """Return the file system of the stand-in's image; kept from one run to the next."""
    program = (HERE / "vllm_stand_in.py").read_bytes()
    recipe = hashlib.sha256(Path(__file__).read_bytes() + program)
    recipe.update(str(Path("/usr/bin/python3").resolve().stat().st_mtime_ns).encode())
    kept = CACHE / "stand-in" / f"{recipe.hexdigest()[:12]}.tar"
    if kept.exists():
        return kept.read_bytes()
    archive = Archive()
    for folder in (
        "bin",
        "sbin",
        "lib",
        "lib64",
        "usr/local/bin",
        "proc",
        "sys",
        "dev",
        "run",
        "etc",
        "var",
    ):
        if Path("/", folder).exists():
            archive.folder(folder)
    archive.folder("root", 0o700)
    archive.folder("tmp", 0o1777)
    for path in stand_in_files():
        archive.machine(path)
    archive.text("etc/passwd", "root:x:0:0:root:/root:/bin/bash\n")
    archive.text("etc/group", "root:x:0:\n")
    archive.text("etc/nsswitch.conf", "hosts: files dns\n")
    archive.text("usr/local/bin/vllm", program, 0o755)
    kept.parent.mkdir(parents=True, exist_ok=True)
    for old in kept.parent.glob("*.tar"):
        old.unlink()
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_bytes(archive.bytes())
    temporary.replace(kept)
    return kept.read_bytes()


def stand_in_image(tag: str) -> bytes:
    """Return the image in the form of `docker save`; the version it reports is its tag's."""
    layer = stand_in_layer()
    version = tag.rpartition(":")[2].removeprefix("v") if ":" in tag.rpartition("/")[2] else "0.0.0"
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SIMULATED_VLLM_VERSION": version,
    }
    created = "2026-01-01T00:00:00Z"
    config = json.dumps(
        {
            "architecture": docker("version", "--format", "{{.Server.Arch}}"),
            "os": "linux",
            "created": created,
            "config": {
                "Env": [f"{key}={value}" for key, value in environment.items()],
                "Entrypoint": ["vllm", "serve"],
                "WorkingDir": "/root",
                "Labels": {"org.opencontainers.image.title": "stand-in for vllm/vllm-openai"},
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer).hexdigest()}"]},
            "history": [{"created": created, "created_by": "stand-in"}],
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    archive = Archive()
    archive.text("layer.tar", layer)
    archive.text(name, config)
    manifest = [{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]
    archive.text("manifest.json", json.dumps(manifest))
    return archive.bytes()


# --- hosts --------------------------------------------------------------------


def withheld_capability() -> list[str]:
    """Return the options that keep CAP_SYS_RESOURCE out of ALL: it isn't everybody's to give, nothing here needs it.

    From Engine 23 on, ALL is what there is to give, and what there isn't can't be dropped.
    """
    older = re.match(r"(1?\d|2[0-2])\.", docker("version", "--format", "{{.Server.Version}}"))
    return ["--cap-drop", "SYS_RESOURCE"] if older else []


class Host:
    """One simulated host."""

    def __init__(self, name: str) -> None:
        """Name a host, which need not exist yet."""
        if not NAME.fullmatch(name):
            raise HostError(f"not a host name: {name!r} (small letters, digits and dashes)")
        self.name = name
        self.container = f"{LABEL}-{CLONE}-{name}"
        self.folder = HOSTS / name
        self.ssh_config = self.folder / "ssh_config"
        # Ansible keeps connections by this name: two clones must not share one.
        self.alias = f"{name}.{CLONE}"

    def inspect(self, template: str) -> str:
        """Return something about the container; empty where it doesn't exist."""
        return docker("container", "inspect", "--format", template, self.container, check=False)

    def run(self, *command: str, data: bytes | None = None, check: bool = True) -> str:
        """Run a command on the host as root, not by SSH."""
        options = [] if data is None else ["--interactive"]
        return docker("exec", *options, self.container, *command, data=data, check=check)

    def script(self, text: str, *arguments: str, data: bytes | None = None) -> str:
        """Run a few lines of shell on the host as root."""
        return self.run("/usr/local/sbin/login-shell", "-euc", text, "sh", *arguments, data=data)

    def write_ssh_config(self, key: str) -> None:
        """Write down how to reach the host, and the only key that it may answer with."""
        port = self.inspect('{{(index (index .NetworkSettings.Ports "22/tcp") 0).HostPort}}')
        known_hosts = self.folder / "known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{port} {key}\n")
        self.ssh_config.write_text(
            f"Host {self.name} {self.alias}\n"
            "  HostName 127.0.0.1\n"
            f"  Port {port}\n"
            "  User root\n"
            f'  IdentityFile "{CLIENT_KEY}"\n'
            "  IdentitiesOnly yes\n"
            f'  UserKnownHostsFile "{known_hosts}"\n'
            "  GlobalKnownHostsFile /dev/null\n"
            "  StrictHostKeyChecking yes\n"
        )

    def ssh_command(self) -> list[str]:
        """Return the call of ssh that reaches the host."""
        return ["ssh", "-F", str(self.ssh_config), self.name]

    def answers(self) -> bool:
        """Whether it can be reached by SSH and its engine answers (or was stopped on purpose)."""
        if not self.ssh_config.exists() or self.inspect("{{.State.Running}}") != "true":
            return False
        command = "test -e /run/engine-stopped || docker info >/dev/null"
        try:
            done = subprocess.run(
                [*self.ssh_command(), command], capture_output=True, timeout=30, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def wait_ready(self, since: str = "") -> None:
        """Wait until the host's first process says that it has booted; note its SSH key."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            log = docker("logs", *(["--since", since] if since else []), self.container)
            for line in log.splitlines():
                if line.startswith("failed"):
                    raise HostError(f"{self.name} doesn't boot:\n{log}")
                if line.startswith("ready "):
                    key = " ".join(line.split()[1:3])
                    self.write_ssh_config(key)
                    return
            if self.inspect("{{.State.Running}}") != "true":
                raise HostError(f"{self.name} ended:\n{log}")
            time.sleep(0.05)
        raise HostError(f"{self.name} isn't ready after 60 s:\n{docker('logs', self.container)}")

    def up(self, cards: dict[str, Any], images: list[str]) -> None:
        """Start the host where it doesn't run yet, with these cards and images."""
        if not self.answers():
            self.down()
            image = host_image()
            self.folder.mkdir(parents=True, exist_ok=True)
            with step(f"starting {self.name}"):
                docker(
                    "create",
                    "--name",
                    self.container,
                    "--hostname",
                    self.name,
                    "--label",
                    f"{LABEL}={CLONE}",
                    "--label",
                    f"{LABEL}.name={self.name}",
                    "--cap-add",
                    "ALL",
                    *withheld_capability(),
                    "--security-opt",
                    "seccomp=unconfined",
                    "--security-opt",
                    "apparmor=unconfined",
                    "--security-opt",
                    "systempaths=unconfined",
                    "--device-cgroup-rule",
                    "a *:* rwm",
                    "--volume",
                    "/usr:/usr:ro",
                    "--volume",
                    "/usr/local",
                    "--volume",
                    "/var/lib/docker",
                    "--volume",
                    f"{PLUGIN}:/usr/local/libexec/docker/cli-plugins/docker-compose:ro",
                    "--tmpfs",
                    "/run:exec,mode=755",
                    "--publish",
                    "127.0.0.1::22",
                    image,
                )
                files = Archive()
                files.text("etc/simulated-gpu/cards.json", json.dumps(cards))
                docker("cp", "-", f"{self.container}:/", data=files.bytes())
                docker("start", self.container)
                self.wait_ready()
        self.load(images)

    def load(self, images: list[str]) -> None:
        """Put the stand-in into the host's engine under each of the tags."""
        if self.run("find", "/run/engine-stopped", check=False):
            return
        there = self.run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
        for image in images:
            if image not in there:
                with step(f"loading {image} into {self.name}"):
                    self.run("docker", "load", "-q", data=stand_in_image(image))

    def down(self) -> None:
        """Remove the host and all that it kept."""
        docker("rm", "--force", "--volumes", self.container, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def put(self, path: str, data: bytes) -> None:
        """Write a file on the host, never to be seen half-written."""
        self.script('mkdir -p "${1%/*}"; cat >"$1.new"; mv "$1.new" "$1"', path, data=data)

    def fault(self, settings: dict[str, str]) -> dict[str, str]:
        """Add to how the host misbehaves; an empty value ends a fault."""
        faults: dict[str, str] = json.loads(
            self.script("cat /run/simulated-gpu/faults.json 2>/dev/null || echo {}")
        )
        container = settings.pop("lost_card", "")
        if container:
            self.lose_card(container)
        faults = {key: value for key, value in {**faults, **settings}.items() if value}
        self.put("/run/simulated-gpu/faults.json", json.dumps(faults).encode())
        link = "/usr/local/bin/nvidia-smi"
        if faults.get("nvidia_smi") == "missing":
            self.script('rm -f "$1"', link)
        else:
            self.script('ln -sf ../lib/simulated-gpu/nvidia_smi.py "$1"', link)
        return faults

    def lose_card(self, container: str) -> None:
        """Take its cards from a running container."""
        self.script(
            'simulated-driver take-away "$(docker inspect --format "{{.State.Pid}}" "$1")"', container
        )

    def reboot(self) -> None:
        """Let the host lose its power and boot again."""
        since = str(time.time())
        docker("kill", "--signal", "HUP", self.container)
        self.wait_ready(since)


def all_hosts() -> list[Host]:
    """Return the hosts that exist, of this clone of the project."""
    names = docker(
        "ps", "--all", "--filter", f"label={LABEL}={CLONE}", "--format", f'{{{{.Label "{LABEL}.name"}}}}'
    )
    return [Host(name) for name in sorted(names.split())]


def inventory(hosts: list[Host], group: str) -> str:
    """Return an inventory in YAML (of which JSON is a part)."""
    entries = {
        host.name: {
            "ansible_host": host.alias,
            "ansible_ssh_common_args": f"-F {shlex.quote(str(host.ssh_config))}",
            "ansible_user": "root",
            "ansible_python_interpreter": "/usr/bin/python3",
        }
        for host in hosts
    }
    lines = [f"{group}:", "  hosts:"]
    for name, variables in entries.items():
        lines += [f"    {name}:", *(f"      {key}: {json.dumps(value)}" for key, value in variables.items())]
    return "\n".join(lines)


# --- the command line ---------------------------------------------------------


def command_up(options: argparse.Namespace) -> None:
    """Start hosts."""
    if not PLUGIN.exists():
        raise HostError(f"run {HERE / 'setup'} first")
    HOSTS.mkdir(parents=True, exist_ok=True)
    with (HOSTS / "lock").open("w") as lock:
        # Two runs at once would make the key and the images twice.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not CLIENT_KEY.exists():
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", LABEL, "-f", str(CLIENT_KEY)],
                check=True,
            )
        for name in options.names:
            cards = json.loads(options.cards.read_bytes())
            if options.own_cards:
                own_cards(cards, name)
            Host(name).up(cards, options.image or [DEFAULT_IMAGE])


def own_cards(cards: dict[str, Any], name: str) -> None:
    """Give the cards UUIDs of this host alone, as real ones have: the last digits follow from its name."""
    for card in cards["cards"]:
        card["uuid"] = card["uuid"][:-8] + hashlib.sha256(name.encode()).hexdigest()[:8]


def command_down(options: argparse.Namespace) -> None:
    """Remove hosts."""
    for host in all_hosts() if options.all else map(Host, options.names):
        with step(f"removing {host.name}"):
            host.down()


def command_list(_: argparse.Namespace) -> None:
    """Print the hosts."""
    for host in all_hosts():
        print(f"{host.name:<20} {'answers' if host.answers() else 'does not answer'}")


def command_load(options: argparse.Namespace) -> None:
    """Load the stand-in under more tags."""
    Host(options.name).load(options.tags)


def command_inventory(options: argparse.Namespace) -> None:
    """Print an inventory."""
    print(inventory([Host(name) for name in options.names], options.group))


def command_ssh(options: argparse.Namespace) -> None:
    """Become the SSH client."""
    command = Host(options.name).ssh_command()
    os.execvp(command[0], [*command, *options.command])  # noqa: S606


def fault_settings(words: list[str], known: Collection[str]) -> dict[str, str]:
    """Return the faults that a command line sets, of those that are known."""
    settings = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise HostError(f"{word}: not KEY=VALUE with one of the keys {', '.join(known)}")
        settings[key] = value
    return settings


def command_fault(options: argparse.Namespace) -> None:
    """Set, end or show faults."""
    settings = fault_settings(options.settings, FAULTS)
    if options.clear:
        settings = dict.fromkeys(set(FAULTS) - {"lost_card"}, "") | settings
    print(json.dumps(Host(options.name).fault(settings)))


TENANT = """
log=$(mktemp)
setsid python3 "$1" --card "$2" --mib "$3" >"$log" 2>&1 </dev/null & pid=$!
while kill -0 $pid 2>/dev/null && ! grep -q holding "$log"; do sleep 0.05; done
kill -0 $pid 2>/dev/null || { cat "$log" >&2; exit 1; }
echo $pid
"""
TENANT_IN_CONTAINER = """
image=$(docker image ls --quiet | head -n 1)
id=$(docker run --detach --label gpu-tenant --gpus "device=$2" --entrypoint python3 "$image" \\
  "$1" --card 0 --mib "$3")
for _ in $(seq 50); do
  if docker logs "$id" 2>&1 | grep -q holding; then echo "$id"; exit; fi
  sleep 0.1
done
docker logs "$id" >&2
docker rm --force "$id" >/dev/null
exit 1
"""


def command_tenant(options: argparse.Namespace) -> None:
    """Start or stop other users' processes."""
    host = Host(options.name)
    program = "/usr/local/lib/simulated-gpu/gpu_tenant.py"
    if options.stop:
        host.script(
            "docker ps --quiet --filter label=gpu-tenant | xargs -r docker rm --force >/dev/null\n"
            'pkill -f "^python3 $1" || true',
            program,
        )
        return
    if options.card is None or options.mib is None:
        raise HostError("tenant: needs --card and --mib, or --stop")
    script = TENANT_IN_CONTAINER if options.container else TENANT
    print(host.script(script, program, options.card, str(options.mib)))


def command_cards(options: argparse.Namespace) -> None:
    """Change a host's cards."""
    description = options.file.read_bytes()
    json.loads(description)
    host = Host(options.name)
    host.put("/etc/simulated-gpu/cards.json", description)
    if not options.at_reboot:
        host.run("simulated-driver", "load", "/etc/simulated-gpu/cards.json")


def command_engine(options: argparse.Namespace) -> None:
    """Start, stop or restart the engine."""
    host = Host(options.name)
    if options.action in ("stop", "restart"):
        host.script("touch /run/engine-stopped; simulated-engine stop")
    if options.action in ("start", "restart"):
        host.script(
            'simulated-engine start "$@"; rm -f /run/engine-stopped',
            *(["--no-nvidia"] if options.no_nvidia else []),
        )


def command_reboot(options: argparse.Namespace) -> None:
    """Boot a host again."""
    host = Host(options.name)
    with step(f"rebooting {host.name}"):
        host.reboot()


def parser() -> argparse.ArgumentParser:
    """Return the command line's description."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="verb", required=True, metavar="COMMAND")

    def add(
        name: str, run: Callable[[argparse.Namespace], None], *, one: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, formatter_class=argparse.RawDescriptionHelpFormatter, description=run.__doc__
        )
        sub.set_defaults(run=run)
        if one:
            sub.add_argument("name", metavar="NAME")
        return sub

    up = add("up", command_up, one=False)
    up.add_argument("names", nargs="+", metavar="NAME")
    up.add_argument("--cards", type=Path, default=HERE / "cards.json", metavar="FILE")
    up.add_argument("--own-cards", action="store_true", help="with UUIDs that no other host's cards have")
    up.add_argument(
        "--image", action="append", metavar="TAG", help=f"may be repeated; default {DEFAULT_IMAGE}"
    )
    down = add("down", command_down, one=False)
    which = down.add_mutually_exclusive_group(required=True)
    which.add_argument("names", nargs="*", default=[], metavar="NAME")
    which.add_argument("--all", action="store_true")
    add("list", command_list, one=False)
    add("load", command_load).add_argument("tags", nargs="+", metavar="TAG")
    listing = add("inventory", command_inventory, one=False)
    listing.add_argument("names", nargs="+", metavar="NAME")
    listing.add_argument("--group", default="vllm_gpu")
    add("ssh", command_ssh).add_argument("command", nargs=argparse.REMAINDER)
    fault = add("fault", command_fault)
    fault.epilog = "keys:\n" + "\n".join(f"  {key:<18} {text}" for key, text in FAULTS.items())
    fault.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="an empty value ends the fault")
    fault.add_argument("--clear", action="store_true", help="end all other faults")
    tenant = add("tenant", command_tenant)
    tenant.add_argument("--card", metavar="ID")
    tenant.add_argument("--mib", type=int)
    tenant.add_argument("--container", action="store_true", help="in a container instead of on the host")
    tenant.add_argument("--stop", action="store_true", help="stop all of them")
    cards = add("cards", command_cards)
    cards.add_argument("file", type=Path, metavar="FILE")
    cards.add_argument("--at-reboot", action="store_true", help="only from the next reboot on")
    engine = add("engine", command_engine)
    engine.add_argument("action", choices=("start", "stop", "restart"))
    engine.add_argument("--no-nvidia", action="store_true", help="without NVIDIA's hook")
    add("reboot", command_reboot)
    return top


def main() -> None:
    """Run one command."""
    command_line = parser()
    options, rest = command_line.parse_known_args()
    if rest and options.verb == "fault" and not any(word.startswith("-") for word in rest):
        options.settings += rest  # argparse doesn't find them behind --clear
    elif rest:
        command_line.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        options.run(options)
    except HostError as error:
        sys.exit(f"gpuhost: {error}")


if __name__ == "__main__":
    main()
