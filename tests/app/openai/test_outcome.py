"""An answer is divided again as it was told."""

from hypothesis import given
from hypothesis import strategies as st

from quern.openai.outcome import Choice, Outcome


def outcome(texts: list[str], cuts: list[list[tuple[int, int, int]]]) -> Outcome:
    choices = [Choice(text=text, finish="stop") for text in texts]
    return Outcome(model="m", choices=choices, prompt_tokens=1, cached_tokens=0, completion_tokens=1, cuts=cuts)


@given(st.lists(st.tuples(st.integers(0, 1), st.text(min_size=1, max_size=5)), max_size=20))
def test_the_records_come_again_as_they_were(told: list[tuple[int, str]]) -> None:
    texts = ["".join(text for index, text in told if index == choice) for choice in (0, 1)]
    found = outcome(texts, [[(index, len(text), 0)] for index, text in told]).records()
    assert [(index, text) for record in found for index, text, _ in record] == told


@given(st.text(min_size=1, max_size=20), st.integers(0, 20))
def test_what_was_not_told_comes_last_and_at_once(text: str, told: int) -> None:
    told = min(told, len(text))
    found = outcome([text], [[(0, told, 0)]] if told else []).records()
    assert "".join(piece for record in found for _, piece, _ in record) == text
    assert len(found) == (told > 0) + (told < len(text))
