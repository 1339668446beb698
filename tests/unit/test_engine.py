"""A container made again from what `docker inspect` said of it, through the engine's socket."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import engine
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.docker import Unanswered
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

ID = "d834a82f713f" + "0" * 52
ANONYMOUS = "f" * 64


def inspected(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """What Engine 26 says of a container that Compose has made, as far as it matters here."""
    host = {
        "Binds": None,
        "NetworkMode": "vllm-gpu_default",
        "PortBindings": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "8000"}]},
        "DeviceRequests": [{"Driver": "nvidia", "Count": 0, "DeviceIDs": ["1"], "Capabilities": [["gpu"]]}],
        "Mounts": [{"Type": "volume", "Source": "vllm-gpu_cache", "Target": "/root/.cache"}],
        "ShmSize": 8589934592,
        **changes.pop("host", {}),
    }
    config = {
        "Hostname": ID[:12],
        "Env": ["VLLM_API_KEY=sk-secret-key"],
        "Cmd": ["model"],
        "Image": "vllm/vllm-openai:v1",
        "Labels": {"com.docker.compose.config-hash": "abc"},
        "MacAddress": "02:42:ac:12:00:02",
        **changes.pop("config", {}),
    }
    network = {
        "IPAMConfig": None,
        "Aliases": ["vllm-server", "vllm", ID[:12]],
        "MacAddress": "02:42:ac:12:00:02",
        "EndpointID": "e" * 64,
        "IPAddress": "172.18.0.2",
        "DriverOpts": None,
    }
    mounts = [
        {"Type": "volume", "Name": "vllm-gpu_cache", "Destination": "/root/.cache", "RW": True},
        {"Type": "bind", "Source": "/srv", "Destination": "/models", "RW": False},
    ]
    raw = {
        "Id": ID,
        "Name": "/vllm-server",
        "Image": "sha256:1",
        "Config": config,
        "HostConfig": host,
        "Mounts": mounts,
        "NetworkSettings": {"Networks": {"vllm-gpu_default": network}},
    }
    return {**raw, **changes}


def test_all_that_it_was_made_from_and_nothing_that_is_its_own() -> None:
    raw = inspected()
    made = engine.creation(raw, "sha256:1")
    kept = {
        key: value for key, value in raw["Config"].items() if key not in ("Hostname", "MacAddress", "Image")
    }
    assert {key: made[key] for key in kept} == kept
    assert set(made) == {*kept, "Image", "HostConfig", "NetworkingConfig"}
    assert made["Image"] == "sha256:1"
    assert made["HostConfig"] == raw["HostConfig"]
    endpoint = {"Aliases": ["vllm-server", "vllm"]}
    assert made["NetworkingConfig"] == {"EndpointsConfig": {"vllm-gpu_default": endpoint}}


def test_a_hostname_that_somebody_chose_stays() -> None:
    assert engine.creation(inspected(config={"Hostname": "by-hand"}), "i")["Hostname"] == "by-hand"


def test_a_fixed_address_stays() -> None:
    raw = inspected()
    raw["NetworkSettings"]["Networks"]["vllm-gpu_default"]["IPAMConfig"] = {"IPv4Address": "172.18.0.9"}
    (endpoint,) = engine.creation(raw, "i")["NetworkingConfig"]["EndpointsConfig"].values()
    assert endpoint["IPAMConfig"] == {"IPv4Address": "172.18.0.9"}


@pytest.mark.parametrize("mode", ["host", "none", "bridge"])
def test_a_network_of_the_engine_has_no_aliases(mode: str) -> None:
    attached = {mode: {"IPAMConfig": None, "Aliases": None, "EndpointID": "e"}}
    raw = inspected(host={"NetworkMode": mode}, NetworkSettings={"Networks": attached})
    assert engine.creation(raw, "i")["NetworkingConfig"] == {"EndpointsConfig": {}}


@pytest.mark.parametrize(("writable", "mode"), [(True, "rw"), (False, "ro")])
def test_a_volume_without_a_name_is_found_again(writable: bool, mode: str) -> None:  # noqa: FBT001
    mount = {"Type": "volume", "Name": ANONYMOUS, "Destination": "/data", "RW": writable}
    raw = inspected(host={"Binds": ["/srv:/models:ro"]})
    raw["Mounts"].append(mount)
    assert engine.creation(raw, "i")["HostConfig"]["Binds"] == [
        "/srv:/models:ro",
        f"{ANONYMOUS}:/data:{mode}",
    ]
    assert raw["HostConfig"]["Binds"] == ["/srv:/models:ro"]  # what was kept stays as it is


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """What a Docker Engine would be asked, and what it says."""

    calls: list[tuple[str, Any]]
    status, answer = 201, b'{"Id": "new"}'


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_arguments: object) -> None:
        """Keep quiet."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine, "SOCKET", str(tmp_path / "docker.sock"))
    with Engine(engine.SOCKET, Handler) as server:
        server.calls = []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_it_is_created_under_its_name_and_on_each_of_its_networks(daemon: Engine) -> None:
    raw = inspected()
    raw["NetworkSettings"]["Networks"]["second"] = {"Aliases": ["other"], "EndpointID": "e"}
    assert engine.create(raw, "vllm-server", "sha256:1") == "new"
    assert daemon.calls == [
        ("/containers/create?name=vllm-server", engine.creation(raw, "sha256:1")),
        ("/networks/second/connect", {"Container": "new", "EndpointConfig": {"Aliases": ["other"]}}),
    ]


def test_a_network_comes_back_with_its_labels(daemon: Engine) -> None:
    network = {
        "Name": "n",
        "Id": "1",
        "Driver": "bridge",
        "Labels": {"a": "b"},
        "Containers": {},
        "Created": "x",
    }
    engine.create_network(network)
    assert daemon.calls == [("/networks/create", {"Name": "n", "Driver": "bridge", "Labels": {"a": "b"}})]


@pytest.mark.parametrize("answer", [b'{"message": "no such image"}', b"no such image\n"])
def test_what_the_engine_refuses_is_said_in_its_words(daemon: Engine, answer: bytes) -> None:
    daemon.status, daemon.answer = 404, answer
    with pytest.raises(Problem) as problem:
        engine.create(inspected(), "vllm-server", "i")
    assert str(problem.value).endswith("/containers/create?name=vllm-server: no such image")


def test_an_engine_that_is_away_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SOCKET", str(tmp_path / "none"))
    with pytest.raises(Unanswered, match="The Docker Engine gave no answer"):
        engine.create(inspected(), "vllm-server", "i")
