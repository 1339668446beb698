"""Ids of GPUs."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import gpus
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem
from hypothesis import given
from hypothesis import strategies as st

UUIDS = ["GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "GPU-5060b7e9-81d2-4c6f-b03a-2d94f5a7c1e8"]
GPUS: list[dict[str, Any]] = [
    {"index": index, "uuid": uuid, "name": f"Card {index}"} for index, uuid in enumerate(UUIDS)
]


@pytest.mark.parametrize("requested", ["1", UUIDS[1], UUIDS[1].upper(), "00000000:02:00.0", "02:00.0"])
def test_an_index_a_uuid_and_a_bus_id_name_a_card(requested: str) -> None:
    verdict = {"gpus": GPUS, "expected": {"id": requested, "index": 1, "uuid": UUIDS[1]}}
    assert gpus.find(requested, verdict) == GPUS[1]


def test_the_memory_of_a_mig_instance_is_unknown() -> None:
    mig = "MIG-3fae9b5e-8f29-5d51-9e26-b1c0c9a9b9f2"
    verdict = {"gpus": GPUS, "expected": {"id": mig, "index": 1, "uuid": mig}}
    gpu = gpus.find(mig, verdict)
    assert (gpu["index"], gpu["uuid"], gpu["memory_total_mib"]) == (1, mig, None)
    assert gpu["card_uuid"] == UUIDS[1]  # by which the card may be set aside


@pytest.mark.parametrize("index", [None, 1])
def test_a_card_that_could_not_be_parsed_is_not_another(index: int | None) -> None:
    odd = {"index": index, "uuid": None, "name": None}
    right = {"index": index, "uuid": UUIDS[1], "name": "Card"}
    verdict = {"gpus": [odd, right], "expected": {"id": UUIDS[1], "index": index, "uuid": UUIDS[1]}}
    assert gpus.find(UUIDS[1], verdict) == right


@given(st.one_of(st.text(), st.from_regex(r"[0-9 ,.\-]{1,6}"), st.sampled_from(UUIDS).map(str.upper)))
def test_any_other_text_is_refused(requested: str) -> None:
    refused(requested)


@pytest.mark.parametrize(
    "requested",
    ["01", " 1", "1 ", "1\n", "1.0", "0,1", "-1", "all", "", "True", "\uff11", "1\uff11", "²", "9" * 400, "1\x00", "$(id)"],
)  # fmt: skip
def test_texts_that_are_not_ids(requested: str) -> None:
    assert "which is not the id of one GPU" in refused(requested)


def test_an_id_of_no_card() -> None:
    assert "but this host has no such GPU" in refused(UUIDS[0][:12])


def refused(requested: str) -> str:
    with pytest.raises(Problem) as refusal:
        gpus.find(requested, {"gpus": GPUS, "expected": None})
    text = str(refusal.value)
    assert f"Choose 0 (Card 0, {UUIDS[0]}) or 1 (Card 1, {UUIDS[1]})." in text
    # No control character of the input reaches a terminal.
    assert text.isprintable()
    return text


def test_a_row_that_could_not_be_parsed_matches_no_id() -> None:
    odd = {"index": None, "uuid": None, "pci_bus_id": None, "name": None}
    assert not gpus.is_called(odd, "None")
    assert not gpus.is_called(odd, "1")
    assert gpus.describe([odd]) == "? (?, ?)"
