"""A plugin of vLLM: its CPU build takes memory of a simulated card, as a CUDA build does of a real one.

The worker process takes it before it loads the model, on the first card of the
container; without a card the server doesn't start. Nothing else of vLLM changes.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

GIB = 1024  # MiB


def take_memory(utilization: float) -> int:
    """Take that share of the card's memory, as long as the returned file is open."""
    # The runtime's hook mounts it with the card, like libcuda.
    sys.path.insert(0, "/usr/local/lib/simulated-gpu")
    try:
        gpu: Any = importlib.import_module("simulated_gpu")
        card = gpu.visible_cards()[0]
    except (ImportError, IndexError):
        raise RuntimeError("Failed to infer device type: this container has no card") from None
    finally:
        sys.path.pop(0)
    wanted = card.usable_mib * utilization
    free = card.usable_mib - card.used_mib
    if free < wanted:
        raise ValueError(
            f"Free memory on device cuda:0 ({free / GIB:.2f}/{card.usable_mib / GIB:.2f} GiB) on startup is less than "
            f"desired GPU memory utilization ({utilization}, {wanted / GIB:.2f} GiB)."
        )
    held: int = gpu.allocate(card, int(wanted))
    return held


def register() -> None:
    """Let each worker take its memory first; vLLM calls this in each process, perhaps twice."""
    worker: Any = importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
    plain = worker.init_device
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def init_device(self: Any) -> None:  # noqa: ANN401
        self.simulated_card = take_memory(self.cache_config.gpu_memory_utilization)
        plain(self)

    worker.init_device = init_device
