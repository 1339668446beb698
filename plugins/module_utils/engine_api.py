# SPDX-License-Identifier: MIT
"""Create a container or a network like an inspected one, which the docker command can't."""

from __future__ import annotations

import http.client
import json
import socket
import urllib.parse
from typing import Any, Mapping

from .docker import Unanswered
from .shell import TIMEOUT, Problem

SOCKET = "/var/run/docker.sock"
# The most that is read of an answer; bytes.
_LARGEST = 1 << 20


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


def post(path: str, body: Mapping[str, Any]) -> Any:
    """Return the Docker Engine's answer; raise Problem, with its message, where it refuses."""
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
    """Return how a container was attached to each of its networks, without what the Docker Engine chose itself."""
    attached = {}
    for name, attachment in (container.get("NetworkSettings", {}).get("Networks") or {}).items():
        endpoint = {
            key: attachment[key]
            for key in ("IPAMConfig", "Links", "DriverOpts", "GwPriority")
            if attachment.get(key)
        }
        # Before version 25, the list has the container's own short id.
        aliases = [alias for alias in attachment.get("Aliases") or [] if alias != container["Id"][:12]]
        attached[name] = dict(endpoint, Aliases=aliases) if aliases else endpoint
    return attached


def creation(container: Mapping[str, Any], image: str) -> dict[str, Any]:
    """Return the request that creates a container like the inspected one, from `image`, on its main network.

    Anonymous volumes are mounted again by the names that Docker gave them.
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
    main = {
        network: endpoint
        for network, endpoint in networks_of(container).items()
        if network == host.get("NetworkMode") and endpoint
    }
    return dict(config, HostConfig=host, NetworkingConfig={"EndpointsConfig": main})


def create(container: Mapping[str, Any], name: str, image: str) -> str:
    """Create a container like the inspected one, without starting it; return its id."""
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
