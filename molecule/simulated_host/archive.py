"""Tar files that are byte by byte the same for the same content."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

# The user id of `ops`, who is root by sudo only.
OPS = 1000


class Archive:
    """A tar file that is being written."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self.tar = tarfile.TarFile(fileobj=self.buffer, mode="w", format=tarfile.PAX_FORMAT)
        self.names: set[str] = set()

    def add(self, info: tarfile.TarInfo, data: bytes | None = None) -> None:
        """Add a member, with its parent folders; root owns it, or `ops` in its home."""
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
        """Add a folder, or the link that it is on this machine, as /lib may be."""
        here = Path("/", name)
        # In this order, as only root may read below /root.
        if here.parent == Path("/") and here.is_symlink():
            self.link(name, str(here.readlink()))
            return
        info = tarfile.TarInfo(name)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.add(info)

    def link(self, name: str, target: str) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        self.add(info)

    def text(self, name: str, data: str | bytes, mode: int = 0o644) -> None:
        data = data.encode() if isinstance(data, str) else data
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), mode
        self.add(info, data)

    def machine(self, path: Path) -> None:
        """Add a file, link or folder of this machine under its own name, if it can be read."""
        if not (path.exists() or path.is_symlink()):
            return
        name = str(path).strip("/")
        # Nothing can be unpacked below a linked folder (/lib64 -> usr/lib64).
        name = str(path.parent.resolve() / path.name).strip("/")
        if path.is_symlink():
            self.link(name, str(path.readlink()))
        elif path.is_dir():
            self.folder(name)
            for child in sorted(path.iterdir()):
                self.machine(child)
        else:
            info = self.tar.gettarinfo(path, name)
            # A copy, as a hard link would need its target, too.
            info.type, info.linkname = tarfile.REGTYPE, ""
            with contextlib.suppress(PermissionError):
                self.add(info, path.read_bytes())

    def bytes(self) -> bytes:
        self.tar.close()
        return self.buffer.getvalue()
