"""The CIS controls that apply, by number (cis.yml); docs/security.md lists them, and why others do not apply."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

CONTROLS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "cis.yml").read_text())["controls"]
ASSERTED = [number for number, control in CONTROLS.items() if "run" in control]

#: All in one connection: the host takes only so many new ones a minute, and each command is short.
_RUNNER = """
import json, subprocess, sys
answers = {}
for number, command in json.load(sys.stdin).items():
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=300)
    answers[number] = (done.stdout + done.stderr).strip()
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(host: Host) -> dict[str, str]:
    commands = json.dumps({number: CONTROLS[number]["run"] for number in ASSERTED})
    said: dict[str, str] = json.loads(host.check_output("printf %%s %s | python3 -c %s", commands, _RUNNER))
    return said


@pytest.mark.parametrize("number", ASSERTED)
def test_control(number: str, answers: dict[str, str]) -> None:
    assert answers[number] == CONTROLS[number].get("says", ""), CONTROLS[number]["what"]
