"""Every service runs, confined as promised."""

import re
from typing import Any

from testinfra.host import Host


def test_every_service_runs_and_starts_at_boot(host: Host, expected: dict[str, Any]) -> None:
    for name in expected["services"]:
        assert host.service(name).is_running, name
        assert host.service(name).is_enabled, name
    assert host.check_output("systemctl list-units --failed --no-legend --plain") == ""


def test_no_service_is_more_exposed_than_promised(host: Host, expected: dict[str, Any]) -> None:
    found = {}
    for line in host.check_output("systemd-analyze security --no-pager").splitlines()[1:]:
        unit, exposure = line.split()[:2]
        for prefix in expected["exposure"]:
            if unit.startswith(prefix):
                found[unit] = (float(exposure), expected["exposure"][prefix])
    assert len(found) >= len(expected["services"])
    assert {unit: pair for unit, pair in found.items() if pair[0] > pair[1]} == {}


def test_only_the_senders_and_the_front_door_have_a_network(host: Host, expected: dict[str, Any]) -> None:
    own = host.check_output("readlink /proc/1/ns/net")
    networked = []
    for name in expected["services"]:
        pid = host.check_output("systemctl show -p MainPID --value %s", name)
        if host.check_output("readlink /proc/%s/ns/net", pid) == own:
            networked.append(name)
    assert sorted(networked) == sorted(expected["networked"])


def test_every_service_has_an_account_of_its_own(host: Host, expected: dict[str, Any]) -> None:
    owners: dict[str, list[str]] = {}
    for name in expected["services"]:
        pid = host.check_output("systemctl show -p MainPID --value %s", name)
        owners.setdefault(host.check_output("stat -c %%U /proc/%s", pid), []).append(re.sub(r"@\d+$", "", name))
    assert "root" not in owners
    assert {owner: sorted(set(names)) for owner, names in owners.items() if len(set(names)) > 1} == {}


def test_memory_limits_reach_the_kernel(host: Host, expected: dict[str, Any]) -> None:
    unlimited = []
    for name in expected["services"]:
        if host.check_output("systemctl show -p MemoryMax --value %s", name) == "infinity":
            unlimited.append(name)
    assert unlimited == []


def test_redis_refuses_no_service_what_it_asks(host: Host) -> None:
    # Nobody waits for a wake-up that was refused: its jobs only start late.
    said = host.run("journalctl --no-pager -o cat --unit 'quern-*' | grep -E 'NoPermissionError|NOPERM' | head -n 5")
    assert said.stdout == ""


def test_mongod_refuses_no_service_what_it_asks(host: Host) -> None:
    said = host.run(
        "journalctl --no-pager -o cat --unit mongod | grep 'Checking authorization failed' | grep 'on quern to execute'"
    )
    assert said.stdout == ""
