"""A virtual machine that runs the appliance, as the tests see it: by SSH, by TLS, and by its power switch."""

import json
import os
import shlex
import ssl
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
#: Emulation is ten to twenty times slower than the host, which is busy besides.
PATIENCE_SECONDS = 1800


class NotInTimeError(AssertionError):
    """What was waited for did not come."""


def wait_until(
    there: Callable[[], object], what: str, seconds: float = PATIENCE_SECONDS, every_seconds: float = 1
) -> None:
    """Poll until `there` is true. Raises NotInTimeError, with what it said last."""
    deadline = time.monotonic() + seconds
    while not (said := there()):
        if time.monotonic() > deadline:
            raise NotInTimeError(f"expected {what} within {seconds:.0f} s, found {said!r}")
        time.sleep(every_seconds)


@dataclass(frozen=True)
class Said:
    """A command's answer."""

    status: int
    out: str
    err: str


class Guest:
    """One virtual machine. Commands run as root."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.facts: dict[str, Any] = {}
        # A UNIX socket's path ends at 107 bytes, and a cache may lie deep.
        self._sockets = tempfile.TemporaryDirectory(prefix="q-", dir="/tmp")
        self._socket = Path(self._sockets.name) / "ssh"

    def start(self) -> None:
        """Run a fresh copy of the image: as it was saved when it served, else booted."""
        self._vm_host("destroy")
        self.facts = json.loads(self._vm_host("start"))

    def save(self) -> None:
        """Keep it as it serves now for later runs, and go on with a copy of that."""
        self._forget_connection()
        self._vm_host("save")
        self.facts = json.loads(self._vm_host("start"))

    def attach(self) -> None:
        """Take the machine of this name as it runs."""
        self.facts = json.loads(self._vm_host("facts"))

    def resume(self) -> None:
        """Boot the same disk again."""
        self.facts = json.loads(self._vm_host("resume"))

    def cut(self) -> None:
        """What a power cut does."""
        self._vm_host("cut")
        self._forget_connection()

    def destroy(self) -> None:
        """End it, and remove its disk."""
        self._forget_connection()
        self._vm_host("destroy")

    @property
    def folder(self) -> Path:
        """Where it lies on this machine."""
        return Path(self.facts["known_hosts"]).parent

    @property
    def url(self) -> str:
        """Its front door."""
        return f"https://{self.facts['address']}:{self.facts['https_port']}"

    def ask(self, command: str, *, stdin: str | None = None, seconds: float = PATIENCE_SECONDS) -> Said:
        """Run a shell command as root."""
        answer = subprocess.run(
            [*self._ssh(), f"sudo -n bash -c {shlex.quote(command)}"],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
        return Said(answer.returncode, answer.stdout.strip(), answer.stderr.strip())

    def say(self, command: str, *, stdin: str | None = None) -> str:
        """The output of a shell command that must succeed."""
        said = self.ask(command, stdin=stdin)
        assert said.status == 0, f"{command}: {said}"
        return said.out

    @contextmanager
    def time_for_ai(self) -> Iterator[None]:
        """AI gets what others leave, and in an emulated guest they leave nothing. test_limits holds its real place."""
        if self.facts["accelerator"] != "tcg":
            yield
            return
        self.say("systemctl set-property --runtime quern-ai.slice CPUWeight=1000")
        yield
        self.say("systemctl set-property --runtime quern-ai.slice CPUWeight=idle")

    @staticmethod
    def become(account: str) -> str:
        """What stands before a command that this account runs. No login: that would start a service manager for it."""
        return f"setpriv --reuid {account} --regid $(id -g {account}) --init-groups --"

    def trusting(self) -> ssl.SSLContext:
        """A client that trusts the guest's own authority and no other."""
        return ssl.create_default_context(cadata=self.say("cat /etc/quern/tls/authority.pem"))

    def wait_serving(self, services: list[str]) -> float:
        """Wait until every service runs and the front door answers; how many seconds it took."""
        began = time.monotonic()
        # sshd answers before it lets anybody but root in (pam_nologin).
        wait_until(lambda: self.ask("true").status == 0, "SSH to let the operator in")
        trusting = self.trusting()

        def serves() -> bool:
            try:
                with urllib.request.urlopen(f"{self.url}/healthz", context=trusting, timeout=60) as answer:
                    return bool(answer.status == 200)
            except (OSError, urllib.error.URLError):
                return False

        def down() -> str:
            states = self.ask(f"systemctl is-active {' '.join(services)}").out.split()
            return " ".join(name for name, state in zip(services, states, strict=True) if state != "active")

        try:
            # Seldom: what asks takes the emulated processors from those that start.
            wait_until(lambda: not down(), "every service to run", every_seconds=5)
            wait_until(serves, "the front door to answer", every_seconds=5)
        except NotInTimeError as error:
            journal = self.ask("journalctl -b --no-pager -p warning -o short-monotonic | tail -n 60").out
            raise NotInTimeError(f"{error}; down: {down()}\n{journal}") from None
        return time.monotonic() - began

    def _vm_host(self, act: str) -> str:
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        answer = subprocess.run(
            [ROOT / "molecule/vm-host", act, self.name], env=environment, stdout=subprocess.PIPE, text=True, check=False
        )
        assert answer.returncode == 0, f"vm-host {act} failed; what it said is above"
        return answer.stdout

    def _ssh(self) -> list[str]:
        # One connection for all commands: the guest's firewall takes only so many new ones a minute.
        shared = [
            "-o",
            "ControlMaster=auto",
            "-o",
            "ControlPersist=1800",
            "-o",
            f"ControlPath={self._socket}",
        ]
        alive = ["-o", "ServerAliveInterval=30", "-o", "ServerAliveCountMax=10", "-o", "ConnectTimeout=120"]
        known = ["-o", f"UserKnownHostsFile={self.facts['known_hosts']}", "-o", "LogLevel=ERROR"]
        who = ["-i", self.facts["key"], "-p", str(self.facts["ssh_port"]), f"admin@{self.facts['address']}"]
        return ["ssh", "-o", "BatchMode=yes", *shared, *alive, *known, *who]

    def _forget_connection(self) -> None:
        if self.facts:
            subprocess.run(
                ["ssh", "-o", f"ControlPath={self._socket}", "-O", "exit", f"admin@{self.facts['address']}"],
                capture_output=True,
                check=False,
            )
            self._socket.unlink(missing_ok=True)
