"""How llama.cpp computes; apart from its binding, so that the supervising process never loads native code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

#: By this name OpenBLAS is told which kernels to use, before it is loaded.
_KERNELS = "OPENBLAS_CORETYPE"
#: The AVX-512 kernels that every OpenBLAS of the last years has, and what they ask of a CPU.
_AVX512_KERNELS, _AVX512_FLAGS = "SkylakeX", {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}


class Way(NamedTuple):
    """Who multiplies for prompts: ggml, or OpenBLAS with the kernels that it picks or those named."""

    blas: bool
    kernels: str = ""

    def environment(self) -> dict[str, str]:
        """What a process that computes so is started with."""
        return {**os.environ, _KERNELS: self.kernels} if self.kernels else dict(os.environ)

    @property
    def name(self) -> str:
        """For people."""
        return ("openblas " + self.kernels).strip() if self.blas else "native"


class BackendOptions(NamedTuple):
    """Threads, how eagerly they poll for work (0 to 100), whether OpenBLAS may do prompts, most tokens in a step.

    `kernels`: as of `Way`.
    """

    threads: int
    poll: int
    blas: bool
    batch: int = 512
    kernels: str = ""

    @property
    def way(self) -> Way:
        """Who multiplies."""
        return Way(self.blas, self.kernels)


def cpu_flags() -> set[str]:
    """What the kernel says this CPU can do; empty where it says nothing."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def ways(flags: set[str]) -> list[Way]:
    """The ways worth measuring on a CPU with these flags.

    An OpenBLAS that does not know a CPU, or was told by the environment that it is another one, leaves half of the
    width of AVX-512 unused.
    """
    found = [Way(blas=False), Way(blas=True)]
    if flags >= _AVX512_FLAGS:
        found.append(Way(blas=True, kernels=_AVX512_KERNELS))
    return found
