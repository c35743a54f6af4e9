"""Sentence vectors on ONNX Runtime: each text in a run of its own, and equal texts computed once.

The integer products scale their inputs by the largest number in the run (`DynamicQuantizeMatMul` has one scale for the
whole matrix), so a neighbour in a batch would move a text's vector: enough to change another tenant's scores by 0.07.
Nobody's text may do that. Texts that come together are therefore spread over the cores, the longest first, each
computed by one thread: nothing is padded, and no thread waits for another. A text that comes alone gets all cores,
if they are free. Either way computes the same numbers.

Model: a BERT encoder with mean pooling (minilm_onnx.py); tokeniser: Hugging Face `tokenizers`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

from quern.inference.pace import free_cores

Vector = NDArray[np.float32]


class Embedded(NamedTuple):
    """Vectors in the order of the texts, and how many tokens of each were read, now or when it was first embedded."""

    vectors: list[Vector]
    tokens: list[int]


class Embedder:
    """One encoder and a cache of its vectors.

    Args:
        context: tokens of a text that count; the rest is left out.
        cached: vectors kept at most.
    """

    def __init__(self, model: Path, tokenizer: Path, context: int, threads: int, cached: int = 20_000) -> None:
        self._narrow = _session(model, 1)
        self._wide = _session(model, threads) if threads > 1 else self._narrow
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "embed-one")
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(context)
        self._cache: OrderedDict[tuple[str, bytes], tuple[Vector, int]] = OrderedDict()
        self._room = cached
        self.hits = self.misses = 0

    def embed(self, items: Sequence[tuple[str, str]]) -> Embedded:
        """A vector of length 1 for each (tenant, text); equal texts of a tenant are computed once."""
        keys = [(tenant, hashlib.sha256(text.encode("utf-8", "replace")).digest()) for tenant, text in items]
        texts = {key: text for key, (_, text) in zip(keys, items, strict=True)}
        known = {key: found for key in texts if (found := self._cache.get(key)) is not None}
        missing = [key for key in texts if key not in known]
        self.hits += len(items) - len(missing)
        self.misses += len(missing)
        if missing:
            encoded = [encoding.ids for encoding in self._tokenizer.encode_batch([texts[key] for key in missing])]
            for key, ids, vector in zip(missing, encoded, self._run(encoded), strict=True):
                known[key] = self._cache[key] = (vector, len(ids))
        for key in texts:
            self._cache.move_to_end(key)
        while len(self._cache) > self._room:
            self._cache.popitem(last=False)
        return Embedded([known[key][0] for key in keys], [known[key][1] for key in keys])

    def purge(self, tenant: str) -> None:
        """Forget a tenant's vectors."""
        for key in [key for key in self._cache if key[0] == tenant]:
            del self._cache[key]

    def __len__(self) -> int:
        return len(self._cache)

    def _run(self, encoded: list[list[int]]) -> list[Vector]:
        """Vectors of token lists, each from a run of its own."""
        if len(encoded) == 1:
            # Threads that wait for one another are slower than one alone when somebody else has the cores.
            return [_vector(self._wide if free_cores() >= self._threads else self._narrow, encoded[0])]
        longest_first = sorted(range(len(encoded)), key=lambda place: -len(encoded[place]))
        coming = {place: self._pool.submit(_vector, self._narrow, encoded[place]) for place in longest_first}
        return [coming[place].result() for place in range(len(encoded))]


def _session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads are fast while a text is computed, and would take the cores from llama.cpp's after it.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def _vector(session: onnxruntime.InferenceSession, tokens: list[int]) -> Vector:
    ids = np.array([tokens], np.int64)
    (found,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    vector: Vector = found[0]
    return vector
