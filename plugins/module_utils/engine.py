# SPDX-License-Identifier: MIT
"""Create a container and a network like ones that were inspected: docker's command line has no word for that."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from typing import Any, Mapping

from .docker import Unanswered
from .shell import TIMEOUT, Problem

SOCKET = "/var/run/docker.sock"
# Of an answer; bytes.
_LARGEST = 1 << 20


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


def post(path: str, body: Mapping[str, Any]) -> Any:
    """Return the engine's answer; Problem, with its own words, where it refuses."""
    connection = _Connection("localhost", timeout=TIMEOUT)
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read(_LARGEST).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unanswered(
            f"The Docker Engine gave no answer at {SOCKET} ({error or type(error).__name__}). Check the Docker "
            "service: systemctl status docker"
        ) from error
    finally:
        connection.close()
    try:
        content = json.loads(text) if text else {}
    except ValueError:
        content = {}
    if answer.status >= http.client.BAD_REQUEST:
        raise Problem(f"The Docker Engine refused POST {path}: {content.get('message') or text.strip()}")
    return content


def networks_of(container: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return how a container was attached to each of its networks, without what the engine chose itself."""
    attached = {}
    for name, attachment in (container.get("NetworkSettings", {}).get("Networks") or {}).items():
        endpoint = {
            key: attachment[key]
            for key in ("IPAMConfig", "Links", "DriverOpts", "GwPriority")
            if attachment.get(key)
        }
        # Engines before 25 list the container's own short id here.
        aliases = [alias for alias in attachment.get("Aliases") or [] if alias != container["Id"][:12]]
        attached[name] = dict(endpoint, Aliases=aliases) if aliases else endpoint
    return attached


def creation(container: Mapping[str, Any], image: str) -> dict[str, Any]:
    """Return what creates a container like the inspected one, from `image`, on its main network.

    Volumes without a name of their own are mounted by the one that the engine gave them.
    """
    config, host = dict(container["Config"], Image=image), dict(container["HostConfig"])
    config.pop("MacAddress", None)
    if config.get("Hostname") == container["Id"][:12]:
        del config["Hostname"]
    named = {bind.split(":")[1] for bind in host.get("Binds") or [] if ":" in bind}
    mounts = [
        mount for mount in host.get("Mounts") or [] if mount.get("Source") or mount.get("Type") == "tmpfs"
    ]
    if host.get("Mounts"):
        host["Mounts"] = mounts
    named.update(mount["Target"] for mount in mounts)
    anonymous = [
        f"{mount['Name']}:{mount['Destination']}:{'rw' if mount.get('RW', True) else 'ro'}"
        for mount in container.get("Mounts") or []
        if mount.get("Type") == "volume" and mount["Destination"] not in named
    ]
    if anonymous:
        host["Binds"] = (host.get("Binds") or []) + anonymous
    main = {key: one for key, one in networks_of(container).items() if key == host.get("NetworkMode") and one}
    return dict(config, HostConfig=host, NetworkingConfig={"EndpointsConfig": main})


def create(container: Mapping[str, Any], name: str, image: str) -> str:
    """Create a container like the inspected one, and return its id; it isn't started."""
    made = str(post("/containers/create?name=" + name, creation(container, image))["Id"])
    for network, endpoint in networks_of(container).items():
        if network not in (container["HostConfig"].get("NetworkMode"), "bridge", "host", "none"):
            body = {"Container": made, "EndpointConfig": endpoint}
            post(f"/networks/{urllib.parse.quote(network, safe='')}/connect", body)
    return made


def create_network(network: Mapping[str, Any]) -> None:
    """Create a network like the inspected one."""
    keys = ("Name", "Driver", "Options", "Labels", "IPAM", "Internal", "Attachable", "EnableIPv6")
    post("/networks/create", {key: network[key] for key in keys if key in network})
