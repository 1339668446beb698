"""The role's files as Compose itself resolves them: every text arrives unchanged."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.mlops.vllm_gpu.plugins.filter.passing_on import passing_on
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
    """Return what is wanted, and the service as Compose resolves it from the .env that the role would write."""
    text = passing_on(COMPOSE, [*changes.get("server_env", {}), *changes.get("secret_env", {})])
    target = wanted(compose=text, **changes)
    files = {paths.COMPOSE_FILE: text.encode(), paths.ENV_FILE: dotenv.merge(b"", settings.env_keys(target))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOCKER_CONFIG", str(ROOT / ".cache/docker"))
        service = compose.resolve(files, target["project_dir"], "vllm-gpu")
        config_hash = compose.config_hash(files, target["project_dir"], "vllm-gpu")
    assert re.fullmatch("[0-9a-f]{64}", config_hash)
    return target, service


def arguments(words: list[str]) -> dict[str, Any]:
    """Return the arguments, and their text in .env as the role's `quote` filter writes it."""
    return {"extra_args": words, "VLLM_EXTRA_ARGS": " ".join(map(shlex.quote, words))}


@examples(max_examples=15, deadline=None)
@given(st.lists(TEXTS, min_size=12, max_size=12))
@example(ODD[:12])
@example(ODD[12:24])
@example([*ODD[24:], *ODD[:9]])
def test_every_text_arrives_unchanged(texts: list[str]) -> None:
    """An API key, tokens, other variables, arguments and paths; no name or path can hold a colon."""
    path = "/" + texts[0].replace(":", "").strip("/. ")
    target, service = resolved(
        secrets={"VLLM_API_KEY": texts[1], "HF_TOKEN": texts[2]},
        secret_env={"A": texts[3], "B": texts[4]},
        server_env={"C": texts[5], "D": texts[6]},
        HF_CACHE=path,
        VLLM_MODEL="/models/" + re.sub(r'[\\"]', "", texts[7]),
        **arguments(["--x", *texts[8:]]),
    )
    assert list(compose.contradictions(service, target)) == []
    assert service["command"][-5:] == ["--x", *texts[8:]]
    names = {"VLLM_API_KEY": 1, "HF_TOKEN": 2, "A": 3, "B": 4, "C": 5, "D": 6}
    assert {key: service["environment"][key] or "" for key in names} == {
        key: texts[number] for key, number in names.items()
    }


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "0.0.0.0", "[::1]", "[::]", "[0:0:0:0:0:0:0:1]", "[FE80::1]"]
)
def test_addresses(address: str) -> None:
    target, service = resolved(VLLM_BIND_ADDRESS=address, VLLM_PORT="9000")
    assert list(compose.contradictions(service, target)) == []
    assert service["ports"][0]["host_ip"] == address.strip("[]")


@pytest.mark.parametrize(
    ("text", "arrives"),
    [
        *((text, True) for text in ("--a 'b c' --d \"e f\" g\\ h", "--a '$X' --b $Y", "--a '{\"x\": [1, 2]}'", "--a #b")),
        *((text, None) for text in ("--a > b", "--a;--b", "--a 1 | --b", "--a `b`", "--a & --b")),
        ("--seed 3; --max-model-len 512", False),
    ],
)  # fmt: skip
def test_a_text_of_which_compose_may_lose_a_part(text: str, arrives: bool | None) -> None:  # noqa: FBT001
    """Whatever this version of Compose loses (where `arrives` is None) must be reported."""
    target, service = resolved(extra_args=text, VLLM_EXTRA_ARGS=text)
    found = list(compose.contradictions(service, target))
    assert (service["command"][7:] == shlex.split(text)) == (not found)
    assert arrives in (None, not found)
    if found:
        assert found[0].startswith("vLLM would be started with the arguments ")
        assert "Give vllm_gpu_extra_args as a list" in found[0]


@pytest.mark.parametrize("model", ["a\\b", "a\\\\b", "\\'"])
def test_a_model_that_would_become_another(model: str) -> None:
    target, service = resolved(VLLM_MODEL=model)
    (found,) = compose.contradictions(service, target)
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
    ("change", "problem"),
    [
        ({"command": ["m"]}, "vLLM would be started with the arguments m, not with Qwen"),
        ({"image": "x"}, "The image would be x, not vllm/vllm-openai:"),
        ({"ports": []}, "The API would be published on None:None, not on 127.0.0.1:8000."),
        ({"ports": [{"host_ip": "127.0.0.1", "published": "8000", "target": 80}]},
         "The API would be published on 127.0.0.1:8000, not"),
        ({"ports": [{"host_ip": "0.0.0.0", "published": "8000", "target": 8000}]},
         "The API would be published on 0.0.0.0:8000, not on 127.0.0.1:8000."),
        ({"volumes": []},
         "Nothing would be mounted at /root/.cache/huggingface, not huggingface-cache. Correct vllm_gpu_hf_cache."),
        ({"environment": {}}, "VLLM_API_KEY would not reach the server unchanged."),
    ],
)  # fmt: skip
def test_each_difference_is_reported(change: dict[str, Any], problem: str) -> None:
    target, service = resolved(secrets={"VLLM_API_KEY": "sk-0123456789"})
    assert list(compose.contradictions(service, target)) == []
    found = list(compose.contradictions({**service, **change}, target))
    assert found[0].startswith(problem)
    assert "sk-0123456789" not in "".join(found)


def test_nothing_but_env_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPU_DEVICE_ID", "VLLM_PORT", "VLLM_API_KEY", "C"):
        monkeypatch.setenv(name, "7")
    target, service = resolved(server_env={"C": "x"}, secrets={"VLLM_API_KEY": "sk-0123456789"})
    assert list(compose.contradictions(service, target)) == []


FILES = {paths.COMPOSE_FILE: b"services: {}\n", paths.ENV_FILE: b""}


def test_the_calls_of_compose(docker: Callable[..., Callable[[], list[str]]]) -> None:
    calls = docker(json.dumps({"services": {"vllm": {"image": "a$$b"}}}))
    assert compose.resolve(FILES, "/opt/x", "p") == {"image": "a$b"}
    assert [call.endswith("config --format json") for call in calls()] == [True]
    compose.config_hash(FILES, "/opt/x", "p")
    assert calls()[-1].endswith("--hash vllm")


def test_a_message_of_compose_names_the_files_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(argv: list[str], **_: object) -> shell.Output:
        return shell.Output(1, "", f"{argv[argv.index('--env-file') + 1]}: line 3: bad")

    monkeypatch.setattr(shell, "run", run)
    with pytest.raises(shell.Problem, match=r"for /opt/x: \.env: line 3: bad"):
        compose.resolve(FILES, "/opt/x", "p")


QUOTED = "Compose can't use the configuration for /opt/x: {}"
DOLLAR = QUOTED + " Put a value with a $ in single quotes."
NO_PLUGIN = "Docker has no Compose plugin here"


@pytest.mark.parametrize(
    ("message", "explained"),
    [
        # Without a known cause, none is guessed.
        ("open /root/.docker/config.json: permission denied", QUOTED),
        ("a $ is no reason", QUOTED),
        ("panic: x", QUOTED),
        ("", QUOTED.format("no message")),
        ('Invalid template: "${x"', DOLLAR),
        ("invalid interpolation format for services.vllm.image", DOLLAR),
        ("docker: 'compose' is not a docker command.", NO_PLUGIN),
        ("unknown shorthand flag: 'f' in -f", NO_PLUGIN),
        ("unknown flag: --file", NO_PLUGIN),
    ],
)
def test_messages_of_compose_are_explained(message: str, explained: str) -> None:
    found = compose.explain(message, "/opt/x")
    assert found.startswith(explained) if explained == NO_PLUGIN else found == explained.format(message)


def test_a_path_that_is_neither_a_path_nor_a_volume() -> None:
    with pytest.raises(shell.Problem, match="my-cache is neither a path nor one of the service's volumes"):
        resolved(HF_CACHE="my-cache")


@pytest.mark.parametrize(
    ("block", "names"),
    [
        ("      A:\n      # B:\n      C: \n      D: x\n      E: ${E:-}\n", {"A", "C"}),
        ("      environment:\n      test:\n", {"environment", "test"}),
        ("", set()),
    ],
)
def test_the_names_that_a_file_passes_on(block: str, names: set[str]) -> None:
    """Equal names in other parts of the file don't count."""
    text = COMPOSE.replace("    environment:\n", f"    environment:\n{block}")
    assert compose.passed_on(text.encode()) == names
    assert compose.passed_on(b"services: {}\n") == set()


@pytest.mark.parametrize(
    "service",
    [{"command": ["m"]}, {"command": ["m"], "ports": [{"target": 8000}]}, {"ports": [{"published": "8000"}]}],
)
def test_an_edited_compose_file_is_refused(service: dict[str, Any]) -> None:
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
def test_the_values_of_an_option(words: list[str], values: list[str]) -> None:
    assert compose.option(words, "--x") == values
