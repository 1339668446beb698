"""Put the named collections out of PyPI's `ansible` wheel into this environment.

usage: unpack_collections.py WHEEL_DIRECTORY NAMESPACE/NAME...
"""

from __future__ import annotations

import sys
import sysconfig
import zipfile
from pathlib import Path


def main(directory: str, *collections: str) -> None:
    """Unpack; pip has checked the wheel against its hash."""
    (wheel,) = Path(directory).glob("ansible-*.whl")
    prefixes = tuple(f"ansible_collections/{name}/" for name in collections)
    with zipfile.ZipFile(wheel) as archive:
        members = [name for name in archive.namelist() if name.startswith(prefixes)]
        archive.extractall(sysconfig.get_path("purelib"), members)
    wheel.unlink()  # 54 MB that nobody needs any more


if __name__ == "__main__":
    main(*sys.argv[1:])
