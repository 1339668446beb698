"""What the role wants of a host by default."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[1]
ROLE = ROOT / "roles/vllm_gpu"
COMPOSE = (ROOT / "docker/docker-compose.serving.yml").read_text(encoding="utf-8")


def trusted(value: Any) -> Any:  # noqa: ANN401 - whatever the YAML holds
    """Return a value whose texts Ansible accepts as templates, like those of a role's files."""
    if isinstance(value, dict):
        return {key: trusted(part) for key, part in value.items()}
    if isinstance(value, list):
        return [trusted(part) for part in value]
    return trust_as_template(value) if isinstance(value, str) else value


@functools.cache
def variables(part: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted((ROLE / part).glob("**/*.yml")):
        found.update(yaml.safe_load(path.read_text(encoding="utf-8")))
    return found


def rendered(template: str, **changes: object) -> Any:  # noqa: ANN401
    """Render a template with the role's variables."""
    loader = DataLoader()
    loader.set_basedir(str(ROLE))
    names = {**trusted({**variables("defaults"), **variables("vars")}), "role_path": str(ROLE), **changes}
    names["ansible_search_path"] = [str(ROLE)]
    return Templar(loader=loader, variables=names).template(trust_as_template(template))


@functools.cache
def _defaults() -> dict[str, str]:
    return dict(rendered("{{ __vllm_gpu_env }}"))


def wanted(**changes: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return WANTED_OPTIONS with the role's defaults; upper-case names change keys of .env."""
    env = {key: changes.pop(key) for key in list(changes) if key.isupper()}
    return {
        "project_dir": "/opt/vllm-gpu",
        "compose": COMPOSE,
        "referee": "#!/bin/bash\n",
        "env_example": "# example\nGPU_DEVICE_ID=0\n",
        "env": {**_defaults(), **env},
        "extra_args": [],
        "server_env": {},
        "secrets": {},
        "secret_env": {},
        **changes,
    }
