"""What names a GPU."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import gpus
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.shell import Problem
from hypothesis import example, given
from hypothesis import strategies as st

UUIDS = ["GPU-5090a1c4-3f0e-4b7d-9a52-6e1d70c8b2f3", "GPU-5060b7e9-81d2-4c6f-b03a-2d94f5a7c1e8"]


GPUS: list[dict[str, Any]] = [
    {"index": index, "uuid": uuid, "name": f"Card {index}"} for index, uuid in enumerate(UUIDS)
]


@pytest.mark.parametrize("requested", ["1", UUIDS[1], UUIDS[1].upper(), "00000000:02:00.0", "02:00.0"])
def test_an_index_a_uuid_or_a_bus_id_is_what_the_referee_took_it_for(requested: str) -> None:
    verdict = {"gpus": GPUS, "expected": {"id": requested, "index": 1, "uuid": UUIDS[1]}}
    assert gpus.find(requested, verdict) == GPUS[1]


def test_a_mig_instance_has_no_memory_of_a_whole_card() -> None:
    mig = "MIG-3fae9b5e-8f29-5d51-9e26-b1c0c9a9b9f2"
    verdict = {"gpus": GPUS, "expected": {"id": mig, "index": 1, "uuid": mig}}
    gpu = gpus.find(mig, verdict)
    assert (gpu["index"], gpu["uuid"], gpu["memory_total_mib"]) == (1, mig, None)
    assert gpu["card_uuid"] == UUIDS[1]  # by which the card may be set aside


@pytest.mark.parametrize("index", [None, 1])
def test_a_card_whose_row_is_odd_is_not_taken_for_another(index: int | None) -> None:
    odd = {"index": index, "uuid": None, "name": None}
    right = {"index": index, "uuid": UUIDS[1], "name": "Card"}
    verdict = {"gpus": [odd, right], "expected": {"id": UUIDS[1], "index": index, "uuid": UUIDS[1]}}
    assert gpus.find(UUIDS[1], verdict) == right


@given(st.one_of(st.text(), st.from_regex(r"[0-9 ,.\-]{1,6}"), st.sampled_from(UUIDS).map(str.upper)))
@example("01")
@example(" 1")
@example("1 ")
@example("1\n")
@example("1.0")
@example("0,1")
@example("-1")
@example("all")
@example("True")
@example("１")  # noqa: RUF001 - that is the point
@example("²")
@example("9" * 400)
@example("1\x00")
@example("$(id)")
@example("GPU-5090a1c4")
def test_everything_else_is_refused_with_the_choice(requested: str) -> None:
    with pytest.raises(Problem) as refusal:
        gpus.find(requested, {"gpus": GPUS, "expected": None})
    text = str(refusal.value)
    assert f"It could be 0 (Card 0, {UUIDS[0]}) or 1 (Card 1, {UUIDS[1]})." in text
    # Whatever was typed can't drive the terminal that shows the message.
    assert text.isprintable()


def test_an_odd_row_of_another_card_is_no_match_and_no_traceback() -> None:
    odd = {"index": None, "uuid": None, "pci_bus_id": None, "name": None}
    assert not gpus.is_called(odd, "None")
    assert not gpus.is_called(odd, "1")
    assert gpus.describe([odd]) == "? (?, ?)"
