"""The restic repository that keeps Quern's copies: what opens it, who holds it, what goes in and what goes out.

One run at a time holds it. A lock of restic's own that is found then was left by a process that was killed, and goes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

#: What restic 0.14 (Debian 12) says of a folder, an SFTP or a REST server that answers and has no repository. Its exit
#: code is 1 for everything, and its next line ("Is there a repository …") is said of a server that is away, too.
_ABSENT = re.compile(r"unable to open config file: .*(no such file or directory|does not exist|doesn't exist)")
_WRONG = "wrong password or no key found"


class RepositoryError(Exception):
    """The repository does not answer, does not open, or is not what it was."""


class Answer(Enum):
    """What a repository says to a password."""

    OPENS = "opens"
    REFUSED = "refused"
    NOTHING_THERE = "nothing there"


def say(text: str) -> None:
    """Tell the operator and the journal."""
    sys.stdout.write(f"quern-backup: {text}\n")
    sys.stdout.flush()


def credential(name: str) -> str:
    """A secret that systemd gave. Raises FileNotFoundError."""
    return (Path(os.environ["CREDENTIALS_DIRECTORY"]) / name).read_text()


def passwords() -> list[str]:
    """What opens the repository: during its rotation the new password, and the former ones after it."""
    return credential("restic_password").split(",")


class Repository:
    """A repository: a folder, or whatever restic takes. `lock` is the file that says that a run of ours holds it."""

    def __init__(self, place: str, lock: int | None = None) -> None:
        self.place = place
        self._lock = lock
        self._password = ""

    def restic(
        self, *arguments: str, password: str = "", check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run restic; its password reaches it through memory, and never by an argument or the environment."""
        secret = os.memfd_create("password", 0)
        try:
            os.write(secret, (password or self._password or passwords()[0]).encode())
            os.lseek(secret, 0, os.SEEK_SET)
            place = {"RESTIC_REPOSITORY": self.place, "RESTIC_PASSWORD_FILE": f"/dev/fd/{secret}"}
            # With the lock in its hands: should this process be killed alone, the repository is held until restic ends.
            handed = [secret] if self._lock is None else [secret, self._lock]
            command = ["restic", *arguments]
            return subprocess.run(
                command, env={**os.environ, **place}, text=True, check=check, pass_fds=handed, **options
            )
        finally:
            os.close(secret)

    def ask(self, password: str) -> Answer:
        """What it says to a password. Raises RepositoryError when it says nothing that could be relied on."""
        # Without a lock: that another process holds the repository says nothing about the password.
        done = self.restic("cat", "config", "--no-lock", password=password, check=False, capture_output=True)
        if done.returncode == 0:
            return Answer.OPENS
        said = done.stderr.strip()
        if _WRONG in said:
            return Answer.REFUSED
        if _ABSENT.search(said):
            if self._holds_copies():
                raise RepositoryError(f"{self.place}: there are copies, and the file config is missing: {said}")
            return Answer.NOTHING_THERE
        raise RepositoryError(f"{self.place}: restic cat config ended with {done.returncode}: {said}")

    def open(self) -> bool:
        """Find the password that opens it; False where there is none yet. Raises RepositoryError otherwise."""
        known = passwords()
        for password in known:
            match self.ask(password):
                case Answer.OPENS:
                    self._password = password
                    return True
                case Answer.NOTHING_THERE:
                    return False
        raise RepositoryError(f"{self.place}: none of the known passwords ({len(known)}) opens it: {_WRONG}")

    def unlock(self) -> None:
        """Remove what killed processes left; restic keeps the lock of a process of this account that lives."""
        self.restic("unlock", "--quiet")

    def save(self, paths: Sequence[str]) -> None:
        """One more copy; the first one makes the repository."""
        if self.open():
            self.unlock()
        else:
            self.restic("init", "--quiet")
        self.restic("backup", "--quiet", "--tag", "quern", "--host", "quern", *paths)

    def tidy(self, keep: Sequence[str]) -> None:
        """The retention, then the check of the structure."""
        self.restic("forget", "--quiet", "--tag", "quern", "--group-by", "host,tags", "--prune", *keep)
        self.check()

    def check(self) -> None:
        """Fail when a piece of a copy is missing."""
        self.restic("check", "--quiet")

    def fetch(self, snapshot: str, target: Path) -> None:
        """Unpack a copy into `target`."""
        self.restic("restore", snapshot, "--quiet", "--tag", "quern", "--target", str(target))

    def require(self) -> None:
        """Open it. Raises RepositoryError where there is none."""
        if not self.open():
            raise RepositoryError(f"{self.place}: expected a repository, found none")
        self.unlock()

    def rekey(self, copied: bool) -> None:
        """Let the new password open it, and the former ones no longer; `copied` says that copies were made of late."""
        new = passwords()[0]
        if not self.open():
            if copied:
                raise RepositoryError(f"{self.place}: copies were made, and none is there (not mounted, moved?)")
            return
        self.unlock()
        if self._password != new:
            self._add(new)
        listed = json.loads(self.restic("key", "list", "--json", stdout=subprocess.PIPE).stdout)
        for key in listed:
            if not key["current"]:
                self.restic("key", "remove", key["id"], stdout=subprocess.DEVNULL)

    def _add(self, new: str) -> None:
        added = os.memfd_create("added", 0)
        try:
            os.write(added, new.encode())
            os.lseek(added, 0, os.SEEK_SET)
            file = f"/proc/{os.getpid()}/fd/{added}"
            self.restic("key", "add", "--new-password-file", file, stdout=subprocess.DEVNULL)
        finally:
            os.close(added)
        self._password = new

    def _holds_copies(self) -> bool:
        # An `init` that was cut short leaves a key without a config, and is begun anew.
        folder = Path(self.place)
        return folder.is_absolute() and any((folder / "snapshots").glob("*"))


@contextmanager
def held(place: str, state: Path) -> Iterator[Repository]:
    """The repository, while no other run of ours touches it: the nightly one, the operator's, a rotation's."""
    file = os.open(state / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run holds the repository; waiting for its end")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield Repository(place, file)
    finally:
        os.close(file)
