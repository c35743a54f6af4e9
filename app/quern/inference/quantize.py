"""A model file in another type of weights, made by llama.cpp's own `llama_model_quantize` in a process of its own.

llama.cpp leaves a truncated file behind when it refuses or dies, so the result is written under a temporary name,
checked (header, tensors, and that llama.cpp computes numbers with it), and only then put in place.

Run as `python -m quern.inference.quantize SOURCE TARGET FILE_TYPE THREADS`: the native part alone.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from quern.inference import gguf
from quern.inference.modelbench import ProbeError, probe


class FileType(NamedTuple):
    """llama.cpp's number of a type (`llama_ftype` in llama.h), and the type that most weights then have."""

    number: int
    main: str


#: The types that `quern models` makes.
TYPES = {
    "q4_0": FileType(2, "Q4_0"),
    "q4_1": FileType(3, "Q4_1"),
    "q8_0": FileType(7, "Q8_0"),
    "q4_k_m": FileType(15, "Q4_K"),
    "q5_k_m": FileType(17, "Q5_K"),
    "q6_k": FileType(18, "Q6_K"),
}
TIMEOUT = 3600.0
_FLOATS = frozenset({"F32", "F16", "BF16"})


class QuantizeError(Exception):
    """There is no such file now; the text says why."""


class Quantized(NamedTuple):
    """What was made; `notes` are what an operator should know about its quality."""

    path: Path
    bytes: int
    notes: list[str]


def quantize(source: Path, target: Path, kind: str, threads: int | None = None) -> Quantized:
    """Write `source` to `target` with weights of `kind`; `target` is there whole, or not at all.

    Raises:
        QuantizeError: the source is not whole, llama.cpp refuses, or the result does not compute.
    """
    wanted = TYPES[kind]
    try:
        before = gguf.read(source)
    except (gguf.GgufError, OSError) as error:
        raise QuantizeError(f"{source}: {error}") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial.gguf")
    try:
        _run(source, temporary, wanted.number, threads or len(os.sched_getaffinity(0)))
        after = gguf.read(temporary)
        if (found := len(after.tensors)) != len(before.tensors):
            raise QuantizeError(f"expected {len(before.tensors)} tensors in the new file, found {found}")
        probe(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
    except (gguf.GgufError, ProbeError) as error:
        raise QuantizeError(f"the new file is not usable: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return Quantized(target, after.size, _notes(before, after, wanted))


def _run(source: Path, target: Path, number: int, threads: int) -> None:
    command = [sys.executable, "-m", "quern.inference.quantize", str(source), str(target), str(number), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as error:
        raise QuantizeError(f"llama.cpp did not finish within {TIMEOUT:.0f} s") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise QuantizeError(f"llama.cpp cannot make this file: {said[0]}")


def _notes(before: gguf.Gguf, after: gguf.Gguf, wanted: FileType) -> list[str]:
    notes = []
    if before.main_type not in _FLOATS:
        notes.append(f"made from {before.main_type}, not from the original weights: quality is lost twice")
    kinds = [tensor.kind for tensor in after.tensors if tensor.kind not in _FLOATS]
    others = sorted({kind for kind in kinds if kind != wanted.main})
    count = sum(kind != wanted.main for kind in kinds)
    if count * 4 > len(kinds):
        notes.append(
            f"{count} of {len(kinds)} quantised tensors are {', '.join(others)} instead of {wanted.main}: "
            "this model's rows do not suit the type"
        )
    return notes


def main() -> None:
    """Quantise one file in this process."""
    import llama_cpp as api

    from quern.inference.llama import start_backend

    source, target, number, threads = sys.argv[1:5]
    start_backend(blas=False)
    parameters = api.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread, parameters.allow_requantize = int(number), int(threads), True
    code = api.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters))
    if code:
        sys.exit(f"llama_model_quantize returned {code}")


if __name__ == "__main__":
    main()
