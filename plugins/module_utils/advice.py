# SPDX-License-Identifier: MIT
"""Advice for the Docker Engine's messages about GPUs."""

from __future__ import annotations

NO_DRIVER = (
    "The Docker Engine doesn't know the NVIDIA driver. Install the NVIDIA Container Toolkit, run "
    "`nvidia-ctk runtime configure --runtime=docker`, and restart the Docker Engine."
)
# Keys are parts of messages.
ADVICE = {
    "could not select device driver": NO_DRIVER,
    "unknown device": "NVIDIA's hook knows no such GPU. Compare gpu_device_id with `nvidia-smi -L` on the host.",
    "error running prestart hook": (
        "NVIDIA's hook could not set up the GPU; its own message is quoted above. Try `nvidia-smi` and "
        "`nvidia-container-cli info` on the host."
    ),
    "unresolvable CDI devices": (
        "The CDI specification has no such GPU. Compare gpu_device_id with `nvidia-ctk cdi list`, and regenerate "
        "the specification after a change of cards: `nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml`."
    ),
    "failed to discover GPU vendor from CDI": (
        "The Docker Engine finds no CDI specification of a GPU. Check that the driver is loaded (`nvidia-smi`), then run "
        "`nvidia-ctk cdi generate --output=/etc/cdi/nvidia.yaml` and restart the Docker Engine."
    ),
}


def with_advice(message: str) -> str:
    """Return a message, with advice for what it quotes of the Docker Engine."""
    found = [advice for text, advice in ADVICE.items() if text.lower() in message.lower()]
    return "\n".join([message, *found])
