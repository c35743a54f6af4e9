"""Files that were written and may not be on the disk yet: flushed together, before anything says they are there."""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

#: Files that are flushed at once: the file system puts what is asked for at the same time into one commit.
_AT_ONCE: Final = 16


class Unflushed:
    """Gathers paths until `flush`. A killed process needs none of it, a power cut does (fsync(2))."""

    def __init__(self) -> None:
        self._files: set[Path] = set()
        self._folders: set[Path] = set()

    def add(self, path: Path) -> None:
        """A file that was put in place, or taken away."""
        self._files.add(path)
        self._folders |= {path.parent, path.parent.parent}

    def flush(self) -> None:
        """Return when all of it is on the disk: the files first, then the names that lead to them."""
        for paths in (self._files, self._folders):
            flush(paths)
            paths.clear()


def flush(paths: Iterable[Path]) -> None:
    """Flush files or folders; those that are not there any more need no flushing, their folders do."""
    with ThreadPoolExecutor(_AT_ONCE, "flushing") as pool:
        list(pool.map(_flush, paths))


def _flush(path: Path) -> None:
    with suppress(FileNotFoundError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
