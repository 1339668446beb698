# SPDX-License-Identifier: MIT
"""What to do about the Docker Engine's messages where it can't give a container its GPU."""

from __future__ import annotations

NO_DRIVER = (
    "The Docker Engine doesn't know the NVIDIA driver. Install the NVIDIA Container Toolkit, run "
    "`nvidia-ctk runtime configure --runtime=docker`, and restart the engine."
)
# By a part of the message.
ADVICE = {
    "could not select device driver": NO_DRIVER,
    "unknown device": "NVIDIA's hook knows no such GPU. Compare gpu_device_id with `nvidia-smi -L` on the host.",
    "error running prestart hook": (
        "NVIDIA's hook could not set the GPU up; its own words follow in the message. Try `nvidia-smi` on the host, "
        "and `nvidia-container-cli info`."
    ),
    "unresolvable CDI devices": (
        "The CDI specification has no such GPU. Compare gpu_device_id with `nvidia-ctk cdi list`, and write the "
        "specification again after a change of cards: `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`."
    ),
    "failed to discover GPU vendor from CDI": (
        "The engine finds no CDI specification of a GPU. Look whether the driver is loaded (`nvidia-smi`), then run "
        "`nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml` and restart the engine."
    ),
}


def with_advice(message: str) -> str:
    """Return a message, and what to do about the texts of the engine that it quotes."""
    found = [advice for text, advice in ADVICE.items() if text.lower() in message.lower()]
    return "\n".join([message, *found])
