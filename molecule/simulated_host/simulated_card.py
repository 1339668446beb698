"""A plugin of vLLM: lets its CPU build take memory of a simulated card, as a CUDA build does of a real one.

In the process that does the model's work, before the model is loaded, on the first
card that the container was given; without a card the server doesn't start. Nothing
else of vLLM is changed.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

GIB = 1024  # MiB


def take(utilization: float) -> int:
    """Take that share of the card's memory; return the file that holds it, which must stay open."""
    # Comes with the card, from the runtime's hook, as libcuda does.
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
    """Let each worker take its memory first; called by vLLM in each of its processes, perhaps twice."""
    worker: Any = importlib.import_module("vllm.v1.worker.cpu_worker").CPUWorker
    plain = worker.init_device
    if hasattr(plain, "__wrapped__"):
        return

    @functools.wraps(plain)
    def init_device(self: Any) -> None:  # noqa: ANN401
        self.simulated_card = take(self.cache_config.gpu_memory_utilization)
        plain(self)

    worker.init_device = init_device
