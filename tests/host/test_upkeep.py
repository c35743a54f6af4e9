"""What is to be done by itself is, at its time. Logs stay within their bounds, and whoever writes them goes on."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from testinfra.host import Host

ACCESS = "/var/log/nginx/access.log"
ACCOUNTING = "/var/log/account/pacct"

TIMERS = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())["timers"]


@pytest.mark.parametrize("name", TIMERS)
def test_what_is_to_be_done_by_night_waits_for_it(host: Host, name: str) -> None:
    """Now, after a reboot, and where the host was down at that time."""
    asked = ("UnitFileState", "ActiveState", "Persistent", "Unit", "NextElapseUSecRealtime", "TimersCalendar")
    lines = host.check_output("systemctl show %s.timer --property %s", name, ",".join(asked)).splitlines()
    found: dict[str, Any] = dict(line.split("=", 1) for line in lines)
    assert found.pop("NextElapseUSecRealtime")
    assert f"OnCalendar={TIMERS[name]} ;" in found.pop("TimersCalendar")
    wanted = {"UnitFileState": "enabled", "ActiveState": "active", "Persistent": "yes", "Unit": f"{name}.service"}
    assert found == wanted


@pytest.fixture
def rotate(host: Host) -> None:
    """Fills two logs beyond their sizes (roles/nginx, roles/base), then does what the timer does each hour."""
    host.check_output("truncate -s +101M %s && truncate -s +51M %s", ACCESS, ACCOUNTING)
    host.check_output("systemctl start logrotate.service")


def test_the_sizes_of_logs_are_looked_at_each_hour(host: Host) -> None:
    assert host.service("logrotate.timer").is_running
    calendar = host.check_output("systemctl show logrotate.timer --property TimersCalendar")
    assert calendar.count("OnCalendar=") == 1
    assert "OnCalendar=*-*-* *:00:00" in calendar


def test_a_log_beyond_its_size_is_rotated_and_its_service_goes_on(host: Host, rotate: None) -> None:
    try:
        for path in (ACCESS, ACCOUNTING):
            assert host.file(path).size < 2**20, path
            assert host.check_output("find %s-* -mmin -60", path), path
        # Into the new file, and not into the one that was moved away; what is logged is written within seconds.
        deadline = time.monotonic() + 120
        while "after-the-rotation" not in host.file(ACCESS).content_string:
            host.run("python3 -c 'import urllib.request as u; u.urlopen(\"http://127.0.0.1/after-the-rotation\")'")
            assert time.monotonic() < deadline, "expected nginx to write to its new log"
            time.sleep(1)
        # What was moved away may be compressed already.
        moved = host.check_output(
            "for log in %s-*; do zcat -f $log | tail -c 4096 | grep -ac after-the-rotation; done; true", ACCESS
        )
        assert set(moved.split()) == {"0"}
    finally:
        # Sparse, and yet nothing that a copy of the host should carry.
        host.run("find /var/log/nginx /var/log/account -name '*-*' -size +50M -delete")
