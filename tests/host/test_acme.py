"""The certificate by ACME: Pebble, an ACME server with the strictness of Let's Encrypt's, runs beside the host."""

import json
import os
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from testinfra.host import Host

from quern.embedded.certificate import ServerCertificate
from tests.host.conftest import RECEIVER_PORT, Place, Played
from tests.host.test_ways_out import reaches
from tests.waf.debian import unpacked

pytestmark = pytest.mark.full

DIRECTORY_PORT, MANAGEMENT_PORT, NAMES_PORT = 14000, 15000, 15353
NAME = "quern.test"
Play = Callable[..., Played]


@pytest.fixture(scope="module")
def pebble(place: Place, certificate: ServerCertificate, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the directory. Every name leads to the host, as DNS would say."""
    folder = tmp_path_factory.mktemp("pebble")
    programs = unpacked("pebble", ["pebble"]) / "usr/bin"
    configuration: dict[str, Any] = {
        "listenAddress": f"{place.gateway}:{DIRECTORY_PORT}",
        "managementListenAddress": f"{place.gateway}:{MANAGEMENT_PORT}",
        "certificate": str(certificate.chain),
        "privateKey": str(certificate.key),
        "httpPort": 80,
        "tlsPort": 443,
    }
    (folder / "pebble.json").write_text(json.dumps({"pebble": configuration}))
    environment = {**os.environ, "PEBBLE_VA_NOSLEEP": "1"}
    names = f"127.0.0.1:{NAMES_PORT}"
    off = ["-http01", "", "-https01", "", "-tlsalpn01", "", "-management", "", "-defaultIPv6", ""]
    commands = [
        [str(programs / "pebble-challtestsrv"), "-dns01", names, "-defaultIPv4", place.address, *off],
        [str(programs / "pebble"), "-config", str(folder / "pebble.json"), "-dnsserver", names, "-strict"],
    ]
    with ExitStack() as stack:
        log = stack.enter_context((folder / "log").open("wb"))
        for command in commands:
            process = stack.enter_context(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
            stack.callback(process.kill)
        directory = f"https://{place.gateway}:{DIRECTORY_PORT}/dir"
        deadline = time.monotonic() + 300
        while True:
            try:
                fetched(directory, certificate)
                break
            except OSError:
                assert time.monotonic() < deadline, (folder / "log").read_text()
                time.sleep(0.2)
        yield directory


def fetched(address: str, certificate: ServerCertificate) -> bytes:
    context = ssl.create_default_context(cafile=str(certificate.authority))
    with urllib.request.urlopen(address, timeout=10, context=context) as answer:
        return bytes(answer.read())


@pytest.fixture(scope="module")
def ordered(pebble: str, play: Play, place: Place, certificate: ServerCertificate) -> Iterator[Played]:
    """The host takes its certificate from Pebble, and afterwards from its own authority again."""
    options = {"nginx_acme_email": "ops@quern.example", "nginx_acme_directory": pebble}
    trusted = {"nginx_acme_authority": str(certificate.authority)}
    done = play("tests/host/plays/certificate.yml", nginx_tls="acme", **options, **trusted)
    yield done
    if "Quern authority" not in served(place)["issuer"]:
        play("tests/host/plays/certificate.yml", nginx_tls="local")


def served(place: Place) -> dict[str, str]:
    """Issuer and serial number of the certificate that clients see."""
    pem = ssl.get_server_certificate((place.address, 443), timeout=30)
    said = subprocess.run(
        ["openssl", "x509", "-noout", "-issuer", "-serial"], input=pem, capture_output=True, text=True, check=True
    )
    return dict(line.split("=", 1) for line in said.stdout.splitlines())


def test_clients_see_a_certificate_of_the_acme_server(
    ordered: Played, place: Place, host: Host, certificate: ServerCertificate
) -> None:
    assert ordered.code == 0, ordered.output[-3000:]
    assert "Pebble Intermediate" in served(place)["issuer"], host.check_output("journalctl -u quern-acme -o cat")
    root = fetched(f"https://{place.gateway}:{MANAGEMENT_PORT}/roots/0", certificate).decode()
    context = ssl.create_default_context(cadata=root)
    with (
        socket.create_connection((place.address, 443), timeout=30) as plain,
        context.wrap_socket(plain, server_hostname=NAME) as tls,
    ):
        assert tls.version() == "TLSv1.3"


def test_a_certificate_that_holds_is_left_alone(ordered: Played, place: Place, host: Host) -> None:
    before = served(place)
    host.check_output("systemctl start quern-acme.service")
    assert served(place) == before
    assert host.service("quern-acme.timer").is_enabled


def test_a_certificate_near_its_end_is_renewed(ordered: Played, place: Place, host: Host) -> None:
    before = served(place)
    host.check_output("sed -i.kept 's/--days 30/--days 36500/' /usr/local/sbin/quern-acme")
    try:
        host.check_output("systemctl start quern-acme.service")
    finally:
        host.check_output("mv /usr/local/sbin/quern-acme.kept /usr/local/sbin/quern-acme")
    deadline = time.monotonic() + 300
    while served(place)["serial"] == before["serial"]:
        assert time.monotonic() < deadline, "expected nginx to serve the renewed certificate"
    assert "Pebble Intermediate" in served(place)["issuer"]


def test_what_does_not_fit_together_is_not_used(ordered: Played, place: Place, host: Host) -> None:
    before = served(place)
    folder = "/var/lib/quern-acme/certificates"
    host.check_output(
        f"cp -p {folder}/{NAME}.key {folder}/kept && openssl ecparam -genkey -name prime256v1 -out {folder}/{NAME}.key"
    )
    host.check_output(f"chown quern-acme {folder}/{NAME}.key")
    try:
        refused = host.run("/usr/local/sbin/quern-acme-install")
    finally:
        host.check_output(f"mv {folder}/kept {folder}/{NAME}.key")
    assert refused.rc == 1
    assert "expected a key that fits the certificate" in refused.stderr
    assert served(place) == before


def test_its_account_reads_no_key_and_reaches_only_the_authority(
    ordered: Played, place: Place, host: Host, receiver: object
) -> None:
    assert host.run("runuser -u quern-acme -- cat /etc/quern/tls/server.key").rc != 0
    assert reaches(host, "quern-acme", place.gateway, DIRECTORY_PORT)
    assert not reaches(host, "quern-acme", place.gateway, RECEIVER_PORT)
    for other in ("root", "nginx", "quern-webhooks"):
        assert not reaches(host, other, place.gateway, DIRECTORY_PORT), other


def test_the_local_authority_takes_over_again(ordered: Played, play: Play, place: Place, host: Host) -> None:
    done = play("tests/host/plays/certificate.yml", nginx_tls="local")
    assert done.code == 0, done.output[-3000:]
    assert "Quern authority" in served(place)["issuer"]
    assert not host.service("quern-acme.timer").is_enabled
    assert not reaches(host, "quern-acme", place.gateway, DIRECTORY_PORT)
