"""The backups' repository outlives killed runs, refused passwords and servers that are away. With Debian's restic."""

import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from tests.roles.conftest import served
from tests.roles.rendering import ROLES
from tests.waf.debian import unpacked

FILES = ROLES / "backup/files"
KEEP = ["--keep-daily", "1"]
_SECONDS = 600
#: What a run of restic that was killed may have been doing.
INTERRUPTED = {
    "copy": ["backup", "--quiet", "--tag", "quern", "--host", "quern"],
    "prune": ["forget", "--quiet", "--tag", "quern", "--prune", *KEEP],
    "check": ["check", "--quiet"],
}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FILES))
    import quern_repository

    return quern_repository


class Place:
    """A repository, the account's folder, and what is copied."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "repository"
        self.state = folder / "state"
        self.content = folder / "content"
        self.credentials = folder / "credentials"
        for path in (self.state, self.content, self.credentials):
            path.mkdir()
        (self.content / "large").write_bytes(os.urandom(4 << 20))
        self.knows("first")

    def knows(self, *passwords: str) -> None:
        (self.credentials / "restic_password").write_text(",".join(passwords))

    def restic(self, *arguments: str, password: str = "") -> subprocess.Popen[str]:
        there = {"RESTIC_REPOSITORY": str(self.repository), "RESTIC_PASSWORD": password or "first"}
        return subprocess.Popen(
            ["restic", *arguments],
            env={**os.environ, **there},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def opens(self, password: str) -> bool:
        process = self.restic("cat", "config", "--no-lock", password=password)
        process.communicate(timeout=_SECONDS)
        return process.returncode == 0

    def copies(self) -> int:
        said, _ = self.restic("snapshots", "--json", "--no-lock").communicate(timeout=_SECONDS)
        return len(json.loads(said))

    def locks(self) -> set[str]:
        # What is still being written has a longer name, and locks nothing yet.
        return {path.name for path in (self.repository / "locks").iterdir() if len(path.name) == 64}

    def caught(self, what: str) -> subprocess.Popen[str]:
        """A run of restic that is stopped while it holds a lock."""
        for number in range(50):
            (self.content / "more").write_bytes(os.urandom(1 << 20))
            process = self.restic(*INTERRUPTED[what], *([str(self.content)] if what == "copy" else []))
            while process.poll() is None:
                if self.locks():
                    process.send_signal(signal.SIGSTOP)
                    break
                time.sleep(0.001)
            time.sleep(0.05)
            if process.poll() is None and self.locks():
                return process
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
            said = process.communicate(timeout=_SECONDS)
            assert process.returncode == 0, (number, said)
        raise AssertionError(f"expected a lock during {what}")

    def killed(self, what: str) -> None:
        process = self.caught(what)
        process.kill()
        process.communicate(timeout=_SECONDS)
        assert self.locks()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    found = Place(tmp_path)
    monkeypatch.setenv("PATH", f"{unpacked('restic', ['restic'])}/usr/bin:{os.environ['PATH']}")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(found.credentials))
    monkeypatch.setenv("RESTIC_CACHE_DIR", str(tmp_path / "cache"))
    return found


@pytest.fixture
def copy(place: Place, module: ModuleType) -> Callable[[], None]:
    """What a night does with the repository."""

    def make() -> None:
        with module.held(str(place.repository), place.state) as repository:
            repository.save([str(place.content)])
            repository.tidy(KEEP)

    return make


@pytest.fixture
def rekey(place: Place, module: ModuleType) -> Callable[..., None]:
    def run(where: str | Path | None = None, copied: bool = True) -> None:
        with module.held(str(where or place.repository), place.state) as repository:
            repository.rekey(copied=copied)

    return run


@pytest.mark.parametrize("what", list(INTERRUPTED))
def test_a_killed_run_stops_no_later_copy_and_no_retention(what: str, place: Place, copy: Callable[[], None]) -> None:
    copy()
    place.killed(what)
    copy()
    assert place.copies() == 1
    assert place.locks() == set()


@pytest.mark.parametrize("what", list(INTERRUPTED))
def test_a_killed_run_stops_no_rotation(
    what: str, place: Place, copy: Callable[[], None], rekey: Callable[..., None]
) -> None:
    copy()
    place.killed(what)
    place.knows("second", "first")
    rekey()
    assert place.opens("second")
    assert not place.opens("first")


def test_an_interrupted_rotation_stops_no_copy(
    place: Place, copy: Callable[[], None], rekey: Callable[..., None]
) -> None:
    copy()
    place.knows("third", "second", "first")
    copy()
    rekey()
    assert place.opens("third")
    assert not place.opens("first")
    copy()


def test_the_lock_of_a_process_that_lives_is_kept(place: Place, copy: Callable[[], None]) -> None:
    copy()
    process = place.caught("check")
    try:
        held = place.locks()
        with pytest.raises(subprocess.CalledProcessError):
            copy()
        assert held <= place.locks()
    finally:
        process.kill()
        process.communicate(timeout=_SECONDS)


def test_a_rotation_beside_somebody_elses_restic_fails_and_both_passwords_go_on(
    place: Place, copy: Callable[[], None], rekey: Callable[..., None]
) -> None:
    copy()
    process = place.caught("check")
    try:
        place.knows("second", "first")
        with pytest.raises(subprocess.CalledProcessError):
            rekey()
        assert place.opens("first")
    finally:
        process.kill()
        process.communicate(timeout=_SECONDS)
    rekey()
    assert place.opens("second")


def test_a_rotation_fails_where_no_known_password_opens_the_copies(
    place: Place, module: ModuleType, copy: Callable[[], None], rekey: Callable[..., None]
) -> None:
    copy()
    place.knows("second", "another")
    with pytest.raises(module.RepositoryError, match=r"known passwords \(2\)"):
        rekey()
    with pytest.raises(module.RepositoryError, match="wrong password"):
        copy()
    assert place.opens("first")


@contextmanager
def serving() -> Iterator[str]:
    """A REST server that answers, and has no repository."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Nobody reads it."""

    with served(Handler) as address:
        yield f"rest:{address}/"


def test_a_rotation_ends_where_nothing_was_copied_yet(place: Place, rekey: Callable[..., None]) -> None:
    rekey(copied=False)
    place.repository.mkdir()
    rekey(copied=False)
    with serving() as server:
        rekey(server, copied=False)


def test_a_rotation_fails_where_copies_were_made_and_no_repository_is_found(
    place: Place, module: ModuleType, copy: Callable[[], None], rekey: Callable[..., None]
) -> None:
    with pytest.raises(module.RepositoryError, match="copies were made"):
        rekey()
    copy()
    (place.repository / "config").unlink()
    with pytest.raises(module.RepositoryError, match="config is missing"):
        rekey(copied=False)
    with pytest.raises(module.RepositoryError, match="config is missing"):
        copy()


def test_a_rotation_fails_while_the_repository_is_away(
    module: ModuleType, place: Place, rekey: Callable[..., None]
) -> None:
    with serving() as server:
        away = server
    with pytest.raises(module.RepositoryError, match="connection refused"):
        rekey(away, copied=False)
    with pytest.raises(module.RepositoryError, match="sftp session"):
        rekey("sftp:nobody@host.invalid:/quern", copied=False)


_HOLD = """
import os, pathlib, signal, sys, time
sys.path.insert(0, sys.argv[1])
import quern_repository
with quern_repository.held(sys.argv[2], pathlib.Path(sys.argv[3])) as repository:
    repository.restic("cache", "--help", stdout=open(os.devnull, "w"))
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def waiting(copy: Callable[[], None]) -> Iterator[None]:
    """A copy that waits for whoever holds the repository, and is made once the body has let it go."""
    run = threading.Thread(target=copy)
    run.start()
    run.join(timeout=1.5)
    assert run.is_alive()
    yield
    run.join(timeout=_SECONDS)
    assert not run.is_alive()


def test_one_run_at_a_time_holds_the_repository(place: Place, copy: Callable[[], None]) -> None:
    command = [sys.executable, "-c", _HOLD, str(FILES), str(place.repository), str(place.state)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with waiting(copy):
            assert not (place.repository / "config").exists()
            other.stdin.close()
    assert place.copies() == 1


def test_a_repository_is_held_until_restic_ends_though_its_run_was_killed(
    place: Place, module: ModuleType, copy: Callable[[], None]
) -> None:
    """`restic` here is what lasts until it is told to end."""
    programs = place.state / "programs"
    programs.mkdir()
    (programs / "restic").write_text(f"#!/bin/sh\necho began\nexec 0<{place.state}/go; read -r _\n")
    (programs / "restic").chmod(0o755)
    os.mkfifo(place.state / "go")
    command = [sys.executable, "-c", _HOLD.replace(', stdout=open(os.devnull, "w")', ""), str(FILES)]
    command += [str(place.repository), str(place.state)]
    path = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=path) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "began\n"
        run.kill()
        run.wait()
        with waiting(copy):
            (place.state / "go").write_text("go\n")
    assert place.copies() == 1


def test_a_given_repository_that_lacks_a_piece_is_not_whole(
    place: Place, module: ModuleType, copy: Callable[[], None]
) -> None:
    copy()
    piece = next(path for path in (place.repository / "data").glob("*/*") if path.is_file())
    piece.unlink()
    with module.held(str(place.repository), place.state) as repository:
        repository.require()
        with pytest.raises(subprocess.CalledProcessError):
            repository.check()
