"""What there is nothing to install from is refused on the machine that runs Ansible, before the host is reached."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.roles.rendering import ROOT

CONTENT = "weights"
SUM = "9a129038d9a00aed0cf6a7ea059ca50a813449061ab87848cf1a13eafdf33b2c"


def play(**variables: Any) -> tuple[int, str]:
    """How playbooks/sources.yml ended for a host that nobody reaches, and what it said."""
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "NO_COLOR": "1", "COLUMNS": "400"}
    program = Path(sys.executable).parent / "ansible-playbook"
    command = [program, "-i", "192.0.2.1,", "playbooks/sources.yml", "-e", json.dumps(variables)]
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """What an operator has who gives everything."""
    files = {"models/own/model.gguf": CONTENT, "llama/llama_cpp_python-1-py3-none-any.whl": "", "wheels.tar": ""}
    for name, text in {**files, "mongod": CONTENT}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return {
        "models_folder": str(tmp_path / "models"),
        "models_files": [{"model": "own", "file": "model.gguf", "sha256": SUM}],
        "models_fetch": False,
        "llama_wheels": str(tmp_path / "llama"),
        "app_wheels_archive": str(tmp_path / "wheels.tar"),
        "mongodb_binary": str(tmp_path / "mongod"),
        "mongodb_binary_sha256": SUM,
    }


def test_what_is_there_and_right_is_taken(given: dict[str, Any]) -> None:
    code, said = play(**given)
    assert code == 0, said


def test_the_defaults_ask_nothing_of_this_machine_but_models(given: dict[str, Any]) -> None:
    code, said = play(**{name: value for name, value in given.items() if name.startswith("models_")})
    assert code == 0, said


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"models_folder": "/nonexistent"}, "own/model.gguf: expected SHA-256"),
        ({"models_files": [{"model": "own", "file": "model.gguf", "sha256": "0" * 64}]}, f"found {SUM}"),
        ({"llama_wheels": "/nonexistent"}, "expected one llama_cpp_python-*.whl"),
        ({"app_wheels_archive": "/nonexistent"}, "run scripts/collect-wheels"),
        ({"mongodb_binary_sha256": "0" * 64}, f"found {SUM}; set mongodb_binary"),
        ({"mongodb_binary": "", "mongodb_version": "6.0"}, 'expected mongodb_version to be "7.0" or "8.0"'),
        ({"mongodb_binary": "", "mongodb_apt_key": "/nonexistent"}, "expected mongodb_apt_key to be"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_is_not_is_refused(given: dict[str, Any], changed: dict[str, Any], expected: str) -> None:
    code, said = play(**{**given, **changed})
    assert code != 0
    assert expected in said
