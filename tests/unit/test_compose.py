"""What Compose makes of the role's files, asked of Compose itself: every text arrives as it was given."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import compose, dotenv, paths, settings, shell
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tests.wanted import COMPOSE, ROOT, wanted

# Anything that a line of .env can hold.
TEXTS = st.text(
    st.characters(min_codepoint=32, exclude_categories=["Cs"], exclude_characters="\x7f"), max_size=30
)
ODD = [
    "pa$word-12345678", "a$$b", "$$$$", "${X}", "${X:-y}", "$(id)", "`id`", "it's", 'a "b" c', "'\"", "a;b", "a > b",
    "a # b", "#b", "a&&b|c", "back\\slash", "\\", "\\\\", "\\'", "\\$x", "trail\\", " blanks ", "ü → 🎉", "", "*", "~", "=",
]  # fmt: skip


def resolved(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:  # noqa: ANN401
    """What is wanted, and the service as Compose resolves it from the .env that the role would write."""
    given_names = [*changes.get("server_env", {}), *changes.get("secret_env", {})]
    text = COMPOSE.replace(
        "    environment:\n", "    environment:\n" + "".join(f"      {name}:\n" for name in given_names)
    )
    one = wanted(compose=text, **changes)
    files = {paths.COMPOSE_FILE: text.encode(), paths.ENV_FILE: dotenv.merge(b"", settings.env_keys(one))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(ROOT / ".cache/docker"))
        service = compose.resolve(files, one["project_dir"], "vllm-gpu")
        config_hash = compose.config_hash(files, one["project_dir"], "vllm-gpu")
    assert re.fullmatch("[0-9a-f]{64}", config_hash)
    return one, service


def arguments(words: list[str]) -> dict[str, Any]:
    """The arguments, and their text in .env as the role's `quote` filter writes it."""
    return {"extra_args": words, "VLLM_EXTRA_ARGS": " ".join(map(shlex.quote, words))}


@examples(max_examples=15, deadline=None)
@given(st.lists(TEXTS, min_size=12, max_size=12))
@example(ODD[:12])
@example(ODD[12:24])
@example([*ODD[24:], *ODD[:9]])
def test_every_text_means_what_it_says(texts: list[str]) -> None:
    """An API key, tokens, other variables, arguments and paths; no name or path can hold a colon."""
    path = "/" + texts[0].replace(":", "").strip("/. ")
    one, service = resolved(
        secrets={"VLLM_API_KEY": texts[1], "HF_TOKEN": texts[2]},
        secret_env={"A": texts[3], "B": texts[4]},
        server_env={"C": texts[5], "D": texts[6]},
        HF_CACHE=path,
        VLLM_MODEL="/models/" + re.sub(r'[\\"]', "", texts[7]),
        **arguments(["--x", *texts[8:]]),
    )
    assert list(compose.contradictions(service, one)) == []
    assert service["command"][-5:] == ["--x", *texts[8:]]
    names = {"VLLM_API_KEY": 1, "HF_TOKEN": 2, "A": 3, "B": 4, "C": 5, "D": 6}
    assert {key: service["environment"][key] or "" for key in names} == {
        key: texts[number] for key, number in names.items()
    }


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[FE80::1]"]
)
def test_addresses(address: str) -> None:
    one, service = resolved(VLLM_BIND_ADDRESS=address, VLLM_PORT="9000")
    assert list(compose.contradictions(service, one)) == []
    assert service["ports"][0]["host_ip"] == address.strip("[]")


@pytest.mark.parametrize(
    "text",
    ["--seed 3; --max-model-len 512", "--a > b", "--a;--b", "--a 1 | --b", "--a `b`", "--a & --b"],
)
def test_a_text_of_which_compose_would_lose_a_part(text: str) -> None:
    one, service = resolved(extra_args=text, VLLM_EXTRA_ARGS=text)
    found = list(compose.contradictions(service, one))
    assert [service["command"][7:] == shlex.split(text)] == [not found]
    if found:
        assert found[0].startswith("vLLM would be started with the arguments ")
        assert "Give vllm_gpu_extra_args as a list" in found[0]


@pytest.mark.parametrize(
    "text", ["--a 'b c' --d \"e f\" g\\ h", "--a '$X' --b $Y", "--a '{\"x\": [1, 2]}'", "--a #b"]
)
def test_a_text_that_arrives(text: str) -> None:
    one, service = resolved(extra_args=text, VLLM_EXTRA_ARGS=text)
    assert list(compose.contradictions(service, one)) == []


@pytest.mark.parametrize("model", ["a\\b", "a\\\\b", "\\'"])
def test_a_model_that_would_be_another(model: str) -> None:
    one, service = resolved(VLLM_MODEL=model)
    (found,) = compose.contradictions(service, one)
    assert shlex.quote(model) in found


@pytest.mark.parametrize(
    "change", [{"VLLM_MODEL": 'a"b'}, {"extra_args": "--a (b)", "VLLM_EXTRA_ARGS": "--a (b)"}]
)
def test_a_command_that_compose_cannot_split(change: dict[str, str]) -> None:
    with pytest.raises(
        shell.Problem, match=r"invalid command line string Give vllm_gpu_extra_args as a list"
    ):
        resolved(**change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"command": ["m"]}, "vLLM would be started with the arguments m, not with Qwen"),
        ({"image": "x"}, "The image would be x, not vllm/vllm-openai:"),
        ({"ports": []}, "The API would be published on None:None, not on 127.0.0.1:8000."),
        (
            {"ports": [{"host_ip": "127.0.0.1", "published": "8000", "target": 80}]},
            "The API would be published on 127.0.0.1:8000, not",
        ),
        (
            {"ports": [{"host_ip": "0.0.0.0", "published": "8000", "target": 8000}]},
            "The API would be published on 0.0.0.0:8000, not on 127.0.0.1:8000.",
        ),
        ({"volumes": []}, "Nothing would be mounted at /root/.cache/huggingface, not huggingface-cache."),
        ({"environment": {}}, "VLLM_API_KEY would not reach the server as it was given."),
    ],
)
def test_each_difference_is_told(change: dict[str, Any], said: str) -> None:
    one, service = resolved(secrets={"VLLM_API_KEY": "sk-0123456789"})
    assert list(compose.contradictions(service, one)) == []
    found = list(compose.contradictions({**service, **change}, one))
    assert found[0].startswith(said)
    assert "sk-0123456789" not in "".join(found)


def test_nothing_but_env_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPU_DEVICE_ID", "VLLM_PORT", "VLLM_API_KEY", "C"):
        monkeypatch.setenv(name, "7")
    one, service = resolved(server_env={"C": "x"}, secrets={"VLLM_API_KEY": "sk-0123456789"})
    assert list(compose.contradictions(service, one)) == []


FILES = {paths.COMPOSE_FILE: b"services: {}\n", paths.ENV_FILE: b""}


def test_the_hash_is_only_asked_for_where_it_is_not_known(
    docker: Callable[..., Callable[[], list[str]]],
) -> None:
    calls = docker(json.dumps({"services": {"vllm": {"image": "a$$b"}}}))
    assert compose.resolve(FILES, "/opt/x", "p") == {"image": "a$b"}
    assert [call.endswith("config --format json") for call in calls()] == [True]
    compose.config_hash(FILES, "/opt/x", "p")
    assert calls()[-1].endswith("--hash vllm")


@pytest.mark.parametrize(
    "said",
    [
        "permission denied",
        "open /root/.docker/config.json: permission denied",
        "a $ is no reason",
        "panic: x",
        "\\$",
    ],
)
def test_another_failure_is_quoted_and_no_cause_is_guessed(
    docker: Callable[..., Callable[[], list[str]]], said: str
) -> None:
    docker(err=said, code=1)
    with pytest.raises(shell.Problem) as problem:
        compose.resolve(FILES, "/opt/x", "p")
    assert str(problem.value) == f"Compose can't use the configuration for /opt/x: {said}"


def test_what_compose_says_names_the_files_of_the_host() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            shell,
            "run",
            lambda argv, **_: shell.Output(1, "", f"{argv[argv.index('--env-file') + 1]}: line 3: bad"),
        )
        with pytest.raises(shell.Problem, match=r"for /opt/x: \.env: line 3: bad"):
            compose.resolve(FILES, "/opt/x", "p")


@pytest.mark.parametrize(
    "said", ['Invalid template: "${x"', "invalid interpolation format for services.vllm.image"]
)
def test_a_dollar_that_compose_trips_over(said: str) -> None:
    assert compose.explain(said, "/opt/x").endswith(f"{said} A value with a $ needs single quotes.")


@pytest.mark.parametrize(
    "said",
    [
        "docker: 'compose' is not a docker command.",
        "unknown shorthand flag: 'f' in -f",
        "unknown flag: --file",
    ],
)
def test_a_missing_plugin_is_named(said: str) -> None:
    assert "no Compose plugin" in compose.explain(said, "/opt/x")


def test_a_path_that_is_neither_a_path_nor_a_volume() -> None:
    with pytest.raises(shell.Problem, match="my-cache is neither a path nor one of the service's volumes"):
        resolved(HF_CACHE="my-cache")


def test_nothing_said_is_said_so() -> None:
    assert compose.explain("", "/opt/x") == "Compose can't use the configuration for /opt/x: no message"


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ("      A:\n      # B:\n      C: \n      D: x\n      E: ${E:-}\n", {"A", "C"}),
        ("      environment:\n      test:\n", {"environment", "test"}),
        ("", set()),
    ],
)
def test_the_names_that_a_file_passes_on(block: str, names: set[str]) -> None:
    """Not those of other parts of the file, whose namesakes in .env are the user's own."""
    assert (
        compose.passed_on(COMPOSE.replace("    environment:\n", f"    environment:\n{block}").encode())
        == names
    )
    assert compose.passed_on(b"services: {}\n") == set()


@pytest.mark.parametrize(
    "service",
    [{"command": ["m"]}, {"command": ["m"], "ports": [{"target": 8000}]}, {"ports": [{"published": "8000"}]}],
)
def test_a_compose_file_that_somebody_has_rewritten_is_named(service: dict[str, Any]) -> None:
    compose.check_service({"command": ["m"], "ports": [{"published": "8000"}]})
    with pytest.raises(shell.Problem, match="has been edited by hand"):
        compose.check_service(service)


@pytest.mark.parametrize(
    ("words", "values"),
    [
        (["m", "--x", "1", "2", "--y"], ["1", "2"]),
        (["m", "--x=1"], ["1"]),
        (["m", "--x", "1", "--x", "2"], ["2"]),
        (["m", "--x", "-1"], ["-1"]),
        (["m", "--x"], []),
        (["m", "--xy", "1"], []),
        (["m", "--x", "a=b"], ["a=b"]),
    ],
)
def test_an_options_values(words: list[str], values: list[str]) -> None:
    assert compose.option(words, "--x") == values
