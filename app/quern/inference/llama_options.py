"""How llama.cpp computes; apart from its binding, so that the supervising process never loads native code."""

from typing import NamedTuple


class BackendOptions(NamedTuple):
    """Threads, how eagerly they poll for work (0 to 100), whether OpenBLAS may do prompts, most tokens in a step."""

    threads: int
    poll: int
    blas: bool
    batch: int = 512
