"""A container created again from its `docker inspect`, through the socket of the Docker Engine."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import engine_api
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.docker import Unanswered
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem

ID = "d834a82f713f" + "0" * 52
ANONYMOUS = "f" * 64


def inspected(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what Engine 26 reports of a container of Compose, as far as it matters here."""
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
        "Hostname": ID[:12], "Env": ["VLLM_API_KEY=sk-secret-key"], "Cmd": ["model"], "Image": "vllm/vllm-openai:v1",
        "Labels": {"com.docker.compose.config-hash": "abc"}, "MacAddress": "02:42:ac:12:00:02",
        **changes.pop("config", {}),
    }  # fmt: skip
    network = {
        "IPAMConfig": None, "Aliases": ["vllm-server", "vllm", ID[:12]], "MacAddress": "02:42:ac:12:00:02",
        "EndpointID": "e" * 64, "IPAddress": "172.18.0.2", "DriverOpts": None,
    }  # fmt: skip
    mounts = [
        {"Type": "volume", "Name": "vllm-gpu_cache", "Destination": "/root/.cache", "RW": True},
        {"Type": "bind", "Source": "/srv", "Destination": "/models", "RW": False},
    ]
    return {
        "Id": ID, "Name": "/vllm-server", "Image": "sha256:1", "Config": config, "HostConfig": host, "Mounts": mounts,
        "NetworkSettings": {"Networks": {"vllm-gpu_default": network}}, **changes,
    }  # fmt: skip


def test_the_creation_has_all_settings_and_no_identity() -> None:
    raw = inspected()
    own = ("Hostname", "MacAddress")
    endpoint = {"Aliases": ["vllm-server", "vllm"]}
    assert engine_api.creation(raw, "sha256:1") == {
        **{key: value for key, value in raw["Config"].items() if key not in own},
        "Image": "sha256:1",
        "HostConfig": raw["HostConfig"],
        "NetworkingConfig": {"EndpointsConfig": {"vllm-gpu_default": endpoint}},
    }


def test_a_chosen_hostname_stays() -> None:
    assert engine_api.creation(inspected(config={"Hostname": "by-hand"}), "i")["Hostname"] == "by-hand"


def test_a_fixed_address_stays() -> None:
    raw = inspected()
    raw["NetworkSettings"]["Networks"]["vllm-gpu_default"]["IPAMConfig"] = {"IPv4Address": "172.18.0.9"}
    (endpoint,) = engine_api.creation(raw, "i")["NetworkingConfig"]["EndpointsConfig"].values()
    assert endpoint["IPAMConfig"] == {"IPv4Address": "172.18.0.9"}


@pytest.mark.parametrize("mode", ["host", "none", "bridge"])
def test_a_builtin_network_has_no_aliases(mode: str) -> None:
    attached = {mode: {"IPAMConfig": None, "Aliases": None, "EndpointID": "e"}}
    raw = inspected(host={"NetworkMode": mode}, NetworkSettings={"Networks": attached})
    assert engine_api.creation(raw, "i")["NetworkingConfig"] == {"EndpointsConfig": {}}


@pytest.mark.parametrize(("writable", "mode"), [(True, "rw"), (False, "ro")])
def test_an_anonymous_volume_is_mounted_again(writable: bool, mode: str) -> None:  # noqa: FBT001
    mount = {"Type": "volume", "Name": ANONYMOUS, "Destination": "/data", "RW": writable}
    raw = inspected(host={"Binds": ["/srv:/models:ro"]})
    raw["Mounts"].append(mount)
    binds = ["/srv:/models:ro", f"{ANONYMOUS}:/data:{mode}"]
    assert engine_api.creation(raw, "i")["HostConfig"]["Binds"] == binds
    assert raw["HostConfig"]["Binds"] == binds[:1]  # the snapshot is unchanged


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A fake Docker Engine, with a list of its requests."""

    calls: list[tuple[str, Any]]
    status, answer = 201, b'{"Id": "new"}'


class Handler(http.server.BaseHTTPRequestHandler):
    server: Engine

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *_arguments: object) -> None:
        """Log nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, json.loads(body)))
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.answer)))
        self.end_headers()
        self.wfile.write(self.server.answer)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(engine_api, "SOCKET", str(tmp_path / "docker.sock"))
    with Engine(engine_api.SOCKET, Handler) as server:
        server.calls = []
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server
        server.shutdown()


def test_it_is_created_under_its_name_and_on_all_its_networks(daemon: Engine) -> None:
    raw = inspected()
    raw["NetworkSettings"]["Networks"]["second"] = {"Aliases": ["other"], "EndpointID": "e"}
    assert engine_api.create(raw, "vllm-server", "sha256:1") == "new"
    assert daemon.calls == [
        ("/containers/create?name=vllm-server", engine_api.creation(raw, "sha256:1")),
        ("/networks/second/connect", {"Container": "new", "EndpointConfig": {"Aliases": ["other"]}}),
    ]


def test_a_network_is_created_with_its_labels(daemon: Engine) -> None:
    settings = {"Name": "n", "Driver": "bridge", "Labels": {"a": "b"}}
    engine_api.create_network({**settings, "Id": "1", "Containers": {}, "Created": "x"})
    assert daemon.calls == [("/networks/create", settings)]


@pytest.mark.parametrize("answer", [b'{"message": "no such image"}', b"no such image\n"])
def test_a_refusal_is_quoted(daemon: Engine, answer: bytes) -> None:
    daemon.status, daemon.answer = 404, answer
    with pytest.raises(Problem) as problem:
        engine_api.create(inspected(), "vllm-server", "i")
    assert str(problem.value).endswith("/containers/create?name=vllm-server: no such image")


def test_no_answer_is_not_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_api, "SOCKET", str(tmp_path / "none"))
    with pytest.raises(Unanswered, match="The Docker Engine gave no answer"):
        engine_api.create(inspected(), "vllm-server", "i")
