"""Sentence vectors on ONNX Runtime: length-aware batches, and equal texts computed once.

Model: a BERT encoder with mean pooling (minilm_onnx.py); tokeniser: Hugging Face `tokenizers`.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from tokenizers import Tokenizer

Vector = NDArray[np.float32]
#: Tokens, padding included, in one run: enough to keep the cores busy, little enough to stay in their caches.
RUN_TOKENS = 2048
RUN_TEXTS = 64


class Embedded(NamedTuple):
    """Vectors in the order of the texts, and the tokens that were read for those not known yet."""

    vectors: list[Vector]
    tokens: int


class Embedder:
    """One encoder and a cache of its vectors.

    Args:
        context: tokens of a text that count; the rest is left out.
        cached: vectors kept at most.
    """

    def __init__(self, model: Path, tokenizer: Path, context: int, threads: int, cached: int = 20_000) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Threads that spin between runs would take the cores from llama.cpp's.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        self._tokenizer = Tokenizer.from_file(str(tokenizer))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(context)
        self._cache: OrderedDict[tuple[str, bytes], Vector] = OrderedDict()
        self._room = cached
        self.hits = self.misses = 0

    def embed(self, items: Sequence[tuple[str, str]]) -> Embedded:
        """A vector of length 1 for each (tenant, text); equal texts of a tenant are computed once."""
        keys = [(tenant, hashlib.sha256(text.encode("utf-8", "replace")).digest()) for tenant, text in items]
        texts = {key: text for key, (_, text) in zip(keys, items, strict=True)}
        known = {key: vector for key in texts if (vector := self._cache.get(key)) is not None}
        missing = [key for key in texts if key not in known]
        self.hits += len(items) - len(missing)
        self.misses += len(missing)
        tokens = 0
        if missing:
            encoded = [encoding.ids for encoding in self._tokenizer.encode_batch([texts[key] for key in missing])]
            tokens = sum(len(ids) for ids in encoded)
            for key, vector in zip(missing, self._run(encoded), strict=True):
                known[key] = self._cache[key] = vector
        for key in texts:
            self._cache.move_to_end(key)
        while len(self._cache) > self._room:
            self._cache.popitem(last=False)
        return Embedded([known[key] for key in keys], tokens)

    def purge(self, tenant: str) -> None:
        """Forget a tenant's vectors."""
        for key in [key for key in self._cache if key[0] == tenant]:
            del self._cache[key]

    def __len__(self) -> int:
        return len(self._cache)

    def _run(self, encoded: list[list[int]]) -> list[Vector]:
        """Vectors of token lists: texts of like length together, so that little of a run is padding."""
        vectors: list[Vector] = [np.empty(0, np.float32)] * len(encoded)
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        while order:
            longest = len(encoded[order[-1]])
            count = max(1, min(len(order), RUN_TEXTS, RUN_TOKENS // max(1, longest)))
            chosen, order = order[-count:], order[:-count]
            ids = np.zeros((count, longest), np.int64)
            mask = np.zeros((count, longest), np.int64)
            for row, index in enumerate(chosen):
                ids[row, : len(encoded[index])] = encoded[index]
                mask[row, : len(encoded[index])] = 1
            (found,) = self._session.run(None, {"input_ids": ids, "attention_mask": mask})
            for row, index in enumerate(chosen):
                vectors[index] = found[row]
        return vectors
