"""Acts that no service has any business doing. Runs inside the guest, as the service's account:

    python3 acts.py PROFILE

does each act twice, in a process of its own: as that account unconfined, and under the profile. Prints one JSON object,
`{act: {"unconfined": outcome, "confined": outcome}}`; an outcome is `done`, `refused`, or what else went wrong.

The process changes into the profile while it runs (what `aa_change_profile(2)` does), for most profiles allow no
program from outside to start at all: so each act itself is judged, and not the start of the one who tries it. Standard
library only.
"""

import errno
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

Act = Callable[[], None]


def _read(path: str) -> Act:
    def act() -> None:
        with open(path, "rb") as file:  # noqa: PTH123 - as little as possible happens under the profile
            file.read(64)

    return act


def _execute(*command: str) -> Act:
    def act() -> None:
        child = os.posix_spawn(command[0], command, {})
        if status := os.waitpid(child, 0)[1]:
            raise RuntimeError(f"status {status}")

    return act


def _open_internet_socket() -> None:
    socket.socket(socket.AF_INET, socket.SOCK_STREAM).close()


def _open_routing_socket() -> None:
    socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close()


def _list(path: str) -> Act:
    def act() -> None:
        os.listdir(path)  # noqa: PTH208

    return act


def acts(own: Path, stranger: int) -> dict[str, Act]:
    """`own` is a folder that the account may write, `stranger` another process of the same account."""
    program = own / "program"
    program.write_bytes(Path("/usr/bin/true").read_bytes())
    program.chmod(0o755)

    def write() -> None:
        os.close(os.open(own / "new", os.O_CREAT | os.O_WRONLY, 0o600))

    def load() -> None:
        with open(program, "rb") as file:  # noqa: PTH123
            mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_EXEC).close()

    def end() -> None:
        os.kill(stranger, signal.SIGCONT)

    return {
        "run a shell": _execute("/bin/sh", "-c", "exit 0"),
        "run another program": _execute("/usr/bin/true"),
        "run a program that it wrote": _execute(str(program)),
        "load code that it wrote": load,
        "write outside of its folders": write,
        "read what it wrote there": _read(str(program)),
        "signal another process": end,
        "read another process's environment": _read(f"/proc/{stranger}/environ"),
        "open an internet socket": _open_internet_socket,
        "open a routing socket": _open_routing_socket,
        "read the service's settings file": _read("/etc/quern/quern.env"),
        "read a model": _read("/opt/quern/models/MODEL"),
        "read the host's settings": _read("/etc/login.defs"),
        "read the package log": _read("/var/log/dpkg.log"),
        "list the host's modules": _read("/proc/modules"),
        "list who is connected": _read("/proc/net/unix"),
        "list the systemd units": _list("/etc/systemd/system"),
    }


def _outcome(act: Act, profile: str | None) -> str:
    """What came of the act, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if profile is not None:
                Path("/proc/self/attr/apparmor/current").write_text(f"changeprofile {profile}")
            act()
            said = "done"
        except OSError as error:
            said = "refused" if error.errno in (errno.EACCES, errno.EPERM) else f"{type(error).__name__}: {error}"
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(child, 0)
    return said


def main() -> None:
    profile = sys.argv[1]
    stranger = subprocess.Popen(["/usr/bin/sleep", "600"])
    try:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
            model = next(path for path in sorted(Path("/opt/quern/models").rglob("*")) if path.is_file())
            every = acts(Path(folder), stranger.pid) | {"read a model": _read(str(model))}
            found = {}
            for name, act in every.items():
                unconfined = _outcome(act, None)
                Path(folder, "new").unlink(missing_ok=True)
                found[name] = {"unconfined": unconfined, "confined": _outcome(act, profile)}
                Path(folder, "new").unlink(missing_ok=True)
    finally:
        stranger.kill()
        stranger.wait()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
