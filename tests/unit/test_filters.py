"""The role's filters and lookups."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.filter.fleet import status_table, twins
from ansible_collections.mlops.vllm_gpu.plugins.filter.passing_on import passing_on
from ansible_collections.mlops.vllm_gpu.plugins.lookup.unknown_variables import unknown
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.advice import ADVICE, with_advice

CARD = {"index": 1, "name": "NVIDIA GeForce RTX 5060 Ti with a very long name", "uuid": "GPU-1"}


def read(**state: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the variables of a host with a reading of it."""
    found = {
        "problems": [], "doubts": [], "notes": [], "gpu": CARD, "container": {"id": "c"}, "proven": False,
        "api": {"models": []}, "gpus": [CARD],
    }  # fmt: skip
    return {"__vllm_gpu_state": {**found, **state}}


def test_the_status_table() -> None:
    hosts = {
        "a": read(proven=True, api={"models": ["org/model", "short"]}, notes=["A note."]),
        "bb": read(
            doubts=["It is loading, and this is a sentence that does not fit into one line of the table."]
        ),
        "c": read(
            container=None, problems=["/x does not exist: no server was set up on this host yet."], gpu=None
        ),
        "d": {"__vllm_gpu_state": {"unreachable": True}},
        "e": {},
        "f": read(container=None, problems=["The driver is broken."], gpu=None),
    }
    assert status_table(list(hosts), hosts).splitlines() == [
        "HOST  GPU                           STATE        SERVES",
        "a     1 GeForce RTX 5060 Ti with …  proven       org/model, short",
        "    A note.",
        "bb    1 GeForce RTX 5060 Ti with …  NOT PROVEN",
        "    It is loading, and this is a sentence that does not fit into one",
        "    line of the table.",
        "c     -                             no server",
        "d     -                             unreachable  see the error above",
        "e     -                             NOT READ     see the error above",
        "f     -                             NOT PROVEN",
        "    The driver is broken.",
        "1 of 6 hosts has a proven server.",
        "ansible-playbook -i INVENTORY playbooks/verify.yml -l HOST   shows more.",
    ]


def test_two_names_of_one_machine() -> None:
    other = read(gpus=[{"uuid": "GPU-9"}, CARD])
    assert twins(["a", "b", "c"], {"a": read(), "b": other, "c": read()}) == ["a", "c"]
    assert twins(["a", "b"], {"a": read(), "b": other, "c": read()}) == []


def test_messages_of_docker_get_advice() -> None:
    assert with_advice("It died.") == "It died."
    for text, advice in ADVICE.items():
        assert with_advice(f"docker: {text.upper()}: x") == f"docker: {text.upper()}: x\n{advice}"


def test_a_compose_file_without_an_environment_is_unchanged() -> None:
    assert passing_on("services: {}\n", ["A"]) == "services: {}\n"


@pytest.mark.parametrize(
    "name", ["vllm_gpu_modle", "gpu_id", "GPU_DEVICE", "gpudeviceids", "VLLM_MODEL", "HF_CACHE", "HF_TOKEN"]
)
def test_unknown_names_that_look_like_the_roles(name: str) -> None:
    (problem,) = unknown({"vllm_gpu_model": "m", name: 1, "gpu_device_id": 0, "vllm_gpu_waves": [1]})
    assert problem.startswith(f"{name} is not a variable of this role.")


def test_other_names_pass() -> None:
    names = "vllm_gpus my_gpu_id gpu_ids VLLM_model HF_CACHE_DIR hf_token __vllm_gpu_state ansible_x"
    assert list(unknown(dict.fromkeys(names.split()))) == []


def test_words_of_the_command_line_without_a_variable() -> None:
    problems = list(unknown({"_raw_params": "--seed 3", "--x": "1", "x": 2}))
    assert [problem.split(" was given with -e")[0] for problem in problems] == ['"--seed 3"', "--x"]
