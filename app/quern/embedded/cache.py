"""Things that are costly to get, kept under the hash of what they are made from."""

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path


def cache_root() -> Path:
    """`$QUERN_CACHE`, or `~/.cache/quern`."""
    return Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern")


def cached(name: str, inputs: Sequence[str], build: Callable[[Path], None]) -> Path:
    """The folder that `build` filled for these inputs, built at most once and never seen half-built.

    `build` gets an empty folder beside the final place; whatever it raises leaves nothing behind.
    """
    place = cache_root() / name / hashlib.sha256("\0".join(inputs).encode()).hexdigest()[:16]
    if place.is_dir():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    with (place.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if place.is_dir():
            return place
        scratch = Path(tempfile.mkdtemp(prefix=".partial-", dir=place.parent))
        try:
            build(scratch)
            scratch.chmod(0o755)
            scratch.rename(place)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
    return place


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
