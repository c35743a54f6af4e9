"""Build llama-server, the benches' peer, from the llama.cpp that the engine uses, as its makers build it by default.

The source is `vendor/llama.cpp` of the pinned llama-cpp-python source distribution; the options are llama.cpp's own
(OpenMP on, no BLAS, this CPU), except that what it would download is left out. Prints the path of the binary, which is
kept in ``$QUERN_CACHE/llama-server/<hash>``. Standard library only; needs what
`scripts/build-llama` needs.

    python3 bench/build_llama_server.py
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PINS = ROOT / "requirements-llama.txt"
BUILD_PINS = ROOT / "requirements-llama-build.txt"
# Without network the server's web page and its https are of no use; nothing here touches how it computes.
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_CURL=OFF",
)
PROGRAMS = ("llama-server", "llama-bench")


def cache_folder() -> Path:
    """Where this source, compiler, CPU and options lead to."""
    compiler = subprocess.run(["gcc", "--version"], check=True, capture_output=True, text=True).stdout
    cpu = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    named = sorted({line for line in cpu if line.startswith(("model name", "flags"))})
    parts = [PINS.read_text(encoding="ascii"), compiler, *OPTIONS, *named]
    root = Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern")
    return root / "llama-server" / hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def build(folder: Path) -> None:
    """Compile into a temporary folder and put it in place whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder.parent) as temporary:
        work = Path(temporary)
        subprocess.run([sys.executable, "-m", "venv", str(work / "venv")], check=True)
        pip = [str(work / "venv" / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "-q", "--require-hashes", "-r", str(BUILD_PINS)], check=True)
        how = ["-q", "--no-deps", "--no-build-isolation", "--no-binary", "llama-cpp-python", "--require-hashes"]
        environment = {**os.environ, "PATH": f"{work / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        subprocess.run(
            [*pip, "download", *how, "-r", str(PINS), "-d", str(work / "fetched")], check=True, env=environment
        )
        with tarfile.open(next((work / "fetched").glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work / "source")  # noqa: S202 - its hash is pinned
        source = next((work / "source").iterdir()) / "vendor" / "llama.cpp"
        made = work / "made"
        # Where the programs will lie, so that they find their libraries there.
        options = [*OPTIONS, f"-DCMAKE_BUILD_RPATH={folder}", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=OFF"]
        subprocess.run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(made), *options], check=True, stdout=2)
        jobs = str(len(os.sched_getaffinity(0)))
        subprocess.run(["cmake", "--build", str(made), "-j", jobs, "--target", *PROGRAMS], check=True, stdout=2)
        shutil.copytree(made / "bin", work / "kept", symlinks=True)
        (work / "kept").rename(folder)


def main() -> None:
    folder = cache_folder()
    if not folder.exists():
        build(folder)
    print(folder / PROGRAMS[0])


if __name__ == "__main__":
    main()
