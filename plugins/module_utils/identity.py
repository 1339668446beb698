# SPDX-License-Identifier: MIT
"""Checks that the GPU ids in the settings still mean the same cards, also for a proven server."""

from __future__ import annotations

import json
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Sequence

from . import gpus
from .settings import forced


class Context(NamedTuple):
    """What a check reads."""

    state: Mapping[str, Any]
    service: Mapping[str, Any]
    force: Sequence[str]
    training_gpus: Sequence[str]


def check_drift(context: Context) -> str | None:
    """The index still means the card that it meant when the server was proven."""
    gpu, last = context.state["gpu"], context.state["last_proven"]
    if not gpu or not last or "drift" in context.force:
        return None
    then = last["gpu"]
    requested = context.state["gpu_device_id"] or last["requested"]
    if not gpus.is_index(requested) or then["index"] != gpu["index"] or then["uuid"] == gpu["uuid"]:
        return None
    return (
        f"GPU {gpu['index']} is another card than it was: {then['name']} ({then['uuid']}) when the server was proven at "
        f"{last['proven_at']}, now {gpu['name']} ({gpu['uuid']}). Request the card by its UUID, or accept the new "
        f"numbering with {forced('drift')}."
    )


def check_training_ids(context: Context) -> str | None:
    """Each card that is set aside for training exists; a misspelt id would protect nothing."""
    # `-e vllm_gpu_training_gpus=` is a list with an empty text.
    names = filter(None, (str(name).strip() for name in context.training_gpus))
    cards = context.state["gpus"]
    lost = [name for name in names if not any(gpus.is_called(gpu, name) for gpu in cards)]
    if lost:
        instances = {gpus.canonical(uuid) for _card, _profile, uuid in gpus.instances()} - {None}
        lost = [name for name in lost if gpus.canonical(name) not in instances]
    if not lost:
        return None
    return (
        f"vllm_gpu_training_gpus names {', '.join(map(json.dumps, lost))}, but this host has no such GPU, so it "
        "would protect nothing. Use an index, a UUID or a PCI bus id (quoted in YAML) of "
        f"{gpus.describe(cards)}."
    )


CHECKS: list[Callable[[Context], str | None]] = [check_drift, check_training_ids]


def problems(checks: Sequence[Callable[[Context], str | None]], context: Context) -> Iterator[str]:
    """Yield the problems that the checks find."""
    for check in checks:
        problem = check(context)
        if problem:
            yield problem
