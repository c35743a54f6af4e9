"""Nobody locks himself out: not by SSH's configuration, and not by the firewall's rules."""

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from testinfra.host import Host

from tests.host.conftest import Place, Played

#: What the role does when the rules are not in force, by its tasks' names.
_LOADED = "firewall : Load the rules"
_LISTING = "nft --stateless --terse list ruleset"


def answers(place: Place, source: str | None = None) -> bool:
    """Whether SSH answers to this machine, or to that one of its addresses."""
    try:
        with socket.create_connection((place.address, 22), timeout=3, source_address=(source or "", 0)) as connection:
            return source is not None or connection.recv(3) == b"SSH"
    except OSError:
        return False


@pytest.fixture
def stranger(place: Place) -> Iterator[str]:
    """A second address of this machine on the host's network."""
    address = place.gateway.rsplit(".", 1)[0] + ".3"
    with added(f"{address}/24", f"ve-{place.folder.name}"[:15]):
        yield address


@contextmanager
def added(address: str, interface: str) -> Iterator[None]:
    subprocess.run(["ip", "address", "add", address, "dev", interface], check=True)
    try:
        yield
    finally:
        subprocess.run(["ip", "address", "delete", address, "dev", interface], check=True)


@pytest.fixture
def apply_rules(host: Host, play: Callable[..., Played]) -> Callable[..., Played]:
    """Runs the role with these values."""
    # One role's scenario has no monitoring, so no account for its mail.
    common = {} if host.user("quern-alert").exists else {"monitoring_mail_to": ""}
    return lambda **values: play("tests/host/plays/firewall.yml", **common, **values)


def test_rules_that_shut_the_operator_out_are_taken_back_and_good_ones_load_after_them(
    host: Host, place: Place, stranger: str, apply_rules: Callable[..., Played]
) -> None:
    rules, boot = host.check_output(_LISTING), host.file("/etc/nftables.conf").content

    shut = apply_rules(firewall_ssh_networks=["192.0.2.0/24"], firewall_confirm_seconds=20)
    assert shut.code != 0
    assert "the old rules are back" in shut.output
    assert host.check_output(_LISTING) == rules
    # A boot would not lock him out either.
    assert host.file("/etc/nftables.conf").content == boot

    assert answers(place, stranger)
    narrowed = apply_rules(firewall_ssh_networks=[f"{place.gateway}/32"])
    assert narrowed.code == 0, narrowed.output
    assert answers(place)
    assert not answers(place, stranger)
    assert place.gateway in host.file("/etc/nftables.conf").content_string


def test_a_host_without_its_rules_gets_them_back_and_one_with_them_is_left_alone(
    host: Host, apply_rules: Callable[..., Played]
) -> None:
    assert apply_rules().code == 0
    rules = host.check_output(_LISTING)
    # As where a run died between writing and loading: the file says what it should, the kernel holds nothing.
    host.check_output("nft flush ruleset")

    again = apply_rules()
    assert [task for task, _ in again.changed] == [_LOADED]
    assert host.check_output(_LISTING) == rules

    assert apply_rules().changed == []


def test_an_address_that_knocks_at_ssh_too_often_is_not_let_in(place: Place, stranger: str) -> None:
    # By default thirty at once, and thirty each minute: what is refused tries again by itself, and some get in later.
    knocks = 120
    with ExitStack() as stack:
        opened = [stack.enter_context(socket.socket()) for _ in range(knocks)]
        for way in opened:
            way.setblocking(False)
            way.bind((stranger, 0))
            way.connect_ex((place.address, 22))
        time.sleep(3)
        served = sum(1 for way in opened if _connected(way))
    assert 25 <= served < knocks
    # sshd has its own limit of those that have not logged in yet; what was just closed is soon forgotten.
    deadline = time.monotonic() + 120
    while not answers(place):
        assert time.monotonic() < deadline, "expected SSH to answer another address"
        time.sleep(1)


def _connected(way: socket.socket) -> bool:
    try:
        way.getpeername()
    except OSError:
        return False
    return True


def test_a_configuration_that_locks_the_operator_out_is_taken_back(
    host: Host, place: Place, play: Callable[..., Played]
) -> None:
    before = host.file("/etc/ssh/sshd_config.d/10-quern.conf").content
    # The key of these tests is of another kind.
    done = play("tests/host/plays/ssh.yml", base_ssh_algorithms=["rsa-sha2-512"])
    assert done.code != 0
    assert "the old one is back" in done.output
    assert answers(place)
    assert host.file("/etc/ssh/sshd_config.d/10-quern.conf").content == before


def test_a_key_that_is_no_longer_named_opens_nothing_and_the_operators_own_is_never_lost(
    host: Host, place: Place, play: Callable[..., Played], tmp_path: Path
) -> None:
    file = "/home/admin/.ssh/authorized_keys"
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "other", "-f", str(other)], check=True)
    own, withdrawn = _public(place).strip(), other.with_suffix(".pub").read_text().strip()
    try:
        assert play("tests/host/plays/ssh.yml", base_ssh_authorized_keys=[own, withdrawn]).code == 0
        assert _comes_in(place, "admin", other).returncode == 0
        assert play("tests/host/plays/ssh.yml", base_ssh_authorized_keys=[own]).code == 0
        assert "Permission denied" in _comes_in(place, "admin", other).stderr

        # One by which the operator would not come in.
        shut = play("tests/host/plays/ssh.yml", base_ssh_authorized_keys=[withdrawn])
        assert shut.code != 0
        assert "the old one is back" in shut.output
        assert host.file(file).content_string.strip() == own
        assert host.check_output("ls /home/admin/.ssh").split() == ["authorized_keys"]
    finally:
        assert play("tests/host/plays/ssh.yml").code == 0
    assert play("tests/host/plays/ssh.yml").changed == []


def test_root_comes_in_by_no_key(host: Host, place: Place) -> None:
    # The one by which the first run came in.
    assert host.file("/root/.ssh/authorized_keys").content_string.strip() in _public(place)
    asked = {account: _comes_in(place, account, place.key) for account in ("admin", "root")}
    assert asked["admin"].returncode == 0, asked["admin"].stderr
    assert asked["root"].returncode == 255
    assert "Permission denied" in asked["root"].stderr


def _comes_in(place: Place, account: str, key: Path) -> subprocess.CompletedProcess[str]:
    options = ["BatchMode=yes", "ControlPath=none", "IdentitiesOnly=yes", f"UserKnownHostsFile={place.known_hosts}"]
    return subprocess.run(
        ["ssh", *(f"-o{option}" for option in options), "-i", str(key), f"{account}@{place.address}", "true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def _public(place: Place) -> str:
    return place.key.with_suffix(".pub").read_text()


def test_who_comes_by_ssh_sees_the_host_by_glances_as_the_role_configures_it(host: Host) -> None:
    shown = "--stdout mem.percent,cpu.total,network,docker --stop-after 1 --time 1"
    said = host.check_output("TERM=dumb timeout 60 glances -C /etc/glances/glances.conf " + shown)
    assert "mem.percent: " in said and "cpu.total: " in said
    # What the configuration hides, and turns off: only then was it read.
    assert "interface_name" in said and "'lo'" not in said
    assert "docker" not in said
