"""What the choice of the next token promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from quern.inference.sampling import (
    FirstBytes,
    NothingAllowedError,
    SamplingParameters,
    adjust,
    choose,
    log_probabilities,
)

ROW = np.array([1.0, 3.0, 2.0, -1.0, 0.0], np.float32)


class Only:
    """Rules that allow some tokens, and count how many they were asked about."""

    def __init__(self, *tokens: int) -> None:
        self._tokens, self.asked = np.array(tokens), 0

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        self.asked += len(tokens)
        return np.isin(tokens, self._tokens)

    def accept(self, token: int) -> None:
        raise AssertionError("choosing must not move the rules on")


def _shares(parameters: SamplingParameters, draws: int = 4000, rules: Only | None = None) -> NDArray[np.float64]:
    random = np.random.default_rng(7)
    picked = [choose(ROW, parameters, random, rules) for _ in range(draws)]
    return np.bincount(picked, minlength=len(ROW)) / draws


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    assert choose(ROW, SamplingParameters(), np.random.default_rng(0)) == 1


def test_temperature_one_draws_from_the_models_own_distribution() -> None:
    expected = np.exp(ROW) / np.exp(ROW).sum()
    assert _shares(SamplingParameters(temperature=1.0)) == pytest.approx(expected, abs=0.03)


def test_top_p_keeps_the_smallest_set_that_holds_its_share() -> None:
    # 0.61 and 0.22: the second is needed to reach 0.7, the third is not.
    shares = _shares(SamplingParameters(temperature=1.0, top_p=0.7))
    assert set(np.flatnonzero(shares)) == {1, 2}


def test_top_k_keeps_the_k_likeliest() -> None:
    assert set(np.flatnonzero(_shares(SamplingParameters(temperature=2.0, top_k=3)))) == {0, 1, 2}


def test_min_p_drops_what_is_unlikely_beside_the_likeliest() -> None:
    assert set(np.flatnonzero(_shares(SamplingParameters(temperature=1.0, min_p=0.3)))) == {1, 2}


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        random = np.random.default_rng(seed)
        return [choose(ROW, SamplingParameters(temperature=1.5), random) for _ in range(50)]

    assert draw(3) == draw(3)
    assert draw(3) != draw(4)


def test_rules_have_the_last_word() -> None:
    assert choose(ROW, SamplingParameters(), np.random.default_rng(0), Only(3, 4)) == 4
    assert set(np.flatnonzero(_shares(SamplingParameters(temperature=3.0), 300, Only(0, 3)))) == {0, 3}


def test_an_allowed_first_choice_costs_one_question() -> None:
    rules = Only(1)
    choose(ROW, SamplingParameters(), np.random.default_rng(0), rules)
    assert rules.asked == 1


def test_the_whole_vocabulary_is_asked_when_the_short_list_has_nothing() -> None:
    row = np.linspace(0, 1, 1000, dtype=np.float32)
    assert choose(row, SamplingParameters(), np.random.default_rng(0), Only(5)) == 5


def test_first_bytes_spare_the_rules_most_of_the_vocabulary() -> None:
    pieces = [b"", *(bytes([byte]) for byte in range(256)), *(b"x%d" % n for n in range(500)), b'"a', b'"b']
    vocabulary = FirstBytes(pieces, ends=[0])
    quote_b = len(pieces) - 1
    row = np.zeros(len(pieces), np.float32)
    row[300:400] = 5.0  # a short list full of what is not allowed
    rules = Only(pieces.index(b'"'), quote_b)
    row[quote_b] = 1.0
    assert choose(row, SamplingParameters(), np.random.default_rng(0), rules, vocabulary) == quote_b
    assert rules.asked < 400


def test_rules_that_allow_nothing_are_an_error_and_not_a_hang() -> None:
    with pytest.raises(NothingAllowedError):
        choose(ROW, SamplingParameters(), np.random.default_rng(0), Only())


def test_bias_lifts_a_token_and_leaves_the_models_row_alone() -> None:
    adjusted = adjust(ROW, SamplingParameters(logit_bias={3: 100.0, 10**6: 5.0}), [])
    assert int(adjusted.argmax()) == 3
    assert ROW[3] == -1.0


def test_penalties_push_down_what_was_said_before() -> None:
    parameters = SamplingParameters(repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25)
    adjusted = adjust(ROW, parameters, [1, 1, 3])
    assert adjusted[1] == pytest.approx(3.0 / 2 - 0.5 - 2 * 0.25)
    assert adjusted[3] == pytest.approx(-1.0 * 2 - 0.5 - 0.25)
    assert adjusted[2] == 2.0


def test_log_probabilities_are_the_models_own() -> None:
    value, best = log_probabilities(ROW, 2, 2)
    total = math.log(np.exp(ROW.astype(np.float64)).sum())
    assert value == pytest.approx(2.0 - total, abs=1e-5)
    assert [token for token, _ in best] == [1, 2]
    assert best[0][1] == pytest.approx(3.0 - total, abs=1e-5)
