"""The relay's password reaches who sends mail and nobody else, and no process needs it to start."""

import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from tests.roles.rendering import ROLES, ROOT, templates, text_of, variables
from tests.roles.test_settings import environment_of

_SHORT = {"host": "mail.example.org", "from_address": "forms@example.org"}
_GIVEN = {"secrets_given": {"quern.quern_mail_password": "from Vault"}}
_WITH_USER: dict[str, Any] = {"app_mail": {**_SHORT, "username": "forms"}, **_GIVEN}
_PASSWORD = "quern_mail_password"
_SENDS = {"quern-worker@default", "quern doctor"}
_COMMANDS = ("migrate", "doctor", "status", "etl", "sql", "logs", "audit verify")
#: What a credential may hold, by its name.
_SECRETS = {
    "quern_mongodb_uri": "mongodb://localhost",
    "quern_etl_mongodb_uri": "mongodb://localhost",
    "quern_redis_queue_url": "redis://localhost",
    "quern_secret_keys": "MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=",
    "quern_audit_key": "k" * 43,
    _PASSWORD: "from Vault",
}
#: What each process does first; the second line says whether it could log in.
_START = """
from quern.config import load
mail = load().mail
print(mail.username)
try:
    print(mail.login is not None)
except Exception as error:
    print(type(error).__name__)
"""


@cache
def _files(user: bool) -> dict[str, str]:
    scope = {**variables(_WITH_USER if user else {"app_mail": _SHORT}), "ansible_search_path": [str(ROOT)]}
    asking = [
        path for path in templates() if path.is_relative_to(ROLES / "app/templates") or _PASSWORD in path.read_text()
    ]
    asking.append(ROLES / "secrets/templates/credentials.yml.j2")
    return {path.as_posix().partition("/templates/")[2].removesuffix(".j2"): text_of(path, scope) for path in asking}


def _loaded(text: str) -> dict[str, str]:
    """The file of each credential that a unit or a command loads, by the credential's name."""
    return dict(re.findall(r"LoadCredentialEncrypted=(\w+):(\S+)", text))


def _grants(user: bool) -> dict[str, str]:
    """What roles/app writes for single queues."""
    tasks = yaml.safe_load((ROLES / "app/tasks/configuration.yml").read_text())
    (task,) = [task for task in tasks if task["name"] == "Grant what single queues need"]
    templar = Templar(loader=DataLoader(), variables=variables(_WITH_USER if user else {"app_mail": _SHORT}))
    return {item["queue"]: str(templar.template(trust_as_template(item["content"]))) for item in task["loop"]}


def _command(text: str, words: str, folder: Path) -> str:
    """What the operator's command asks systemd-run for."""
    folder.mkdir()
    for name, script in {"id": "echo 0", "systemd-run": 'printf "%s\\n" "$@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
    (folder / "quern").write_text(text)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", str(folder / "quern"), *words.split()], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


def _processes(user: bool, folder: Path) -> dict[str, dict[str, str]]:
    """The credentials of every process of Quern's that reads /etc/quern/quern.env, by the unit or the command."""
    found = {}
    for place, text in _files(user).items():
        name = Path(place).name.removesuffix(".service")
        # The analytics service reads settings of its own.
        if place.endswith(".service") and "EnvironmentFile=/etc/quern/quern.env" in text and name != "quern-analytics":
            for queue, grant in _grants(user).items() if name == "quern-worker@" else [("", "")]:
                found[name + queue] = _loaded(text + grant)
    for words in _COMMANDS:
        asked = _command(_files(user)["usr/local/bin/quern"], words, folder / words.replace(" ", "-"))
        found[f"quern {words}"] = _loaded(asked)
    return found


def test_the_relays_password_reaches_who_sends_mail_and_nobody_else(tmp_path: Path) -> None:
    processes = _processes(True, tmp_path)
    assert {"quern-api@", "quern-relay", "quern-scheduler", "quern-worker@low", "quern migrate"} <= set(processes)
    assert {name for name, loaded in processes.items() if _PASSWORD in loaded} == _SENDS
    assert {processes[name][_PASSWORD] for name in _SENDS} == {f"quern.{_PASSWORD}"}
    made = yaml.safe_load(_files(True)["credentials.yml"])
    assert {"file": f"quern.{_PASSWORD}", "kind": "given"} in made


def test_without_a_user_name_nobody_asks_for_a_password(tmp_path: Path) -> None:
    assert [name for name, loaded in _processes(False, tmp_path).items() if _PASSWORD in loaded] == []
    assert [place for place, text in _files(False).items() if _PASSWORD in text] == []


def test_every_process_starts_with_what_it_is_given_and_only_those_that_send_mail_log_in(tmp_path: Path) -> None:
    (tmp_path / "quern.env").write_text(_files(True)["etc/quern/quern.env"])
    environment = environment_of(tmp_path / "quern.env")
    told = {name: value for name, value in environment.items() if name.startswith("QUERN_")}
    for number, (name, loaded) in enumerate(_processes(True, tmp_path).items()):
        folder = tmp_path / f"credentials-{number}"
        folder.mkdir()
        for credential in loaded:
            (folder / credential).write_text(_SECRETS[credential])
        done = subprocess.run(
            [str(ROOT / ".venv/bin/python"), "-c", _START],
            env={**told, "CREDENTIALS_DIRECTORY": str(folder), "PYTHONPATH": str(ROOT / "app")},
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
        assert done.stdout.split() == ["forms", "True" if name in _SENDS else "PasswordMissingError"], name
