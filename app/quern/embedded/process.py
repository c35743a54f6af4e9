"""A child process with a lifetime: start, wait until ready, kill, restart, stop, and never outlive its parent."""

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

_POLL_SECONDS = 0.02
_LOG_TAIL_LINES = 20
_DYING_SECONDS = 10.0


class ServiceError(RuntimeError):
    """A service could not be started; the message holds the end of its log."""


class ChildProcess:
    """One service process in a session of its own, with its output in a file.

    `ready` is polled after each start and must return quickly. `death_signal` is what the kernel sends the child when
    this process dies (PR_SET_PDEATHSIG); a service with children of its own needs a signal on which it ends them.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | os.PathLike[str]],
        *,
        log: Path,
        ready: Callable[[], bool],
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
        death_signal: signal.Signals = signal.SIGKILL,
        start_seconds: float = 120.0,
        stop_seconds: float = 30.0,
    ) -> None:
        self.name = name
        self.log = log
        self._command = [os.fspath(word) for word in command]
        self._ready = ready
        self._environment = None if environment is None else dict(environment)
        self._directory = directory
        self._stop_signal = stop_signal
        self._death_signal = death_signal
        self._start_seconds = start_seconds
        self._stop_seconds = stop_seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        """The process id while the child runs, else None."""
        process = self._process
        return process.pid if process is not None and not _has_exited(process) else None

    def start(self, *, wait: bool = True) -> None:
        """Start the child, and with `wait` poll until it is ready.

        Raises ServiceError when it runs already, ends early, or is not ready in time (it is then killed).
        """
        with self._lock:
            if self.pid is not None:
                raise ServiceError(f"{self.name}: expected a stopped service, found it running as process {self.pid}")
            self._reap()
            # The kernel ties the death signal to the thread that forks, not to the process: a thread that
            # lives as long as this process does the forking, whichever thread asks for it.
            self._process = _spawner(os.getpid()).submit(self._spawn).result()
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Poll until the service answers. Raises ServiceError, with the end of its log, when it ends or is too slow."""
        deadline = time.monotonic() + self._start_seconds
        while not self._ready():
            process = self._process
            if process is None or _has_exited(process):
                code = self._reap()
                raise ServiceError(f"{self.name}: expected it to become ready, it ended ({code}).\n{self.log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServiceError(
                    f"{self.name}: not ready after {self._start_seconds:.0f} s, killed.\n{self.log_tail()}"
                )
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """SIGKILL the child and all of its process group, and wait until it is gone, if it runs."""
        with self._lock:
            if self._process is not None:
                _kill_group(self._process.pid)
                self._reap()

    def restart(self) -> None:
        """Stop cleanly if it runs, then start again on the same data."""
        with self._lock:
            self.stop()
            self.start()

    def stop(self) -> int | None:
        """Ask the child to end, wait, then kill what is left of its process group. Returns its exit code, if it ran."""
        with self._lock:
            process = self._process
            if process is None:
                return None
            if not _has_exited(process):
                process.send_signal(self._stop_signal)
                deadline = time.monotonic() + self._stop_seconds
                while not _has_exited(process) and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
            _kill_group(process.pid)
            return self._reap()

    def log_tail(self) -> str:
        """The last lines of the log, headed by its path."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"The end of {self.log}:", *lines[-_LOG_TAIL_LINES:]])

    def _spawn(self) -> subprocess.Popen[bytes]:
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            raise ServiceError("setpriv: expected in PATH, not found; run: apt-get install util-linux")
        # A parent that died before the death signal was set will never send it: the child then ends by itself.
        unless_orphaned = ["sh", "-c", f'[ "$PPID" = {os.getpid()} ] && exec "$@"', "sh"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [setpriv, "--pdeathsig", self._death_signal.name.removeprefix("SIG"), *unless_orphaned, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._directory,
                start_new_session=True,
            )

    def _reap(self) -> int | None:
        with self._lock:
            process, self._process = self._process, None
            return None if process is None else process.wait()


@cache
def _spawner(process_id: int) -> ThreadPoolExecutor:
    # Keyed by process: a forked child has none of its parent's threads.
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"spawn-{process_id}")


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    # WNOWAIT leaves the zombie, so that its process group cannot be given to a stranger before it is swept.
    if process.returncode is not None:
        return True
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _kill_group(group: int) -> None:
    """SIGKILL the group, and wait until none of it holds anything any more, such as a port."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + _DYING_SECONDS
    while _lives(group) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def _lives(group: int) -> bool:
    """Whether a process of the group is more than a zombie, see proc_pid_stat(5)."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
        except (OSError, ValueError):
            continue  # gone meanwhile
        if int(its_group) == group and state not in ("Z", "X"):
            return True
    return False
