"""What the guest's kernel says of its profiles."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.vm.guest import Guest

ACTS = Path(__file__).parent / "acts.py"


def modes(guest: Guest, profiles: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, str]]:
    """`unit/pid` of every process of every confined unit → (its label, the label that is expected)."""
    found = {}
    for profile, units in profiles.items():
        for unit in units:
            script = (
                f"for pid in $(cat /sys/fs/cgroup$(systemctl show -p ControlGroup --value {unit})/cgroup.procs); do "
                "echo $pid $(cat /proc/$pid/attr/apparmor/current); done"
            )
            lines = guest.say(script).splitlines()
            assert lines, f"expected processes in {unit}, found none"
            for line in lines:
                pid, _, label = line.partition(" ")
                found[f"{unit}/{pid}"] = (label, f"{profile} (enforce)")
    return found


def denials(guest: Guest, since: str = "") -> list[str]:
    """What AppArmor denied to the appliance's profiles since that second of the guest's clock (or since it booted)."""
    since = since or guest.say("echo $(($(date +%s) - $(cut -d. -f1 /proc/uptime)))")
    journal = guest.ask(f"journalctl --no-pager -o cat -b --since @{since} _TRANSPORT=audit + _TRANSPORT=kernel").out
    audit = guest.ask("cat /var/log/audit/audit.log").out
    lines = [line for line in journal.splitlines() if _DENIED in line]
    for line in audit.splitlines():
        if _DENIED in line and (at := re.search(r"audit\((\d+\.\d+):", line)) and float(at[1]) >= float(since):
            lines.append(line)
    return [line for line in lines if "quern-" in line]


def outcomes(guest: Guest, profile: str, unit: str) -> dict[str, dict[str, str]]:
    """Each act of acts.py, as the unit's account, without and under the profile."""
    # A unit that names no account, or is off by default, is tried as root.
    account = guest.say(f"systemctl show -p User --value {unit}") or "root"
    said = guest.say(f"{guest.become(account)} python3 -I - {profile}", stdin=ACTS.read_text())
    loaded: dict[str, dict[str, str]] = json.loads(said)
    return loaded


_DENIED = 'apparmor="DENIED"'
