#!/usr/bin/python3
"""Stand-in for `vllm` in the image vllm/vllm-openai: `vllm serve` without a model.

It has the flags, processes, log, failures and the basic API of the real one; its
completions are made up. It works on the cards that the container was given: the
runtime's hook mounts the driver's library with the card, like libcuda.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hmac
import importlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NoReturn

VERSION = os.environ.get("SIMULATED_VLLM_VERSION", "0.0.0")
GIB = 1 << 30
MIB_PER_GIB = 1024
POLL = 0.1

# The common flags of `vllm serve`, which refuses unknown ones, too.
SWITCHES = """
    async-scheduling calculate-kv-scales disable-fastapi-docs disable-frontend-multiprocessing
    disable-hybrid-kv-cache-manager disable-log-requests disable-log-stats disable-sliding-window
    disable-cascade-attn disable-custom-all-reduce disable-mm-preprocessor-cache
    disable-uvicorn-access-log enable-auto-tool-choice enable-chunked-prefill enable-eplb
    enable-expert-parallel enable-force-include-usage enable-log-outputs enable-log-requests
    enable-lora enable-multimodal-encoder-data-parallel enable-prefix-caching
    enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers
    enable-server-load-tracking enable-sleep-mode enable-ssl-refresh enable-tokenizer-info-endpoint
    enforce-eager exclude-tools-when-tool-choice-none headless log-config-file
    return-tokens-as-token-ids skip-mm-profiling skip-tokenizer-init trust-remote-code
    trust-request-chat-template use-tqdm-on-load
"""
VALUES = """
    additional-config allowed-credentials allowed-headers allowed-local-media-path allowed-methods
    allowed-origins api-key api-server-count attention-backend block-size chat-template
    chat-template-content-format code-revision collect-detailed-traces compilation-config config
    config-format convert cpu-offload-gb data-parallel-size distributed-executor-backend
    download-dir dtype generation-config gpu-memory-utilization guided-decoding-backend
    hf-config-path hf-overrides hf-token host kv-cache-dtype kv-cache-memory-bytes
    kv-transfer-config limit-mm-per-prompt load-format logits-processors long-prefill-token-threshold
    lora-modules max-cpu-loras max-log-len max-logprobs max-long-partial-prefills max-lora-rank
    max-loras max-model-len max-num-batched-tokens max-num-partial-prefills max-num-seqs
    max-parallel-loading-workers max-seq-len-to-capture middleware mm-processor-cache-gb
    mm-processor-kwargs model model-impl model-loader-extra-config num-gpu-blocks-override
    num-lookahead-slots num-scheduler-steps otlp-traces-endpoint override-generation-config
    pipeline-parallel-size port preemption-mode prefix-caching-hash-algo quantization
    quantization-param-path reasoning-parser response-role revision root-path rope-scaling
    rope-theta runner safetensors-load-strategy scheduler-cls scheduling-policy seed
    served-model-name speculative-config ssl-ca-certs ssl-cert-reqs ssl-certfile ssl-keyfile
    structured-outputs-config swap-space task tensor-parallel-size tokenizer tokenizer-mode
    tokenizer-revision tool-call-parser tool-parser-plugin uds uvicorn-log-level worker-cls
"""
LISTS = ("api-key", "served-model-name", "lora-modules", "allowed-origins", "middleware")
SHORT = {
    "data-parallel-size": "-dp",
    "pipeline-parallel-size": "-pp",
    "quantization": "-q",
    "tensor-parallel-size": "-tp",
    "compilation-config": "-O",
}
TYPES: dict[str, type] = {
    "gpu-memory-utilization": float,
    "port": int,
    "tensor-parallel-size": int,
    "seed": int,
    "max-num-seqs": int,
}


def parse(argv: list[str]) -> argparse.Namespace:
    # vLLM takes --max_model_len for --max-model-len.
    argv = [
        ("--" + "=".join([name[2:].replace("_", "-"), *rest])) if arg.startswith("--") else arg
        for arg in argv
        for name, *rest in [arg.split("=", 1)]
    ]
    parser = argparse.ArgumentParser(prog="vllm serve", usage="vllm serve [model_tag] [options]")
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("-cc", "--cc", dest="compilation_config", default=None)
    for name in SWITCHES.split():
        parser.add_argument("--" + name, action=argparse.BooleanOptionalAction, default=None)
    for name in VALUES.split():
        flags = ["--" + name, *([SHORT[name]] if name in SHORT else [])]
        nargs = "+" if name in LISTS else None
        parser.add_argument(*flags, nargs=nargs, type=TYPES.get(name, str), default=None)
    options = parser.parse_args(argv)
    if not options.model_tag and not options.model:
        options.model = "Qwen/Qwen3-0.6B"  # vLLM's own default
    return options


class Log:
    """Writes lines as vLLM's processes do."""

    def __init__(self, process: str) -> None:
        self.prefix = f"({process} pid={os.getpid()})"

    def raw(self, text: str) -> None:
        for line in text.split("\n"):
            print(self.prefix, line, flush=True)

    def at(self, level: str, where: str, text: str) -> None:
        for line in text.split("\n"):
            self.raw(f"{level} {time.strftime('%m-%d %H:%M:%S')} [{where}] {line}")

    def note(self, where: str, text: str) -> None:
        self.at("INFO", where, text)

    def die(self, error: str, at: str = "") -> NoReturn:
        """End as a Python program does with an error."""
        self.raw("Traceback (most recent call last):")
        self.raw(f'  File "/usr/local/bin/vllm", line 10, in <module>{at}\n    sys.exit(main())')
        self.raw(error)
        sys.stdout.flush()
        os._exit(1)


def driver() -> Any:  # noqa: ANN401 - a module, or none
    """Return the driver's library, or None in a container without a card."""
    sys.path.insert(0, "/usr/local/lib/simulated-gpu")
    try:
        return importlib.import_module("simulated_gpu")
    except ImportError:
        return None


def fault(name: str) -> str:
    """Return how the server misbehaves just now."""
    gpu = driver()
    return str(gpu.fault(name)) if gpu else ""


def log_as_a_plugin(log: Log) -> None:
    """Log what a plugin or a user's code might."""
    if fault("log_secret"):
        log.note("plugin.py:7", f"environment: VLLM_API_KEY={os.environ.get('VLLM_API_KEY', '')}")
    if fault("log_escape"):
        log.note("plugin.py:8", "\x1b]0;owned\x07 \x9b31mred")


def set_title(title: str, comm: str) -> None:
    """Change this process's title, as vLLM does with setproctitle."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start, arg_end
    text = title.encode()[: end - start - 1]
    ctypes.memset(start, 0, end - start)
    ctypes.memmove(start, text, len(text))
    Path("/proc/self/comm").write_text(comm)


def check_model(log: Log, model: str) -> None:
    """Fail if the model doesn't exist; any name counts as one of the hub, which is not asked."""
    if model.startswith("/"):
        if not Path(model).exists():
            log.die(
                "huggingface_hub.errors.HFValidationError: Repo id must be in the form "
                f"'repo_name' or 'namespace/repo_name': '{model}'. "
                "Use `repo_type` argument if needed."
            )
    elif "does-not-exist" in model:
        log.die(
            f"OSError: {model} is not a local folder and is not a valid model identifier "
            "listed on 'https://huggingface.co/models'\nIf this is a private repository, make "
            "sure to pass a token having permission to this repo either by logging in with "
            "`hf auth login` or by passing `token=<your_token>`"
        )


def find_device(log: Log) -> None:
    """Fail as vLLM does without a card."""
    gpu = driver()
    try:
        if gpu and not gpu.fault("driver") and gpu.visible_cards():
            return
    except gpu.LostCardError:
        log.die(
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda "
            "functions before calling NumCudaDevices() that might have already set an error? "
            "Error 304: OS call failed or operation not supported on this OS"
        )
    log.die(
        "RuntimeError: Failed to infer device type, please set the environment variable "
        "`VLLM_LOGGING_LEVEL=DEBUG` to turn on verbose logging to help debug the issue."
    )


class Engine:
    """The child process that does the GPU work."""

    def __init__(self, options: argparse.Namespace, model: str, parent: int, ready: int) -> None:
        set_title("VLLM::EngineCore", "VLLM::EngineCor")
        self.log = Log("EngineCore")
        self.options, self.model, self.parent, self.ready = options, model, parent, ready
        self.held: list[int] = []

    def fail(self, where: str, call: str, error: str) -> NoReturn:
        """Report an error of the start as the engine process does, twice."""
        trace = f'  File "/usr/local/lib/python3.12/dist-packages/vllm/v1/worker/{where}\n    {call}'
        self.log.at("ERROR", "core.py:1231", "EngineCore failed to start.")
        self.log.at("ERROR", "core.py:1231", f"Traceback (most recent call last):\n{trace}\n{error}")
        self.log.raw(f"Traceback (most recent call last):\n{trace}\n{error}")
        os._exit(1)

    def take_memory(self) -> None:
        """Open a context on every visible card and take memory of the first one."""
        gpu = driver()
        first, *others = gpu.visible_cards()
        total = first.usable_mib
        utilization = self.options.gpu_memory_utilization or 0.9
        free = max(total - first.used_mib - gpu.CONTEXT_MIB, 0)
        wanted = total * utilization
        if fault("crash") == "oom":
            self.fail(
                'gpu_model_runner.py", line 4102, in load_model',
                "self.model = model_loader.load_model(",
                "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a "
                f"total capacity of {total / MIB_PER_GIB:.2f} GiB of which 0.02 GiB is free.",
            )
        if fault("crash"):
            self.fail(
                'gpu_worker.py", line 342, in init_device',
                "self._init_device()",
                "RuntimeError: simulated failure while the engine started",
            )
        try:
            if free < wanted:
                raise gpu.OutOfMemoryError
            self.held = [gpu.allocate(first, int(wanted))]
        except gpu.OutOfMemoryError:
            self.fail(
                'utils.py", line 415, in request_memory',
                "raise ValueError(",
                "ValueError: Free memory on device cuda:0 "
                f"({round(free / MIB_PER_GIB, 2)}/{round(total / MIB_PER_GIB, 2)} GiB) on startup is "
                f"less than desired GPU memory utilization ({utilization}, "
                f"{round(wanted / MIB_PER_GIB, 2)} GiB). Decrease GPU memory utilization or reduce GPU "
                "memory used by other processes.",
            )
        for card in others:
            try:
                self.held.append(gpu.allocate(card, gpu.CONTEXT_MIB))
            except gpu.OutOfMemoryError:
                self.fail(
                    'gpu_worker.py", line 331, in init_device',
                    "current_platform.set_device(self.device)",
                    "torch.AcceleratorError: CUDA error: out of memory",
                )

    def live(self) -> None:
        """Load, report ready, and run until the server ends or a fault comes."""
        delay = float(fault("start_delay") or 0)
        for part in range(5):
            self.log.raw(
                f"Loading safetensors checkpoint shards: {part * 25:>3}% Completed | {part}/4 "
                f"[00:{int(delay * part / 4):02}<00:00,  3.20it/s]"
            )
            log_as_a_plugin(self.log)  # the last line while it loads
            if part < 4:
                self.pause(0.1 + delay / 4)
        self.log.note("default_loader.py:430", f"Loading weights took {0.4 + delay:.2f} seconds")
        self.log.note("kv_cache_utils.py:2146", "GPU KV cache size: 1,754,688 tokens")
        self.log.note("core.py:344", "init engine (profile, create kv cache, warmup model) took 0.10 s")
        os.write(self.ready, b"1")
        started = time.monotonic()
        while True:
            self.pause(POLL)
            after = fault("worker_dies_after")
            if after and time.monotonic() - started >= float(after):
                self.log.at("ERROR", "core.py:1240", "EngineCore encountered a fatal error.")
                os._exit(1)

    def pause(self, seconds: float) -> None:
        """Sleep, or end with the server."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if os.getppid() != self.parent:
                os._exit(0)
            time.sleep(min(left, POLL))

    def run(self) -> NoReturn:
        # So that its end frees the card's memory at once.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.log.note(
            "core.py:114", f"Initializing a V1 LLM engine (v{VERSION}) with config: model='{self.model}'"
        )
        self.take_memory()
        self.log.note("model_runner.py:281", "Loading model from scratch...")
        self.live()
        raise AssertionError


class Server:
    """The API server, the container's main process."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.log = Log("APIServer")
        self.model = str(options.model_tag or options.model)
        self.names: list[str] = options.served_model_name or [self.model]
        self.keys: list[str] = options.api_key or [key for key in [os.environ.get("VLLM_API_KEY", "")] if key]
        self.started = int(time.time())
        self.children: list[int] = []
        self.dead = False

    def stop(self, *_: object) -> NoReturn:
        """End at once, with all children."""
        for pid in self.children:
            try:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            except (ProcessLookupError, ChildProcessError):
                pass
        os._exit(0)

    def banner(self) -> None:
        changed = {
            key: value for key, value in vars(self.options).items() if value is not None and key != "api_key"
        }
        self.log.note("api_utils.py:339", f"vLLM API server version {VERSION}, model {self.model}")
        self.log.note("api_utils.py:273", f"non-default args: {changed}")
        log_as_a_plugin(self.log)

    def start_engine(self) -> int:
        """Start the children; return a file that is readable once the engine process is ready or dead."""
        tracker = os.fork()
        if tracker == 0:
            set_title("python3 -c from multiprocessing.resource_tracker import main;main(42)", "python3")
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            parent = os.getppid()
            while os.getppid() == parent:
                time.sleep(1)
            os._exit(0)
        self.children.append(tracker)
        ready, report = os.pipe()
        parent = os.getpid()
        engine = os.fork()
        if engine == 0:
            os.close(ready)
            Engine(self.options, self.model, parent, report).run()
        os.close(report)
        self.children.insert(0, engine)
        return ready

    def run(self) -> NoReturn:
        signal.signal(signal.SIGTERM, self.stop)
        signal.signal(signal.SIGINT, self.stop)
        self.banner()
        check_model(self.log, self.model)
        find_device(self.log)
        # Bound before the model is loaded, but not answered until then.
        listener = socket.socket(socket.AF_INET)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        address = (self.options.host or "", self.options.port or 8000)
        try:
            listener.bind(address)
        except OSError as error:
            self.log.die(f"OSError: {error}")
        ready = self.start_engine()
        select.select([ready], [], [])
        if not os.read(ready, 1):
            os.waitpid(self.children[0], 0)
            self.log.die(
                "RuntimeError: Engine core initialization failed. See root cause above. "
                "Failed core proc(s): {}"
            )
        while fault("health") == "closed":
            time.sleep(POLL)
        server = ThreadingHTTPServer(
            address, type("ApiHandler", (Handler,), {"api": self}), bind_and_activate=False
        )
        server.socket.close()
        server.socket = listener
        server.server_address = listener.getsockname()
        server.server_activate()
        self.log.note("api_server.py:581", f"Starting vLLM server on http://{address[0]}:{address[1]}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.log.raw(f"INFO:     Started server process [{os.getpid()}]")
        self.log.raw("INFO:     Waiting for application startup.")
        self.log.raw("INFO:     Application startup complete.")
        self.watch()

    def watch(self) -> NoReturn:
        started = time.monotonic()
        while os.waitpid(self.children[0], os.WNOHANG)[0] == 0:
            after = fault("crash_after")
            if after and time.monotonic() - started >= float(after):
                os.kill(self.children[0], signal.SIGKILL)
                self.log.die("RuntimeError: simulated crash of the server")
            time.sleep(POLL)
        self.dead = True
        self.log.at(
            "ERROR",
            "core_client.py:610",
            "Engine core proc EngineCore died unexpectedly, shutting down client.",
        )
        time.sleep(1)  # so that a health check can see the 503
        self.log.raw("INFO:     Shutting down\nINFO:     Application shutdown complete.")
        self.children.pop(0)
        self.stop()

    def served(self) -> list[str]:
        other = fault("serve_as")
        return [other] if other else self.names

    def models(self) -> dict[str, Any]:
        length = self.options.max_model_len
        fields = {
            "object": "model",
            "created": int(time.time()),
            "owned_by": "vllm",
            "root": self.model,
            "parent": None,
            "max_model_len": int(length) if str(length).isdigit() else 40960,
        }
        return {"object": "list", "data": [{"id": name, **fields} for name in self.served()]}

    def complete(self, request: dict[str, Any]) -> dict[str, Any]:
        count = int(request.get("max_tokens") or 16)
        prompt = len(str(request.get("prompt", "")).split())
        return {
            "id": "cmpl-" + secrets.token_hex(8),
            "object": "text_completion",
            "created": int(time.time()),
            "model": request["model"],
            "choices": [{"index": 0, "logprobs": None, "finish_reason": "length", "text": "@" * count}],
            "usage": {"prompt_tokens": prompt, "total_tokens": prompt + count, "completion_tokens": count},
        }


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    api: Server
    protocol_version = "HTTP/1.1"
    server_version = "uvicorn"
    sys_version = ""

    def reply(self, status: int, body: dict[str, Any] | None = None) -> None:
        data = json.dumps(body, separators=(",", ":")).encode() if body else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if data:
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def allowed(self) -> bool:
        """Whether the path needs no key, or the right one was sent."""
        guarded = self.path.startswith(("/v1", "/v2", "/inference"))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return (
            not self.api.keys
            or not guarded
            or any(hmac.compare_digest(token.encode(), key.encode()) for key in self.api.keys)
        )

    def drip(self) -> None:
        """Answer a byte at a time until the caller hangs up."""
        self.close_connection = True
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n")
        with contextlib.suppress(OSError):
            while True:
                self.wfile.write(b" ")
                time.sleep(3)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if not self.allowed():
            self.reply(401, {"error": "Unauthorized"})
        elif path.startswith("/v1/") and fault("api"):
            self.drip()
        elif path in ("/health", "/ping"):
            self.reply(503 if self.api.dead or fault("health") == "503" else 200)
        elif path == "/v1/models":
            self.reply(200, self.api.models())
        elif path == "/version":
            self.reply(200, {"version": VERSION})
        else:
            self.reply(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if not self.allowed():
            self.reply(401, {"error": "Unauthorized"})
        elif self.path.partition("?")[0] != "/v1/completions":
            self.reply(404, {"detail": "Not Found"})
        elif self.api.dead:
            self.reply(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
        else:
            request = {"model": self.api.served()[0], **json.loads(data)}
            if request["model"] in self.api.served():
                self.reply(200, self.api.complete(request))
            else:
                message = f"The model `{request['model']}` does not exist."
                self.reply(404, {"error": {"message": message, "type": "NotFoundError", "code": 404}})

    def log_request(self, code: object = "-", _size: object = "-") -> None:
        status = f"{code} {HTTPStatus(int(str(code))).phrase}"
        host, port = self.client_address[:2]
        self.api.log.raw(f'INFO:     {host}:{port} - "{self.requestline}" {status}')


def main() -> None:
    command, *rest = sys.argv[1:] or ["--help"]
    if command in ("--version", "-v"):
        print(VERSION)
    elif command == "serve":
        Server(parse(rest)).run()
    else:
        sys.exit("usage: vllm [-h] [-v] serve [model_tag] [options]")


if __name__ == "__main__":
    main()
