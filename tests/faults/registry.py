"""A registry on loopback that sends only a part of each layer."""

import hashlib
import json
import ssl
from http.server import BaseHTTPRequestHandler, HTTPServer

CONFIG = json.dumps(
    {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}}
).encode()
LAYER = "sha256:" + "1" * 64


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def blob(kind: str, size: int, name: str) -> dict[str, object]:
    return {"mediaType": f"application/vnd.docker.{kind}", "size": size, "digest": name}


MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
    "config": blob("container.image.v1+json", len(CONFIG), digest(CONFIG)),
    "layers": [blob("image.rootfs.diff.tar.gzip", 1 << 20, LAYER)],
}).encode()  # fmt: skip


class Registry(BaseHTTPRequestHandler):
    """The part of the registry's protocol that a pull needs."""

    def do_GET(self) -> None:
        """Answer; of the layer only a part is sent."""
        body, kind, size = b"{}", "application/json", None
        if self.path.endswith("/none"):
            body = b'{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}'
        elif "/manifests/" in self.path:
            body, kind = MANIFEST, MANIFEST_TYPE
        elif self.path.endswith(digest(CONFIG)):
            body, kind = CONFIG, "application/octet-stream"
        elif self.path.endswith(LAYER):
            body, kind, size = b"\x1f\x8b" + b"\0" * 1000, "application/octet-stream", 1 << 20
        self.send_response(404 if self.path.endswith("/none") else 200)
        self.send_header("Docker-Distribution-API-Version", "registry/2.0")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size or len(body)))
        self.send_header("Docker-Content-Digest", digest(body))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET  # noqa: N815 - the library's name


# HTTPS, which `docker manifest inspect` needs.
server = HTTPServer(("127.0.0.1", 5000), Registry)
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("/root/registry.crt", "/root/registry.key")
server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
