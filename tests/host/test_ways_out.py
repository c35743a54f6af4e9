"""Out of the host go only those who must, and only where they must."""

import itertools
import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from testinfra.host import Host

from tests.host.conftest import RECEIVER_PORT, Place

#: Who reaches which port of a machine beside the host. Whoever is not named for a port does not.
_NAMES = {"root", "_apt", "_chrony", "quern-fetch", "quern-default", "quern-webhooks", "quern-operator"}
_WAYS: dict[tuple[str, int], set[str]] = {
    ("udp", 53): _NAMES,
    ("tcp", 53): _NAMES,
    ("udp", 123): {"_chrony"},
    ("tcp", 4460): {"_chrony"},
    ("tcp", 80): {"_apt", "quern-fetch"},
    # The receiver of the tests is one of firewall_webhook_networks.
    ("tcp", 443): {"_apt", "quern-fetch", "quern-webhooks"},
}
_ACCOUNTS = sorted(
    {*_NAMES, "quern-api", "quern-events", "quern-batched", "quern-engine", "quern-analytics", "quern-backup", "nobody"}
)
_METADATA = yaml.safe_load((Path(__file__).parent / "expected.yml").read_text())["metadata"]
#: Each as its account, in the host's own network; one connection for all, since the host takes only so many a minute.
_PROBE = """
import json, os, pwd, socket, sys
def reaches(account, protocol, address, port):
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    try:
        entry = pwd.getpwnam(account)
        os.setgroups([]); os.setgid(entry.pw_gid); os.setuid(entry.pw_uid)
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as way:
            way.settimeout(10)
            way.connect((address, port))
            way.send(b"?")
            os._exit(0 if way.recv(1) == b"!" else 1)
    except BaseException:
        os._exit(1)
print(json.dumps([reaches(*each) for each in json.load(sys.stdin)]))
"""
_CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"


def reaches(host: Host, account: str, address: str, port: int) -> bool:
    """Whether a process of that account, in the host's own network, can connect."""
    return bool(host.run("runuser -u %s -- python3 -c %s %s %s", account, _CONNECT, address, str(port)).rc == 0)


def _answer(way: socket.socket, protocol: str) -> None:
    while True:
        try:
            if protocol == "udp":
                _, sender = way.recvfrom(16)
                if sender is None:
                    return  # shut
                way.sendto(b"!", sender)
            else:
                connection, _ = way.accept()
                with connection:
                    connection.recv(16)
                    connection.sendall(b"!")
        except ConnectionError:
            continue
        except OSError:
            return  # closed


@pytest.fixture(scope="module")
def beside(host: Host, place: Place) -> Iterator[dict[str, str]]:
    """The addresses of a machine beside the host, by protocol; that of IPv6 is one of the internet's."""
    network = f"2001:db8:{place.gateway.split('.')[2]}:"
    interface = f"ve-{place.folder.name}"[:15]
    address = ["ip", "-6", "address", "add", f"{network}:1/64", "dev", interface, "nodad"]
    subprocess.run(address, check=True)
    try:
        host.check_output("ip -6 address add %s:2/64 dev host0 nodad", network)
        host.check_output("ip -6 route add default via %s:1 dev host0", network)
        yield {"IPv4": place.gateway, "IPv6": f"{network}:1"}
    finally:
        host.run("ip -6 route delete default via %s:1 dev host0", network)
        host.run("ip -6 address delete %s:2/64 dev host0", network)
        subprocess.run(["delete" if word == "add" else word for word in address[:-1]], check=True)


@pytest.fixture(scope="module")
def far_ends(beside: dict[str, str]) -> Iterator[None]:
    """That machine answers on every port of the table."""
    with ExitStack() as stack:
        for (protocol, port), address in itertools.product(_WAYS, beside.values()):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
            way = stack.enter_context(socket.socket(family, kind))
            way.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            way.bind((address, port))
            if protocol == "tcp":
                way.listen(16)
            # Wakes what waits in accept() and recv(), which a mere close does not.
            stack.callback(_shut, way)
            threading.Thread(target=_answer, args=(way, protocol), daemon=True).start()
        yield


def _shut(way: socket.socket) -> None:
    try:
        way.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass  # a datagram socket is not connected; it wakes all the same


@pytest.fixture(scope="module")
def reached(host: Host, beside: dict[str, str], far_ends: None) -> dict[tuple[str, str, int], set[str]]:
    """Who reached which port, by which protocol."""
    accounts = [account for account in _ACCOUNTS if host.user(account).exists]
    asked = [(account, by, protocol, port) for by in beside for protocol, port in _WAYS for account in accounts]
    given = json.dumps([(account, protocol, beside[by], port) for account, by, protocol, port in asked])
    said = json.loads(host.check_output("printf %%s %s | python3 -c %s", given, _PROBE))
    found: dict[tuple[str, str, int], set[str]] = {(by, *way): set() for by in beside for way in _WAYS}
    for (account, by, protocol, port), came in zip(asked, said, strict=True):
        if came:
            found[by, protocol, port].add(account)
    return found


@pytest.mark.parametrize("by", ["IPv4", "IPv6"])
@pytest.mark.parametrize("way", _WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def test_names_time_and_packages_are_for_those_who_need_them(
    reached: dict[tuple[str, str, int], set[str]], way: tuple[str, int], by: str
) -> None:
    assert reached[by, *way] == _WAYS[way]


def test_the_webhook_sender_reaches_the_receiver(host: Host, place: Place, receiver: object) -> None:
    assert reaches(host, "quern-webhooks", place.gateway, RECEIVER_PORT)


@pytest.mark.parametrize(
    "account", ["quern-api", "quern-batched", "quern-engine", "quern-default", "mongodb", "nginx", "root"]
)
def test_no_other_account_reaches_it(host: Host, place: Place, receiver: object, account: str) -> None:
    assert not reaches(host, account, place.gateway, RECEIVER_PORT)


@pytest.mark.parametrize("address", _METADATA)
@pytest.mark.parametrize("account", ["quern-webhooks", "quern-default", "_apt", "root"])
def test_nobody_reaches_the_addresses_of_machine_credentials(
    host: Host, beside: dict[str, str], account: str, address: str
) -> None:
    before = _refused(host, address)
    assert not reaches(host, account, address, 80)
    # Not merely that nobody answers there: the rule counted it.
    assert _refused(host, address) > before


def _refused(host: Host, address: str) -> int:
    rules = host.check_output("nft list chain inet quern output")
    line = next(line for line in rules.splitlines() if ("@metadata6" if ":" in address else "@metadata4") in line)
    return int(line.split("packets ")[1].split()[0])


_LEASE = """
import socket
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as way:
    way.bind(("::", 546))
    way.settimeout(120)
    print("listens", flush=True)
    print(way.recv(16).decode())
"""


def test_only_what_leases_addresses_reaches_the_port_of_leases(host: Host, place: Place) -> None:
    interface = f"ve-{place.folder.name}"[:15]
    (address,) = host.check_output("ip -6 -o addr show dev host0 scope link | awk '{print $4}'").split()
    there = (address.split("/")[0], 546, 0, socket.if_nametoindex(interface))
    unit = "quern-test-lease"
    host.check_output("systemd-run --quiet --collect --unit=%s python3 -u -c %s", unit, _LEASE)
    said = f"journalctl -u {unit} -o cat --since=-5min"
    try:
        with (
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server,
            socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as stranger,
        ):
            server.bind(("::", 547))
            deadline = time.monotonic() + 100
            while "lease" not in (heard := host.check_output(said)):
                assert time.monotonic() < deadline, heard
                if "listens" in heard:
                    stranger.sendto(b"stranger", there)
                    server.sendto(b"lease", there)
                time.sleep(1)
    finally:
        host.run("systemctl stop %s", unit)
    assert "stranger" not in heard


def test_forwarding_is_refused(host: Host) -> None:
    assert "policy drop" in host.check_output("nft list chain inet quern forward")
