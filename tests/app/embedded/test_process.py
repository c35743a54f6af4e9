import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from quern.embedded.process import ChildProcess, ServiceError

SLEEP = ["sleep", "600"]


def eventually(holds: Callable[[], bool], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def sleeper(directory: Path) -> ChildProcess:
    return ChildProcess("sleeper", SLEEP, log=directory / "log", ready=lambda: True)


def test_a_service_that_ends_before_it_is_ready_fails_with_the_end_of_its_log(run_directory: Path) -> None:
    command = ["sh", "-c", "echo the disk is full; exit 3"]
    service = ChildProcess("broken", command, log=run_directory / "log", ready=lambda: False)
    with pytest.raises(ServiceError, match=r"(?s)ended \(3\).*the disk is full"):
        service.start()
    assert service.pid is None


def test_a_service_that_is_never_ready_is_killed_and_reported(run_directory: Path) -> None:
    started: list[int] = []
    service = ChildProcess("stuck", SLEEP, log=run_directory / "log", ready=lambda: False, start_seconds=0.2)
    service.start(wait=False)
    assert service.pid is not None
    started.append(service.pid)
    with pytest.raises(ServiceError, match="not ready after"):
        service.wait_ready()
    assert not alive(started[0])


def test_a_running_service_is_not_started_twice(run_directory: Path) -> None:
    with sleeper(run_directory) as service, pytest.raises(ServiceError, match="found it running"):
        service.start()


def test_stop_ends_the_children_that_the_service_leaves_behind(run_directory: Path) -> None:
    note = run_directory / "grandchild"
    command = ["sh", "-c", f"sleep 600 & echo $! > {note}.partial; mv {note}.partial {note}; exec sleep 600"]
    service = ChildProcess("parent", command, log=run_directory / "log", ready=note.exists)
    service.start()
    grandchild = int(note.read_text())
    assert alive(grandchild)
    assert service.stop() == -signal.SIGTERM
    assert eventually(lambda: not alive(grandchild))


def test_a_service_that_ignores_its_stop_signal_is_killed(run_directory: Path) -> None:
    ready = run_directory / "ready"
    command = ["sh", "-c", f"trap '' TERM; touch {ready}; while :; do sleep 0.1; done"]
    service = ChildProcess("deaf", command, log=run_directory / "log", ready=ready.exists, stop_seconds=0.3)
    service.start()
    assert service.stop() == -signal.SIGKILL


def test_a_service_outlives_the_thread_that_started_it(run_directory: Path) -> None:
    service = sleeper(run_directory)
    thread = threading.Thread(target=service.start)
    thread.start()
    thread.join()
    # The kernel would send the death signal as the thread ends; a second is ages for it.
    time.sleep(1)
    assert service.pid is not None
    service.stop()


def test_a_service_dies_with_the_process_that_started_it(run_directory: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from quern.embedded.process import ChildProcess\n"
        f"child = ChildProcess('child', {SLEEP}, log=Path(sys.argv[1]), ready=lambda: True); child.start()\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(run_directory / "log")], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert eventually(lambda: not alive(child))


@pytest.mark.parametrize("end", [ChildProcess.kill, ChildProcess.stop])
def test_nothing_of_a_service_that_was_ended_is_left(
    run_directory: Path, end: Callable[[ChildProcess], object]
) -> None:
    large = "import time; held = bytearray(b'x') * 200_000_000; print('held', flush=True); time.sleep(600)"
    command = ["sh", "-c", f'"{sys.executable}" -c "{large}" & "{sys.executable}" -c "{large}" & wait']
    log = run_directory / "log"
    service = ChildProcess("large", command, log=log, ready=lambda: log.read_text().count("held") == 2)
    service.start()
    assert service.pid is not None
    group = [child.pid for child in psutil.Process(service.pid).children(recursive=True)]
    assert len(group) == 2
    end(service)
    assert [pid for pid in group if alive(pid)] == []
