"""The values of the role's variables: each refusal names its variable, and no value ends in a traceback."""

from __future__ import annotations

import json
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import settings
from hypothesis import given
from hypothesis import strategies as st

from tests.wanted import wanted

# What YAML and -e can make of a variable.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
CACHES = ["HF_CACHE", "VLLM_CACHE", "VLLM_MODELS"]


def problems(**changes: Any) -> list[str]:  # noqa: ANN401
    return list(settings.check(wanted(**changes)))


def only(**changes: Any) -> str:  # noqa: ANN401
    """Return the one problem."""
    (problem,) = problems(**changes)
    return problem


@given(st.sampled_from(sorted(wanted()["env"])), ANYTHING)
def test_no_value_of_a_variable_is_a_traceback(key: str, value: object) -> None:
    assert all(isinstance(problem, str) for problem in problems(**{key: value}))


@given(ANYTHING, st.dictionaries(st.text(), ANYTHING, max_size=3), ANYTHING)
def test_no_argument_or_environment_is_a_traceback(
    arguments: object, environment: dict[str, Any], key: object
) -> None:
    problems(extra_args=arguments, server_env=environment)
    problems(secret_env=environment, secrets={"VLLM_API_KEY": key})


@pytest.mark.parametrize("key", sorted(settings.VARIABLES))
@pytest.mark.parametrize("empty", ["", " ", None])
def test_an_empty_value_is_refused(key: str, empty: str | None) -> None:
    problem = f"{settings.VARIABLES[key]} is empty. Give it a value, or remove it to use its default."
    assert (problem in problems(**{key: empty})) == (key != "VLLM_EXTRA_ARGS")


@pytest.mark.parametrize("key", sorted({*wanted()["env"]} & {*settings.VARIABLES}))
@pytest.mark.parametrize("character", ["\n", "\0", "\x1b", "\x7f", "\ud800"])
def test_a_control_character_is_refused(key: str, character: str) -> None:
    problem = "has a line break or another control character, which .env can't hold. Remove it."
    assert f"{settings.VARIABLES[key]} {problem}" in problems(**{key: f"a{character}b"})


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("VLLM_PORT", ["1", "80", "65535", 8000]),
        ("VLLM_BIND_ADDRESS", ["127.0.0.1", "0.0.0.0", "10.0.0.5", "[::1]", "::1", "[::]", "[fe80::1]"]),
        ("VLLM_GPU_MEMORY_UTILIZATION", ["0.90", ".5", "1", "1.0", "0.001", 0.9, 1, "9e-1", "1e-05"]),
        ("project_dir", ["/opt/vllm-gpu", "/opt", "/opt/", "/opt//x", "/opt/ä b", "/opt/..x", "/opt/$x"]),
        ("VLLM_MODEL", ["/models/-x"]),
        *((key, ["/data", "/data/ä b/$x", "vllm-cache"]) for key in CACHES),
        ("extra_args", [
            "--model-impl auto", "--model-loader-extra-config {}", "--hf-config-path /x", "--hf-overrides {}",
            "--config-format hf", "--api-server-count 1", "--port-x", "--host-x", "--served-model-name a b",
            "--tensor-parallel-size 1", "-tp 1", "-tp=1", "--tensor_parallel_size=1", "-tp1", "-O3", "--seed -1",
        ]),
        ("secrets", [{"VLLM_API_KEY": key} for key in ("sk-0123456789", "a$b$$c${d}'\"\\`#", "", 12345678)]),
        ("server_env", [
            {"HF_ENDPOINT": "https://hub.example.com"}, {"HF_HUB_OFFLINE": 1}, {"HTTPS_PROXY": "http://u:pw@proxy:3128"},
            {"NO_PROXY": ""}, {"VLLM_LOGGING_LEVEL": "DEBUG"}, {"environment": "x"}, {"X": "a$b ü '\"\\"}, {"A_TOKEN": "1"},
        ]),
        ("secret_env", [{"AWS_SECRET_ACCESS_KEY": "0123456789"}]),
    ],
)  # fmt: skip
def test_values_that_pass(option: str, values: list[object]) -> None:
    assert problems() == []
    for value in values:
        assert problems(**{option: value}) == []


@pytest.mark.parametrize(
    ("option", "message", "values"),
    [
        ("VLLM_PORT", "vllm_gpu_port is {}; it must be a whole number from 1 to 65535.", [
            "0", "65536", "100000", "-1", "080", "8000 ", " 8000", "8000.0", 8000.0, True, "1e3", "٨", "a",
        ]),
        ("VLLM_BIND_ADDRESS", "vllm_gpu_bind_address is ", [
            "gpu01", "*", "127.1", "010.0.0.1", "0x7f.0.0.1", "127.0.0.1 ", "127.0.0.1/8", "256.0.0.1", "[127.0.0.1]",
            "[::1", "::1]", "[[::1]]", "fe80::1%eth0", "127.0.0.1:8000", "[::1]:8000", "2130706433", "\uff11.1.1.1",
            "224.0.0.1", "255.255.255.255", "ff02::1",
        ]),
        ("VLLM_GPU_MEMORY_UTILIZATION", "vllm_gpu_memory_utilization is {}; it must be a number above 0", [
            "0", "0.0", "1.01", "-0.5", "nan", "inf", "1e-400", "90%", "0,9", " 0.9", "0.9 ", "0.9_0", "\u0660.\u0669", "1e",
        ]),
        ("project_dir", "vllm_gpu_project_dir is {}", [
            "", "/", "//", "/.", "/./", "opt", "./opt", "~/x", "/opt/../x", "/opt/..", "/opt/a:b", "/opt/a\nb", "/x\n",
        ]),
        *((key, f"{settings.VARIABLES[key]} is {{}}; it must be an absolute path", [
            "./x", "x/y", "../x", ".", "..", "~", "$HOME", "/data:ro", "-x", "a b",
        ]) for key in CACHES),
        ("VLLM_MODEL", "vllm_gpu_model is {}, which vLLM would read as an option.", ["--port"]),
        ("extra_args", "vllm_gpu_extra_args can't be split into words (No closing quotation)", ["--a 'b"]),
        ("extra_args", "vllm_gpu_extra_args starts with org/other, which is not an option", ["org/other --seed 3"]),
        ("extra_args", "vllm_gpu_extra_args has --served-model. Write --served-model-name in full", ["--served-model chat"]),
    ],
)  # fmt: skip
def test_values_that_are_refused(option: str, message: str, values: list[object]) -> None:
    for value in values:
        assert only(**{option: value}).startswith(message.format(value))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (None, []),
        ([], []),
        ("", []),
        (["--seed", 3, "--x", 0.5, "a b"], ["--seed", "3", "--x", "0.5", "a b"]),
        ("--seed 3; --x 'a b' \"c\" d\\ e", ["--seed", "3;", "--x", "a b", "c", "d e"]),
    ],
)
def test_words(arguments: object, words: list[str]) -> None:
    assert settings.words(arguments) == words


@pytest.mark.parametrize(
    "arguments", [5, True, 0, False, {}, {"--seed": 3}, [None], [True], [["--seed"]], [{"seed": 3}]]
)
def test_arguments_that_are_not_words(arguments: object) -> None:
    problem = f"vllm_gpu_extra_args is {json.dumps(arguments)}; it must be a list of"
    assert problem in only(extra_args=arguments)


@pytest.mark.parametrize(
    ("option", "variable"),
    [
        ("--port 8001", "Use vllm_gpu_port"),
        ("--port=8001", "vllm_gpu_port"),
        ("--por 8001", "vllm_gpu_port"),
        ("--po 8001", "vllm_gpu_port"),
        ("--seed 3 --port 8001", "vllm_gpu_port"),
        ("--ho 0.0.0.0", "vllm_gpu_bind_address"),
        ("--uds /x", "vllm_gpu_bind_address"),
        ("--model x", "vllm_gpu_model"),
        ("--gpu_memory_utilization 1", "vllm_gpu_memory_utilization"),
        ("--gpu-mem=1", "vllm_gpu_memory_utilization"),
        ("--api_key=x", "vllm_gpu_api_key"),
        ("--api-k x", "vllm_gpu_api_key"),
        ("--hf-token x", "vllm_gpu_hf_token"),
        ("--download-dir /x", "vllm_gpu_hf_cache"),
        ("--config x.yaml", "a file could set any option"),
        ("--headless", "Remove it: the server is proven by its API"),
        ("--grpc", "Remove it: the server is proven by its HTTP API"),
        ("--ssl-keyfile x", "proxy"),
        ("--ssl_cert=x", "proxy"),
        ("--root-path /x", "proxy"),
    ],
)
def test_options_that_the_role_sets(option: str, variable: str) -> None:
    problem = only(extra_args=option)
    assert problem.startswith("vllm_gpu_extra_args has --")
    assert variable in problem
    assert problems(extra_args=option.split()) == [problem]


@pytest.mark.parametrize(
    "option",
    [
        "-tp 2", "-tp=2", "-tp2", "-tp", "--tensor-parallel-size 2", "--tensor_parallel_size=2", "--tensor-par 2",
        "-tp 2 --seed 1", "-pp 2", "--pipeline-parallel-size=4", "-dp 2", "--data-parallel-size 2", "-dpl 2",
        "-pcp 2", "-dcp 2", "--nnodes 2", "-n 2",
    ],
)  # fmt: skip
def test_options_that_want_more_gpus(option: str) -> None:
    assert "the server gets exactly one GPU, so only 1 is possible." in only(extra_args=option)


@pytest.mark.parametrize("name", ["VLLM_API_KEY", "HF_TOKEN"])
@pytest.mark.parametrize(
    "key", ["with a blank", "line\nbreak12", "tab\t12345678", "schlüssel-123", "\uff11\uff12345678"]
)
def test_keys_that_no_header_can_hold(name: str, key: str) -> None:
    assert f"{settings.VARIABLES[name]} has a space, a line break or a non-ASCII" in only(secrets={name: key})


@pytest.mark.parametrize("weak", ["test", "vllm-openai", "/opt/vllm-gpu", "Qwen3-0.6B"])
@pytest.mark.parametrize(
    ("option", "key", "name"),
    [
        ("secrets", "VLLM_API_KEY", "vllm_gpu_api_key"),
        ("secret_env", "MY_KEY", "MY_KEY of vllm_gpu_secret_env"),
    ],
)
def test_a_secret_that_can_not_be_hidden(option: str, key: str, name: str, weak: str) -> None:
    """Ansible would hide it everywhere in a module's result, such as in the image's name in the record."""
    assert only(**{option: {key: weak}}).startswith(f"{name} is shorter than 8 characters, or also appears")


@pytest.mark.parametrize("variable", ["server_env", "secret_env"])
@pytest.mark.parametrize(
    ("reason", "names"),
    [
        (": vLLM takes it for its internal ports; the API's port is vllm_gpu_port.", ["VLLM_PORT"]),
        (": gpu_device_id alone decides", ["CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"]),
        (": it would move a cache off its mount", ["HF_HOME"]),
        (". Use vllm_gpu_api_key, which sets it.", ["VLLM_API_KEY"]),
        (". Use vllm_gpu_hf_token, which sets it.", ["HF_TOKEN"]),
        (". Use vllm_gpu_model, which sets it.", ["VLLM_MODEL"]),
        (", which the compose file uses itself", ["VLLM_VOLUME_PREFIX", "VLLM_START_PERIOD"]),
        (
            ", which Compose would read as one of its own settings.",
            ["COMPOSE_PROJECT_NAME", "COMPOSE_FILE", "DOCKER_HOST"],
        ),
        (", which is not a valid name", ["", "1A", "A B", "A-B", "A\nprivileged: true", "ÄRGER"]),
    ],
)
def test_environment_variables_that_are_refused(variable: str, reason: str, names: list[str]) -> None:
    for name in names:
        problem = f"vllm_gpu_{variable.replace('server_', '')} has {name}{reason}"
        assert any(found.startswith(problem) for found in problems(**{variable: {name: "zq-0123456789"}}))


@pytest.mark.parametrize("variable", ["server_env", "secret_env"])
@pytest.mark.parametrize("value", [None, True, [], {}, ["a"], {"a": {"b": "12345678"}}, "a\nb-12345678"])
def test_values_of_the_environment_that_are_not_text(variable: str, value: object) -> None:
    found = problems(**{variable: {"A": value}})
    assert sum(" has A, whose value " in problem for problem in found) == 1


@pytest.mark.parametrize(
    "environment", [{"AWS_SECRET_ACCESS_KEY": "S3CRETpw-01"}, {"HTTPS_PROXY": "http://u:S3CRETpw@proxy:3128"}]
)
def test_a_secret_must_be_among_the_secrets(environment: dict[str, str]) -> None:
    (name,), problem = environment, only(server_env=environment)
    assert f"{name}, which looks like a secret. Put it in vllm_gpu_secret_env." in problem
    assert "S3CRET" not in problem


def test_a_variable_is_either_plain_or_secret() -> None:
    both = {"A": "0123456789"}
    assert only(server_env=both, secret_env=both) == (
        "A is in vllm_gpu_env and in vllm_gpu_secret_env. Keep one of them."
    )
