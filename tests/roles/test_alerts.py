"""Alerts go by the relay that preflight takes, however short the inventory is about it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.conftest import Judge
from tests.roles.rendering import ROLES, ROOT, text_of, variables

_SHORT = {"host": "mail.example.org", "from_address": "forms@example.org"}


def _alertmanager(mail: dict[str, Any]) -> str:
    options = {"app_mail": mail, "monitoring_mail_to": "ops@example.org"}
    template = ROLES / "monitoring/templates/etc/prometheus/alertmanager.yml.j2"
    return text_of(template, {**variables(options), "ansible_search_path": [str(ROOT)]})


@pytest.mark.parametrize(
    ("mail", "smarthost", "by_starttls"),
    [
        (_SHORT, "mail.example.org:587", True),
        ({**_SHORT, "port": 25}, "mail.example.org:25", True),
        ({**_SHORT, "port": 465, "tls": "implicit", "username": "forms"}, "mail.example.org:465", False),
        ({**_SHORT, "host": "127.0.0.1", "port": 25, "tls": "none"}, "127.0.0.1:25", False),
        ({**_SHORT, "host": "2001:db8::25"}, "[2001:db8::25]:587", True),
    ],
)
def test_alerts_go_by_the_relay_as_preflight_takes_it(
    mail: dict[str, Any], smarthost: str, by_starttls: bool, judge: Judge, tmp_path: Path
) -> None:
    text = _alertmanager(mail)
    told = yaml.safe_load(text)["receivers"][1]["email_configs"][0]
    assert (told["smarthost"], told["require_tls"]) == (smarthost, by_starttls)
    assert told["from"] == "forms@example.org"
    assert told.get("auth_username") == mail.get("username")
    (tmp_path / "alertmanager.yml").write_text(text)
    judge("usr/bin/amtool", "check-config", tmp_path / "alertmanager.yml")
