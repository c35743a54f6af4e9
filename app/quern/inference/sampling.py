"""Which token comes next: penalties, bias, temperature, top-k, top-p, min-p, and a grammar that has the last word.

Greedy and random choice over a row of logits; numpy, nothing kept between rows but what is passed in. Nucleus sampling:
Holtzman et al., 2020; min-p: Nguyen et al., 2024; repetition penalty: Keskar et al., 2019 (CTRL).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
#: Tokens looked at before the whole vocabulary when the likeliest one is not allowed.
SHORT_LIST = 64
#: How far back repetition is looked for, in tokens.
PENALTY_WINDOW = 256


class Rules(Protocol):
    """What may come next (a grammar)."""

    def allowed(self, tokens: Ints) -> NDArray[np.bool_]:
        """Which of these tokens may come next."""

    def accept(self, token: int) -> None:
        """Go on past a token."""


class NothingAllowedError(Exception):
    """The rules allow no token of the vocabulary."""


@dataclass(frozen=True)
class SamplingParameters:
    """As in `GenerateRequest`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)

    @property
    def penalises(self) -> bool:
        """Whether earlier tokens matter."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


def adjust(logits: Floats, parameters: SamplingParameters, earlier: list[int]) -> Floats:
    """The logits after bias and penalties; the row itself when neither is asked for, else a copy."""
    if not parameters.logit_bias and not parameters.penalises:
        return logits
    row = logits.copy()
    if parameters.penalises and earlier:
        counts = Counter(earlier[-PENALTY_WINDOW:])
        tokens = np.fromiter(counts, np.int64)
        times = np.fromiter(counts.values(), np.float32)
        values = row[tokens]
        values = np.where(values > 0, values / parameters.repetition_penalty, values * parameters.repetition_penalty)
        row[tokens] = values - parameters.presence_penalty - parameters.frequency_penalty * times
    for token, bias in parameters.logit_bias.items():
        if token < len(row):
            row[token] += bias
    return row


class FirstBytes:
    """The vocabulary by the first byte of each token's text.

    A grammar that allows a token allows every beginning of its text, so the tokens of one byte tell which others need
    to be asked about: where only a quotation mark may come, that is some hundreds instead of the whole vocabulary.
    """

    def __init__(self, pieces: Sequence[bytes], ends: Iterable[int]) -> None:
        self._ends = np.array(sorted(ends), np.int32)
        groups: dict[int, list[int]] = {}
        single: dict[int, int] = {}
        for token, piece in enumerate(pieces):
            if piece:
                groups.setdefault(piece[0], []).append(token)
                if len(piece) == 1:
                    single.setdefault(piece[0], token)
        self._groups = [np.array(groups[byte], np.int32) for byte in single]
        self._single = np.array([single[byte] for byte in single], np.int32)
        unasked = [token for byte, tokens in groups.items() if byte not in single for token in tokens]
        self._unasked = np.array(unasked, np.int32)

    def candidates(self, rules: Rules) -> Ints:
        """Tokens that hold all that the rules allow now."""
        open_groups = [self._groups[index] for index in np.flatnonzero(rules.allowed(self._single))]
        return np.concatenate([self._ends, self._unasked, *open_groups])


def choose(
    row: Floats,
    parameters: SamplingParameters,
    random: np.random.Generator,
    rules: Rules | None = None,
    vocabulary: FirstBytes | None = None,
) -> int:
    """The next token, allowed by the rules. The rules are not moved on.

    With rules the first choice is made without them and kept if they allow it: most often they do, and asking them
    about one token is cheap. Else the short list is asked, then the vocabulary.

    Raises:
        NothingAllowedError: the rules allow nothing.
    """
    token = _pick(row, None, parameters, random)
    if rules is None or bool(rules.allowed(np.array([token], np.int32))[0]):
        return token
    size = len(row)
    tokens = np.argpartition(row, -min(SHORT_LIST, size))[-SHORT_LIST:].astype(np.int32)
    allowed = tokens[rules.allowed(tokens)]
    if not len(allowed):
        tokens = vocabulary.candidates(rules) if vocabulary is not None else np.arange(size, dtype=np.int32)
        allowed = tokens[rules.allowed(tokens)]
    if not len(allowed):
        raise NothingAllowedError
    return _pick(row, allowed, parameters, random)


def _pick(row: Floats, tokens: Ints | None, parameters: SamplingParameters, random: np.random.Generator) -> int:
    values = row if tokens is None else row[tokens]
    if parameters.temperature == 0.0:
        index = int(values.argmax())
        return index if tokens is None else int(tokens[index])
    order: NDArray[np.intp] | None = None
    if 0 < parameters.top_k < len(values):
        order = np.argpartition(values, -parameters.top_k)[-parameters.top_k :]
        values = values[order]
    scaled = values.astype(np.float64) / parameters.temperature
    weights = np.exp(scaled - scaled.max())
    weights /= weights.sum()
    if parameters.min_p > 0.0:
        weights[weights < parameters.min_p * weights.max()] = 0.0
        weights /= weights.sum()
    if parameters.top_p < 1.0:
        ranked = np.argsort(weights)[::-1]
        before = np.cumsum(weights[ranked]) - weights[ranked]
        weights[ranked[before >= parameters.top_p]] = 0.0
    cumulated = np.cumsum(weights)
    index = int(np.searchsorted(cumulated, random.random() * cumulated[-1], side="right"))
    index = min(index, len(weights) - 1)
    if order is not None:
        index = int(order[index])
    return index if tokens is None else int(tokens[index])


def log_probabilities(logits: Floats, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's natural-log probability, and the `top` likeliest tokens with theirs, best first."""
    peak = float(logits.max())
    total = peak + float(np.log(np.exp(logits - peak, dtype=np.float64).sum()))
    best: list[tuple[int, float]] = []
    if top:
        candidates = np.argpartition(logits, -top)[-top:]
        ranked = candidates[np.argsort(logits[candidates])[::-1]]
        best = [(int(index), float(logits[index]) - total) for index in ranked]
    return float(logits[token]) - total, best
