"""The images of a host and of the stand-in for vLLM, both made from files of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

from archive import OPS, Archive
from machine import CACHE, HERE, ROOT, docker, step

LABEL = "simulated-gpu-host"
# So that two clones of the project on one machine don't share hosts.
CLONE = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
VERSION = "0.32.0"
DEFAULT_IMAGE = f"vllm/vllm-openai:v{VERSION}"
# The part of this machine's /etc that a host gets.
ETC = """
    alternatives ld.so.conf ld.so.conf.d ld.so.cache nsswitch.conf os-release lsb-release debian_version
    protocols services ssl/openssl.cnf localtime
"""


def skeleton(folders: str) -> Archive:
    """Start an archive with those of the folders that this machine has, too."""
    archive = Archive()
    for folder in folders.split():
        if Path("/", folder).exists():
            archive.folder(folder)
    archive.folder("root", 0o700)
    archive.folder("tmp", 0o1777)
    return archive


def host_archive(key: bytes) -> bytes:
    """Return the file system of a host that accepts this SSH key, without /usr, which is this machine's."""
    archive = skeleton("bin sbin lib lib64 usr proc sys dev run srv mnt opt var/log")
    archive.link("var/run", "/run")
    archive.folder("var/tmp", 0o1777)
    for name in ETC.split():
        archive.machine(Path("/etc") / name)
    for python in sorted(Path("/etc").glob("python3*")):
        archive.machine(python)
    shell = "/usr/local/sbin/login-shell"
    archive.text(
        "etc/passwd",
        f"root:x:0:0:root:/root:{shell}\nops:x:{OPS}:{OPS}::/home/ops:{shell}\n"
        "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    )
    archive.text("etc/group", f"root:x:0:\ntty:x:5:\ndocker:x:990:\nops:x:{OPS}:\nnogroup:x:65534:\n")
    archive.text("etc/shadow", "root:*:19000:0:99999:7:::\nops:*:19000:0:99999:7:::\n", 0o600)
    archive.text("etc/sudoers", "ops ALL=(ALL) NOPASSWD: ALL\n", 0o440)
    kinds = ("auth", "account", "session")
    archive.text("etc/pam.d/sudo", "".join(f"{kind} required pam_permit.so\n" for kind in kinds))
    archive.text("etc/shells", f"/bin/sh\n/bin/bash\n{shell}\n")
    for home in ("root", "home/ops"):
        archive.folder(f"{home}/.ssh", 0o700)
        archive.text(f"{home}/.ssh/authorized_keys", key, 0o600)
    # dropbear's own PATH lacks /usr/local, unlike OpenSSH's on a real host.
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


def host_image(key: bytes) -> str:
    """Build the host's image if it doesn't exist yet; return its name."""
    archive = host_archive(key)
    image = f"{LABEL}:{hashlib.sha256(archive).hexdigest()[:12]}"
    if not docker("image", "ls", "-q", image):
        changes = ("--change", f"LABEL {LABEL}={CLONE}", "--change", 'CMD ["/usr/local/sbin/simulated-init"]')
        with step("building the host's image"):
            docker("import", *changes, "-", image, data=archive)
    return image


# The commands of this machine in the stand-in's image.
COMMANDS = """
    bash cat chmod cp cut date df dirname env false grep head hostname id kill ls mkdir mktemp mv
    printenv ps pwd rm sed sh sleep sort tail tee timeout touch tr true uname wc python3
"""


def libraries(files: list[Path]) -> set[Path]:
    """Return the shared libraries that the files load, with the loader."""
    done = subprocess.run(["ldd", *map(str, files)], capture_output=True, text=True, check=False)
    return {Path(path) for path in re.findall(r"(?:=> )?(/[^\s:]+) \(0x", done.stdout)}


def stand_in_files() -> list[Path]:
    """Return the files of this machine for the stand-in's image."""
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
    """Return the file system of the stand-in's image, from the cache if nothing changed."""
    program = (HERE / "vllm_stand_in.py").read_bytes()
    recipe = hashlib.sha256(program)
    for file in (Path(__file__), HERE / "archive.py"):
        recipe.update(file.read_bytes())
    recipe.update(str(Path("/usr/bin/python3").resolve().stat().st_mtime_ns).encode())
    kept = CACHE / "stand-in" / f"{recipe.hexdigest()[:12]}.tar"
    if kept.exists():
        return kept.read_bytes()
    archive = skeleton("bin sbin lib lib64 usr/local/bin proc sys dev run etc var")
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


def stand_in_image() -> bytes:
    """Return the stand-in's image as `docker save` writes it."""
    layer = stand_in_layer()
    environment = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SIMULATED_VLLM_VERSION": VERSION,
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
    manifest = [{"Config": name, "RepoTags": [DEFAULT_IMAGE], "Layers": ["layer.tar"]}]
    archive.text("manifest.json", json.dumps(manifest))
    return archive.bytes()
