"""What the role's variables may hold: each refusal names its variable, and nothing ends in a traceback."""

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


def problems(**changes: Any) -> list[str]:  # noqa: ANN401
    return list(settings.check(wanted(**changes)))


def only(**changes: Any) -> str:  # noqa: ANN401
    """The one problem."""
    (problem,) = problems(**changes)
    return problem


def test_the_defaults_pass() -> None:
    assert problems() == []


@given(st.sampled_from(sorted(wanted()["env"])), ANYTHING)
def test_no_value_of_a_variable_is_a_traceback(key: str, value: object) -> None:
    assert all(isinstance(one, str) for one in problems(**{key: value}))


@given(ANYTHING, st.dictionaries(st.text(), ANYTHING, max_size=3), ANYTHING)
def test_nor_is_one_of_the_arguments_or_the_environment(
    arguments: object, environment: dict[str, Any], key: object
) -> None:
    problems(extra_args=arguments, server_env=environment)
    problems(secret_env=environment, secrets={"VLLM_API_KEY": key})


@pytest.mark.parametrize("key", sorted(settings.VARIABLES))
def test_an_empty_value_is_refused_by_its_variable(key: str) -> None:
    for text in ("", " "):
        named = [one for one in problems(**{key: text}) if f"{settings.VARIABLES[key]} is empty" in one]
        assert bool(named) == (key != "VLLM_EXTRA_ARGS")


@pytest.mark.parametrize("key", sorted({*wanted()["env"]} & {*settings.VARIABLES}))
@pytest.mark.parametrize("character", ["\n", "\0", "\x1b", "\x7f", "\ud800"])
def test_a_control_character_is_refused_by_its_variable(key: str, character: str) -> None:
    named = settings.VARIABLES[key]
    assert f"{named} has a line break or another control character, which .env can't hold. Remove it." in (
        problems(**{key: f"a{character}b"})
    )


@pytest.mark.parametrize("port", ["1", "80", "65535", 8000])
def test_ports(port: object) -> None:
    assert problems(VLLM_PORT=port) == []


@pytest.mark.parametrize(
    "port", ["0", "65536", "100000", "-1", "080", "8000 ", " 8000", "8000.0", 8000.0, True, "1e3", "٨", "a"]
)
def test_what_is_no_port(port: object) -> None:
    assert only(VLLM_PORT=port) == f"vllm_gpu_port is {port}; it must be a whole number from 1 to 65535."


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "10.0.0.5", "[::1]", "::1", "[::]", "[fe80::1]"])
def test_addresses(address: str) -> None:
    assert problems(VLLM_BIND_ADDRESS=address) == []


@pytest.mark.parametrize(
    "address",
    [
        "gpu01", "*", "127.1", "010.0.0.1", "0x7f.0.0.1", "127.0.0.1 ", "127.0.0.1/8", "256.0.0.1", "[127.0.0.1]",
        "[::1", "::1]", "[[::1]]", "fe80::1%eth0", "127.0.0.1:8000", "[::1]:8000", "2130706433", "\uff11.1.1.1",
    ],
)  # fmt: skip
def test_what_is_no_address(address: str) -> None:
    assert "vllm_gpu_bind_address is " in only(VLLM_BIND_ADDRESS=address)


@pytest.mark.parametrize("share", ["0.90", ".5", "1", "1.0", "0.001", 0.9, 1, "9e-1", "1e-05"])
def test_shares_of_memory(share: object) -> None:
    assert problems(VLLM_GPU_MEMORY_UTILIZATION=share) == []


@pytest.mark.parametrize(
    "share",
    [
        "0",
        "0.0",
        "1.01",
        "-0.5",
        "nan",
        "inf",
        "1e-400",
        "90%",
        "0,9",
        " 0.9",
        "0.9 ",
        "0.9_0",
        "\u0660.\u0669",
        "1e",
    ],
)
def test_what_is_no_share_of_memory(share: str) -> None:
    assert f"vllm_gpu_memory_utilization is {share}; it must be a number above 0" in (
        only(VLLM_GPU_MEMORY_UTILIZATION=share)
    )


@pytest.mark.parametrize(
    "path", ["/opt/vllm-gpu", "/opt", "/opt/", "/opt//x", "/opt/ä b", "/opt/..x", "/opt/$x"]
)
def test_directories(path: str) -> None:
    assert problems(project_dir=path) == []


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//",
        "/.",
        "/./",
        "opt",
        "./opt",
        "~/x",
        "/opt/../x",
        "/opt/..",
        "/opt/a:b",
        "/opt/a\nb",
        "/x\n",
    ],
)
def test_what_is_no_directory_of_its_own(path: str) -> None:
    assert "vllm_gpu_project_dir is " in only(project_dir=path)


@pytest.mark.parametrize("key", ["HF_CACHE", "VLLM_CACHE", "VLLM_MODELS"])
def test_caches(key: str) -> None:
    for path in ("/data", "/data/ä b/$x", "vllm-cache"):
        assert problems(**{key: path}) == []
    for path in ("./x", "x/y", "../x", ".", "..", "~", "$HOME", "/data:ro", "-x", "a b"):
        assert f"{settings.VARIABLES[key]} is {path}; it must be an absolute path" in only(**{key: path})


def test_a_model_that_would_be_an_option() -> None:
    assert "vllm_gpu_model is --port" in only(VLLM_MODEL="--port")
    assert problems(VLLM_MODEL="/models/-x") == []


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
def test_arguments_that_are_no_words(arguments: object) -> None:
    assert f"vllm_gpu_extra_args is {json.dumps(arguments)}; it must be a list of" in only(
        extra_args=arguments
    )


def test_a_quote_that_never_closes() -> None:
    assert "vllm_gpu_extra_args can't be split into words (No closing quotation)" in only(extra_args="--a 'b")


@pytest.mark.parametrize(
    "arguments",
    [
        "--model-impl auto", "--model-loader-extra-config {}", "--hf-config-path /x", "--hf-overrides {}",
        "--config-format hf", "--api-server-count 1", "--port-x", "--host-x", "--served-model-name a b",
        "--tensor-parallel-size 1", "-tp 1", "-tp=1", "--tensor_parallel_size=1", "-tp1", "-O3", "--seed -1",
    ],
)  # fmt: skip
def test_options_that_are_the_users(arguments: str) -> None:
    assert problems(extra_args=arguments) == []


@pytest.mark.parametrize(
    ("option", "variable"),
    [
        ("--port 8001", "vllm_gpu_port"),
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
        ("--config x.yaml", "a file could set any other option"),
        ("--headless", "the API is what proves"),
        ("--grpc", "the API that proves"),
        ("--ssl-keyfile x", "proxy"),
        ("--ssl_cert=x", "proxy"),
        ("--root-path /x", "proxy"),
    ],
)
def test_options_that_are_the_roles_own(option: str, variable: str) -> None:
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
    assert "the server gets exactly one GPU, so that only 1 is possible." in only(extra_args=option)


def test_a_second_model() -> None:
    assert "begins with org/other, which is no option" in only(extra_args="org/other --seed 3")


@pytest.mark.parametrize("key", ["sk-0123456789", "a$b$$c${d}'\"\\`#", "", 12345678])
def test_keys(key: object) -> None:
    assert problems(secrets={"VLLM_API_KEY": key}) == []


@pytest.mark.parametrize(
    "key", ["with a blank", "line\nbreak12", "tab\t12345678", "schlüssel-123", "\uff11\uff12345678"]
)
@pytest.mark.parametrize("name", ["VLLM_API_KEY", "HF_TOKEN"])
def test_keys_that_no_header_can_carry(name: str, key: str) -> None:
    assert f"{settings.VARIABLES[name]} has a blank, a line break or a character" in only(secrets={name: key})


@pytest.mark.parametrize("weak", ["test", "vllm-openai", "/opt/vllm-gpu", "Qwen3-0.6B"])
def test_a_secret_that_could_not_be_hidden(weak: str) -> None:
    """Ansible blacks it out of whatever a module says, the image's name in the record included."""
    assert only(secrets={"VLLM_API_KEY": weak}).startswith(
        "vllm_gpu_api_key is shorter than 8 characters, or"
    )
    assert only(secret_env={"MY_KEY": weak}).startswith("MY_KEY of vllm_gpu_secret_env is shorter than 8")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_ENDPOINT", "https://hub.example.com"), ("HF_HUB_OFFLINE", 1), ("HTTPS_PROXY", "http://u:pw@proxy:3128"),
        ("NO_PROXY", ""), ("VLLM_LOGGING_LEVEL", "DEBUG"), ("environment", "x"), ("X", "a$b ü '\"\\"), ("A_TOKEN", "1"),
    ],
)  # fmt: skip
def test_environment_variables(name: str, value: object) -> None:
    assert problems(server_env={name: value}) == []


@pytest.mark.parametrize("variable", ["server_env", "secret_env"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("VLLM_PORT", ": vLLM takes it for its internal ports; the API's port is vllm_gpu_port."),
        ("CUDA_VISIBLE_DEVICES", ": gpu_device_id alone decides"),
        ("NVIDIA_VISIBLE_DEVICES", ": gpu_device_id alone decides"),
        ("HF_HOME", ": it would move a cache off its mount"),
        ("VLLM_API_KEY", ". Use vllm_gpu_api_key, which sets it."),
        ("HF_TOKEN", ". Use vllm_gpu_hf_token, which sets it."),
        ("VLLM_MODEL", ". Use vllm_gpu_model, which sets it."),
        ("VLLM_VOLUME_PREFIX", ", which the compose file reads for itself"),
        ("VLLM_START_PERIOD", ", which the compose file reads for itself"),
        ("COMPOSE_PROJECT_NAME", ", which Compose would take for a setting of its own."),
        ("COMPOSE_FILE", ", which Compose would take for a setting of its own."),
        ("DOCKER_HOST", ", which Compose would take for a setting of its own."),
        ("", ", which is no name"),
        ("1A", ", which is no name"),
        ("A B", ", which is no name"),
        ("A-B", ", which is no name"),
        ("A\nprivileged: true", ", which is no name"),
        ("ÄRGER", ", which is no name"),
    ],
)
def test_environment_variables_that_are_refused(variable: str, name: str, reason: str) -> None:
    found = problems(**{variable: {name: "zq-0123456789"}})
    assert any(
        one.startswith(f"vllm_gpu_{variable.replace('server_', '')} has {name}{reason}") for one in found
    )


@pytest.mark.parametrize("variable", ["server_env", "secret_env"])
@pytest.mark.parametrize("value", [None, True, [], {}, ["a"], {"a": {"b": "12345678"}}, "a\nb-12345678"])
def test_values_of_the_environment_that_are_no_text(variable: str, value: object) -> None:
    (problem,) = (one for one in problems(**{variable: {"A": value}}) if "vllm_gpu_secret_env is" not in one)
    assert " has A, whose value " in problem


def test_a_secret_belongs_with_the_secrets_and_only_there() -> None:
    assert "Put it in vllm_gpu_secret_env" in only(server_env={"AWS_SECRET_ACCESS_KEY": "0123456789"})
    assert problems(secret_env={"AWS_SECRET_ACCESS_KEY": "0123456789"}) == []
    both = {"A": "0123456789"}
    assert only(server_env=both, secret_env=both) == (
        "A is in vllm_gpu_env and in vllm_gpu_secret_env. Keep one of them."
    )


def test_a_variable_without_a_value_is_empty() -> None:
    problems = list(settings.check(wanted(VLLM_MODEL=None)))
    assert problems == ["vllm_gpu_model is empty. Give it a value, or leave it out for its default."]


@pytest.mark.parametrize("address", ["224.0.0.1", "255.255.255.255", "ff02::1"])
def test_an_address_of_many_is_none_of_the_host(address: str) -> None:
    assert any(
        "vllm_gpu_bind_address is " in one for one in settings.check(wanted(VLLM_BIND_ADDRESS=address))
    )


def test_the_served_name_is_written_in_full() -> None:
    (problem,) = settings.check(wanted(extra_args=["--served-model", "chat"]))
    assert "Write --served-model-name in full" in problem


def test_a_password_within_a_url_is_a_secret() -> None:
    (problem,) = settings.check(wanted(server_env={"HTTPS_PROXY": "http://u:S3CRETpw@proxy:3128"}))
    assert "HTTPS_PROXY, which looks like a secret" in problem
    assert "S3CRET" not in problem
