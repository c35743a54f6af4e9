"""Debian packages, unpacked into the cache: nothing is installed or started. apt checks its signatures."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from quern.embedded.cache import cached


def unpacked(name: str, packages: Sequence[str]) -> Path:
    """A folder with the files of these packages (without what they depend on)."""

    def build(folder: Path) -> None:
        _download(["download", *packages], folder)
        for package in folder.glob("*.deb"):
            _run(["dpkg", "-x", package.name, "."], folder)
            package.unlink()

    return cached(name, [*packages, _release()], build)


def source(name: str, package: str) -> Path:
    """A folder with the original sources of a package."""

    def build(folder: Path) -> None:
        # The machine's own mirrors, asked for sources; its own lists stay as they are.
        parts = folder / "parts"
        parts.mkdir()
        for listed in Path("/etc/apt/sources.list.d").glob("*.sources"):
            if "debian" in (text := listed.read_text()):
                (parts / listed.name).write_text(text.replace("Types: deb\n", "Types: deb-src\n"))
        plain = Path("/etc/apt/sources.list")
        lines = plain.read_text().splitlines() if plain.exists() else []
        (parts / "plain.list").write_text(
            "".join(line.replace("deb ", "deb-src ", 1) + "\n" for line in lines if line.startswith("deb "))
        )
        (folder / "lists" / "partial").mkdir(parents=True)
        options = [
            f"Dir::Etc::sourceparts={parts}",
            "Dir::Etc::sourcelist=/dev/null",
            f"Dir::State::lists={folder}/lists",
        ]
        apt = ["apt-get", *(word for option in (*options, "APT::Sandbox::User=root") for word in ("-o", option))]
        _run([*apt, "update"], folder)
        _run([*apt, "source", "--download-only", package], folder)
        (archive,) = folder.glob("*.orig.tar.*")
        _run(["tar", "-xf", archive.name, "--strip-components=1"], folder)
        shutil.rmtree(folder / "lists")

    return cached(name, ["source", package, _release()], build)


@cache
def _release() -> str:
    return Path("/etc/os-release").read_text() + os.uname().machine


def _download(arguments: Sequence[str], folder: Path) -> None:
    apt = ["apt-get", "-o", "APT::Sandbox::User=root"]
    try:
        _run([*apt, *arguments], folder)
    except RuntimeError:
        # The package lists are missing or old.
        _run([*apt, "-o", "DPkg::Lock::Timeout=600", "update"], folder)
        _run([*apt, *arguments], folder)


def _run(command: Sequence[str], folder: Path) -> None:
    answer = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} failed; run: apt-get update, then again.\n{answer.stderr.strip()}")
