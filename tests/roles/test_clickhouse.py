"""A ClickHouse server is one way out more, for one service to one address; without it there is none."""

import os
import re
import subprocess
from functools import cache

import pytest

from tests.roles.rendering import ROLES, ROOT, templates, text_of, variables

_PASSWORD = "quern-analytics.quern_clickhouse_password"
_UNIT = "etc/systemd/system/quern-analytics.service"
_FIREWALL, _PROFILES = "etc/quern/nftables.conf", "etc/apparmor.d/quern"
#: Each with its role; all others are the same in either case.
_TEMPLATES = {_UNIT: "app", _FIREWALL: "firewall", _PROFILES: "apparmor", "credentials.yml": "secrets"}
#: What the analytics service itself makes of its environment.
_CHOSEN = """
from quern.analytics.service import ProcessSettings
of = ProcessSettings().analytics.service
print(of.engine, of.clickhouse_url, of.clickhouse_user, of.clickhouse_root)
"""


@cache
def _rendered(url: str) -> dict[str, str]:
    given = {"app_clickhouse_url": url, "secrets_given": {_PASSWORD: "from Vault"}} if url else {}
    scope = {**variables(given), "ansible_search_path": [str(ROOT)]}
    return {place: text_of(ROLES / role / f"templates/{place}.j2", scope) for place, role in _TEMPLATES.items()}


def _profile(files: dict[str, str]) -> str:
    _, _, after = files[_PROFILES].partition("profile quern-analytics ")
    return after.partition("\n}\n")[0]


def test_without_it_the_analytics_service_has_no_network() -> None:
    files = _rendered("")
    assert [place for place, text in files.items() if "clickhouse" in text.lower()] == []
    unit = files[_UNIT].splitlines()
    assert {"PrivateNetwork=yes", "IPAddressDeny=any", "RestrictAddressFamilies=AF_UNIX"} <= set(unit)
    assert not any(line.startswith("IPAddressAllow=") for line in unit)
    assert "network inet" not in _profile(files)
    assert "skuid quern-analytics" not in files[_FIREWALL]


@pytest.mark.parametrize(
    ("url", "family", "address", "port"),
    [("http://10.0.0.7:8123", "ip", "10.0.0.7", "8123"), ("https://[2001:db8::7]:8443", "ip6", "2001:db8::7", "8443")],
)
def test_with_it_that_service_alone_reaches_that_address_and_port(
    url: str, family: str, address: str, port: str
) -> None:
    before, files = _rendered(""), _rendered(url)
    asking = {path.relative_to(ROLES).as_posix() for path in templates() if "clickhouse" in path.read_text()}
    assert asking == {f"app/templates/{_UNIT}.j2", f"firewall/templates/{_FIREWALL}.j2"}

    unit = files[_UNIT].splitlines()
    assert "PrivateNetwork=yes" not in unit
    assert "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6" in unit
    assert [line for line in unit if line.startswith("IPAddress")] == ["IPAddressDeny=any", f"IPAddressAllow={address}"]

    rules = files[_FIREWALL]
    (way,) = [line.strip() for line in rules.splitlines() if "quern-analytics" in line]
    assert way == f"meta skuid quern-analytics {family} daddr {address} tcp dport {port} accept"
    # Before it, the addresses of a machine's own credentials are refused; after it, everything else.
    assert rules.index("@metadata6 counter reject") < rules.index(way) < rules.index("quern refused out")

    assert "network inet stream" in _profile(files)
    assert files[_PROFILES].replace(_profile(files), "") == before[_PROFILES].replace(_profile(before), "")


def test_its_password_is_a_credential_and_the_service_takes_the_rest_as_settings() -> None:
    files = _rendered("http://10.0.0.7:8123")
    assert f"LoadCredentialEncrypted=quern_clickhouse_password:{_PASSWORD}\n" in files[_UNIT]
    assert f'file: "{_PASSWORD}", kind: given' in files["credentials.yml"]
    assert [place for place, text in files.items() if "from Vault" in text] == []
    environment = dict(re.findall(r"^Environment=(\w+)=(.*)$", files[_UNIT], re.MULTILINE))
    done = subprocess.run(
        [str(ROOT / ".venv/bin/python"), "-c", _CHOSEN],
        env={"PATH": os.environ["PATH"], **environment},
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert done.stdout.split() == ["clickhouse", "http://10.0.0.7:8123", "quern", "quern-warehouse"]
