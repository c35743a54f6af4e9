"""What the role writes as settings is what the processes read, and the release under test takes all of it."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.roles.rendering import AWKWARD, FACTS, ROOT, load, render, variables

_ENGINE = "etc/systemd/system/quern-engine.service"


def environment_of(file: Path) -> dict[str, str]:
    """What a shell makes of an environment file; systemd reads one by the same rules (systemd.exec(5))."""
    script = 'set -a; . "$1"; exec env -0'
    done = subprocess.run(["env", "-i", "/bin/sh", "-c", script, "sh", str(file)], capture_output=True, check=True)
    return dict(line.split("=", 1) for line in done.stdout.decode().split("\0") if line)


def _check(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / ".venv/bin/python"), "-m", "quern.cli.main", "config", "check"],
        env={name: value for name, value in environment.items() if name.startswith("QUERN_")},
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_release_takes_the_settings_that_the_role_writes(host: Path) -> None:
    done = _check(environment_of(host / "etc/quern/quern.env"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("QUERN_JOB__LEASE", "never"),
        ("QUERN_REQUESTS_PER_MINUTE", "-1"),
        ("QUERN_PUBLIC_URL", "forms.example.org"),
        ("QUERN_ENGINE_CONTEXT", "1"),
        # Nothing reads it: most likely a slip of the pen.
        ("QUERN_JOBS__LEASE", "10"),
        ("QUERN_JOB__LAESE", "10"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(name: str, value: str) -> None:
    done = _check({name: value})
    assert done.returncode == 1
    assert re.search(rf"^{name}: ", done.stdout, re.MULTILINE), done.stdout + done.stderr


def test_every_value_reaches_the_processes_letter_by_letter(tmp_path: Path) -> None:
    options = {"app_mail": {"host": "h", "from_address": "a@b.example", "from_name": AWKWARD}, "app_settings": {}}
    texts = {place: text for template, place, text in render(options) if place.endswith("quern.env")}
    (tmp_path / "quern.env").write_text(texts["etc/quern/quern.env"])
    assert environment_of(tmp_path / "quern.env")["QUERN_MAIL__FROM_NAME"] == AWKWARD


def test_the_engine_gets_its_own_settings_and_no_others(host: Path) -> None:
    lines = re.findall(r"^Environment=(.*)$", (host / _ENGINE).read_text(), re.MULTILINE)
    # systemd's quotes and backslashes are a shell's here; a percent sign is written twice.
    words = [word.replace("%%", "%") for line in lines for word in shlex.split(line)]
    given = dict(word.split("=", 1) for word in words)
    assert all(name.startswith("QUERN_ENGINE_") for name in given)
    if AWKWARD in environment_of(host / "etc/quern/quern.env").values():
        assert given["QUERN_ENGINE_CHAT_MODEL"] == AWKWARD
        assert given["QUERN_ENGINE_PINNED"] == "one,two"
    else:
        assert "QUERN_ENGINE_CHAT_MODEL" not in given


@pytest.mark.parametrize(("processors", "workers"), [(1, 1), (2, 1), (3, 2), (4, 2), (8, 4), (64, 4)])
def test_both_instances_of_the_api_together_have_a_process_for_each_processor(processors: int, workers: int) -> None:
    from ansible.parsing.dataloader import DataLoader
    from ansible.template import Templar

    known = {**variables({}), "ansible_facts": {**FACTS, "processor_vcpus": processors}}
    wanted = load(ROOT / "roles/app/defaults/main.yml")["app_api_workers"]
    assert int(Templar(loader=DataLoader(), variables=known).template(wanted)) == workers
