"""The journal reaches the operator's collector, by rsyslog and by OTLP; both receivers are real ones, by TLS."""

import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from testinfra.host import Host

from quern.embedded.cache import cached
from quern.embedded.certificate import ServerCertificate
from tests.host.conftest import ROOT, Place, Played, told
from tests.host.test_ways_out import reaches
from tests.roles.conftest import PACKAGES
from tests.waf.debian import unpacked

pytestmark = pytest.mark.full

SYSLOG_PORT, OTLP_PORT = 6514, 4318
PATIENCE_SECONDS = 300
PINS = ROOT / "requirements-collector.txt"
Play = Callable[..., Played]


@pytest.fixture(scope="module", autouse=True)
def forward_nothing_afterwards(play: Play) -> Iterator[None]:
    yield
    play("tests/host/plays/forwarding.yml", monitoring_forward="none")


def written(place: Place) -> str:
    """A line that is in the journal once, and nowhere else in the world: sudo writes down its arguments, too."""
    mark = f"mark-{uuid.uuid4().hex}"
    told(place, ["logger", "-t", "quern-test", "-p", "user.warning"], mark)
    return mark


def arrives(mark: str, log: Path) -> str:
    """The receiver's own log, once the line is in it."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while mark not in (text := log.read_text(errors="replace")):
        assert time.monotonic() < deadline, f"expected {mark} at the receiver, found:\n{text[-2000:]}"
        time.sleep(0.5)
    return text


def _unpack_rotel(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--dest", str(folder)]
    subprocess.run([*pip, "-r", str(PINS)], check=True)
    (wheel,) = folder.glob("rotel-*.whl")
    shutil.unpack_archive(wheel, folder, "zip")
    (folder / "rotel/rotel-agent").chmod(0o755)


class SyslogReceiver:
    """Debian's rsyslogd, which takes RFC 5424 by TLS and writes it to a file."""

    def __init__(self, folder: Path, place: Place, certificate: ServerCertificate) -> None:
        self.log = folder / "received"
        self.log.touch()
        root = unpacked("role-judges", PACKAGES)
        libraries = root / "usr/lib" / f"{os.uname().machine}-linux-gnu"
        configuration = folder / "rsyslog.conf"
        configuration.write_text(
            f'global(workDirectory="{folder}" defaultNetstreamDriver="gtls"\n'
            f'  defaultNetstreamDriverCAFile="{certificate.authority}"\n'
            f'  defaultNetstreamDriverCertFile="{certificate.chain}"\n'
            f'  defaultNetstreamDriverKeyFile="{certificate.key}")\n'
            'module(load="imtcp" streamDriver.name="gtls" streamDriver.mode="1" streamDriver.authMode="anon")\n'
            f'input(type="imtcp" port="{SYSLOG_PORT}" address="{place.gateway}")\n'
            f'action(type="omfile" file="{self.log}" template="RSYSLOG_SyslogProtocol23Format")\n'
        )
        command = [str(root / "usr/sbin/rsyslogd"), "-n", "-i", str(folder / "pid"), "-M", str(libraries / "rsyslog")]
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{libraries}:{root}/lib/{libraries.name}"}
        self._output = (folder / "output").open("wb")
        self._process = subprocess.Popen(
            [*command, "-f", str(configuration)], env=environment, stdout=self._output, stderr=self._output
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()


class Through(socketserver.BaseRequestHandler):
    """Hands what comes by TLS on to a port of this machine."""

    def handle(self) -> None:
        server = self.server
        assert isinstance(server, Terminator)
        try:
            with (
                server.context.wrap_socket(self.request, server_side=True) as outside,
                socket.create_connection(("127.0.0.1", server.inside), timeout=30) as inside,
            ):
                threading.Thread(target=_copy, args=(inside, outside), daemon=True).start()
                _copy(outside, inside)
        except OSError:
            return


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        return


class Terminator(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, address: tuple[str, int], context: ssl.SSLContext, inside: int) -> None:
        self.context, self.inside = context, inside
        super().__init__(address, Through)


class OtlpReceiver:
    """Rotel, an OpenTelemetry collector, behind TLS; it writes down what it takes."""

    def __init__(self, folder: Path, place: Place, certificate: ServerCertificate) -> None:
        self.log = folder / "received"
        agent = cached("rotel", [PINS.read_text()], _unpack_rotel) / "rotel/rotel-agent"
        with socket.socket() as probe, socket.socket() as other:
            probe.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            inside, unused = probe.getsockname()[1], other.getsockname()[1]
        self._output = self.log.open("wb")
        self._process = subprocess.Popen(
            [
                *(str(agent), "start", "--exporter", "blackhole", "--debug-log", "logs"),
                *("--debug-log-verbosity", "detailed"),
                *("--otlp-http-endpoint", f"127.0.0.1:{inside}", "--otlp-grpc-endpoint", f"127.0.0.1:{unused}"),
            ],
            stdout=self._output,
            stderr=self._output,
        )
        self._server = Terminator((place.gateway, OTLP_PORT), certificate.server_context(), inside)
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._process.kill()
        self._process.wait()
        self._output.close()


def test_by_rsyslog(
    play: Play, place: Place, certificate: ServerCertificate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    receiver = SyslogReceiver(tmp_path_factory.mktemp("syslog"), place, certificate)
    try:
        done = play(
            "tests/host/plays/forwarding.yml",
            monitoring_forward="rsyslog",
            monitoring_forward_host=place.gateway,
            monitoring_forward_port=SYSLOG_PORT,
            monitoring_forward_authority=str(certificate.authority),
        )
        assert done.code == 0, done.output[-3000:]
        mark = written(place)
        text = arrives(mark, receiver.log)
        (line,) = [line for line in text.splitlines() if mark in line]
        # RFC 5424: facility user, severity warning, version 1; the tag is the program's.
        assert line.startswith("<12>1 ")
        assert " quern-test " in line
    finally:
        receiver.close()
    # Nobody listens any more. What is written meanwhile arrives later.
    waiting = written(place)
    again = SyslogReceiver(tmp_path_factory.mktemp("syslog-again"), place, certificate)
    try:
        arrives(waiting, again.log)
    finally:
        again.close()


def test_by_otlp(
    host: Host, play: Play, place: Place, certificate: ServerCertificate, tmp_path_factory: pytest.TempPathFactory
) -> None:
    receiver = OtlpReceiver(tmp_path_factory.mktemp("otlp"), place, certificate)
    try:
        done = play(
            "tests/host/plays/forwarding.yml",
            monitoring_forward="otlp",
            monitoring_forward_endpoint=f"https://{place.gateway}:{OTLP_PORT}/v1/logs",
            monitoring_forward_authority=str(certificate.authority),
        )
        assert done.code == 0, done.output[-3000:]
        # The first lines are those that come after the service has begun.
        deadline = time.monotonic() + PATIENCE_SECONDS
        while host.run("test -s /var/lib/quern-forward/cursor").rc != 0:
            assert time.monotonic() < deadline, host.check_output("journalctl -u quern-forward -o cat")
            written(place)
        text = arrives(written(place), receiver.log)
        assert "service.name: Str(" in text
        assert "SeverityText: WARN" in text
    finally:
        receiver.close()
    waiting = written(place)
    again = OtlpReceiver(tmp_path_factory.mktemp("otlp-again"), place, certificate)
    try:
        arrives(waiting, again.log)
    finally:
        again.close()


def test_its_account_reaches_only_the_collector(host: Host, place: Place, receiver: object) -> None:
    # The webhook receiver of the tests is another port of the same machine.
    assert not reaches(host, "quern-forward", place.gateway, 8443)


def test_nothing_is_forwarded_when_it_is_turned_off(host: Host, play: Play) -> None:
    done = play("tests/host/plays/forwarding.yml", monitoring_forward="none")
    assert done.code == 0, done.output[-3000:]
    assert not host.file("/etc/systemd/system/quern-forward.service").exists
    assert host.run("systemctl is-active quern-forward").rc != 0
