# SPDX-License-Identifier: MIT
"""The few calls of the Docker Engine API that its command line has no word for."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.parse
from typing import Any, Dict, Mapping, Optional

from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import TIMEOUT, Problem

SOCKET = "/var/run/docker.sock"
# Of an answer; bytes. A container's description has some ten thousand.
_LARGEST = 8 << 20


class Unreachable(Problem):
    """The engine doesn't answer at all; it may be restarting."""


class _Connection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(SOCKET)


def call(
    method: str,
    path: str,
    body: Optional[Mapping[str, Any]] = None,
    timeout: float = TIMEOUT,
    **query: Any,
) -> Any:
    """Return the engine's answer; None where it says that there is no such thing.

    Raises Problem, with the engine's own words, where it refuses.
    """
    if query:
        path += "?" + urllib.parse.urlencode(query)
    connection = _Connection("localhost", timeout=timeout)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read(_LARGEST).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(
            "The Docker Engine gave no answer ({0}). Check the Docker service: systemctl status docker".format(
                error or type(error).__name__
            )
        ) from error
    finally:
        connection.close()
    if answer.status == http.client.NOT_FOUND:
        return None
    content: Any = text
    if "json" in (answer.getheader("Content-Type") or ""):
        content = json.loads(text)
    if answer.status >= http.client.BAD_REQUEST:
        said = content.get("message", text) if isinstance(content, dict) else text
        raise Problem(
            "The Docker Engine refused {0} {1}: {2}".format(method, path.split("?")[0], said.strip())
        )
    return content


def wait_until_it_answers(seconds: float) -> None:
    """Wait while the engine is away, as during a restart; Unreachable where that takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            call("GET", "/_ping", timeout=min(TIMEOUT, max(1, deadline - time.monotonic())))
        except Unreachable:
            if time.monotonic() >= deadline:
                raise
            time.sleep(1)
        else:
            return


def filters(**wanted: str) -> str:
    """Return the query that lists only what has these names or labels."""
    return json.dumps({key: [value] for key, value in wanted.items()})


def stop(container: str, grace: int) -> None:
    """Stop a container as `docker stop` does; one that doesn't run stays as it is."""
    call("POST", "/containers/{0}/stop".format(container), timeout=grace + TIMEOUT)


def networks_of(container: Mapping[str, Any]) -> Dict[str, Dict[str, Any]]:
    """Return how a container was attached to each of its networks, without what the engine chose itself."""
    attached = {}
    for name, one in (container["NetworkSettings"].get("Networks") or {}).items():
        endpoint = {
            key: one[key] for key in ("IPAMConfig", "Links", "DriverOpts", "GwPriority") if one.get(key)
        }
        # Engines before 25 list the container's own short id here.
        aliases = [alias for alias in one.get("Aliases") or [] if alias != container["Id"][:12]]
        attached[name] = dict(endpoint, Aliases=aliases) if aliases else endpoint
    return attached


def creation(container: Mapping[str, Any], image: str) -> Dict[str, Any]:
    """Return what creates a container like the inspected one, from `image`, on its main network.

    Volumes without a name of their own are mounted by the one that the engine gave them.
    """
    config, host = dict(container["Config"], Image=image), dict(container["HostConfig"])
    config.pop("MacAddress", None)
    if config.get("Hostname") == container["Id"][:12]:
        del config["Hostname"]
    named = {bind.split(":")[1] for bind in host.get("Binds") or []}
    named.update(mount["Target"] for mount in host.get("Mounts") or [])
    anonymous = [
        "{0}:{1}:{2}".format(mount["Name"], mount["Destination"], "rw" if mount.get("RW", True) else "ro")
        for mount in container.get("Mounts") or []
        if mount.get("Type") == "volume" and mount["Destination"] not in named
    ]
    if anonymous:
        host["Binds"] = (host.get("Binds") or []) + anonymous
    main = {key: one for key, one in networks_of(container).items() if key == host.get("NetworkMode") and one}
    return dict(config, HostConfig=host, NetworkingConfig={"EndpointsConfig": main})


def create(container: Mapping[str, Any], name: str, image: str) -> str:
    """Create a container like the inspected one, and return its id; it isn't started."""
    made = str(call("POST", "/containers/create", creation(container, image), name=name)["Id"])
    for network, endpoint in networks_of(container).items():
        if network not in (container["HostConfig"].get("NetworkMode"), "bridge", "host", "none"):
            body = {"Container": made, "EndpointConfig": endpoint}
            call("POST", "/networks/{0}/connect".format(urllib.parse.quote(network, safe="")), body)
    return made


def create_network(network: Mapping[str, Any]) -> None:
    """Create a network like the inspected one."""
    keys = ("Name", "Driver", "Options", "Labels", "IPAM", "Internal", "Attachable", "EnableIPv6")
    call("POST", "/networks/create", {key: network[key] for key in keys if key in network})
