"""Nobody locks himself out: not by SSH's configuration, and not by the firewall's rules."""

import socket
import time
from collections.abc import Callable

from testinfra.host import Host

from tests.host.conftest import Place, Played

_LOCKED = "table inet locked { chain input { type filter hook input priority 0; policy drop; iif lo accept; } }"


def answers(place: Place) -> bool:
    try:
        with socket.create_connection((place.address, 22), timeout=2) as connection:
            return connection.recv(3) == b"SSH"
    except OSError:
        return False


def test_rules_that_nobody_confirms_are_taken_back(host: Host, place: Place) -> None:
    rules = host.check_output("nft -s -t list ruleset | sha256sum")
    host.check_output("cp -p /etc/nftables.conf /root/nftables.kept")
    host.check_output("printf 'flush ruleset\\n%%s\\n' %s >/etc/nftables.conf", _LOCKED)
    host.check_output("systemd-run --quiet --collect /usr/local/sbin/quern-firewall try 20")
    try:
        deadline = time.monotonic() + 180
        while answers(place):
            assert time.monotonic() < deadline, "expected the rules to lock SSH out"
        while not answers(place):
            assert time.monotonic() < deadline + 60, "expected the former rules to come back"
    finally:
        host.check_output("mv /root/nftables.kept /etc/nftables.conf")
    assert host.check_output("nft -s -t list ruleset | sha256sum") == rules


def test_a_configuration_that_locks_the_operator_out_is_taken_back(
    host: Host, place: Place, play: Callable[..., Played]
) -> None:
    before = host.file("/etc/ssh/sshd_config.d/10-quern.conf").content
    # The account that these tests come in by.
    done = play("tests/host/plays/ssh.yml", base_ssh_root_by_key=False)
    assert done.code != 0
    assert "the old one is back" in done.output
    assert answers(place)
    assert host.file("/etc/ssh/sshd_config.d/10-quern.conf").content == before
