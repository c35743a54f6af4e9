"""What only a kernel of one's own can show: parameters in force, modules that stay out, acts that are recorded."""

import re
from functools import partial

import pytest

from tests.vm.guest import Guest, wait_until


def test_every_kernel_parameter_is_in_force(guest: Guest) -> None:
    wanted = re.findall(r"(?m)^([a-z][\w.]+) = (.*)$", guest.say("cat /etc/sysctl.d/99-quern.conf"))
    assert len(wanted) > 35
    found = guest.say(f"sysctl --values {' '.join(name for name, _ in wanted)}").splitlines()
    named = zip(wanted, found, strict=True)
    assert [(name, value, is_now) for (name, value), is_now in named if value.split() != is_now.split()] == []


def test_modules_that_no_server_needs_cannot_be_loaded(guest: Guest) -> None:
    denied = re.findall(r"(?m)^install (\S+) /bin/false$", guest.say("cat /etc/modprobe.d/quern.conf"))
    assert {"cramfs", "usb-storage", "sctp"} <= set(denied)
    each = "modinfo $name >/dev/null 2>&1 && echo there $name; modprobe $name 2>/dev/null && echo in $name"
    said = guest.say(f"for name in {' '.join(denied)}; do {each}; done; true").splitlines()
    # Of modules that this kernel does not have, it would prove nothing.
    assert [line for line in said if line.startswith("there ")]
    assert [line for line in said if line.startswith("in ")] == []
    loaded = {line.split()[0] for line in guest.say("lsmod").splitlines()}
    assert loaded & {name.replace("-", "_") for name in denied} == set()


def test_the_kernel_records_who_touches_accounts_and_secrets(guest: Guest) -> None:
    rules = guest.say("auditctl -l")
    written = guest.say("cat /etc/audit/rules.d/quern.rules")
    watched = re.findall(r"(?m)^-w (\S+)", written)
    assert len(watched) > 8
    assert [path for path in watched if not re.search(rf"(?m)^-w {re.escape(path)}/? -p", rules)] == []
    assert "-S init_module" in rules or "init_module" in rules
    guest.say("chmod 0644 /etc/passwd; ls /etc/credstore.encrypted >/dev/null")
    for key, path in (("identity", "/etc/passwd"), ("secrets", "/etc/credstore.encrypted")):
        search = f"ausearch --input-logs --key {key} --start recent --raw | grep -F '{path}'"
        wait_until(partial(_finds, guest, search), f"a record of {path}")


def _finds(guest: Guest, search: str) -> bool:
    return guest.ask(search).status == 0


@pytest.mark.parametrize("place", ["/tmp", "/dev/shm"])  # noqa: S108 - what is looked at
def test_no_program_runs_from_a_folder_that_everybody_may_write_to(guest: Guest, place: str) -> None:
    assert {"nosuid", "nodev", "noexec"} <= set(guest.say(f"findmnt --noheadings --output OPTIONS {place}").split(","))
    copied = guest.ask(f"cp /bin/true {place}/vm-true && {place}/vm-true; found=$?; rm -f {place}/vm-true; exit $found")
    assert copied.status == 126


def test_a_crash_leaves_no_memory_behind(guest: Guest) -> None:
    crash = "cd $(mktemp -d -p /root) && ulimit -c unlimited; sh -c 'kill -SEGV $$' 2>/dev/null; echo crashed; ls -A"
    assert guest.say(crash).split() == ["crashed"]
    assert guest.ask("ls -A /var/lib/systemd/coredump").out == ""


def test_the_clock_is_kept(guest: Guest) -> None:
    assert guest.say("systemctl is-active chrony") == "active"
    # Without a network no server answers; the daemon does, and steers the kernel's clock alone.
    assert "Reference ID" in guest.say("chronyc -n tracking")
    assert guest.ask("systemctl is-active systemd-timesyncd").status != 0
