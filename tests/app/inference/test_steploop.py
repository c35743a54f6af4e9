"""What the step loop promises: the library's own answers, nobody else's words, and every promise about limits."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from quern.inference import grammar, llama
from quern.inference.llama_options import BackendOptions
from quern.inference.protocol import ErrorKind, Generation, TokenLogprob
from quern.inference.sampling import SamplingParameters
from quern.inference.steploop import Limits, Sequence, StepLoop

CONTEXT = 1536
#: In the test of isolation; thousands, by hand: QUERN_TEST_SEQUENCES=1000 with other seeds.
SEQUENCES = int(os.environ.get("QUERN_TEST_SEQUENCES", "48"))
SEED = int(os.environ.get("QUERN_TEST_SEED", "1"))
LIMITS = Limits(batch=256, sequences=4, reserved_sequences=2, threads=1)


class Recorder:
    """Hears what becomes of the sequences."""

    def __init__(self) -> None:
        self.results: dict[int, Generation] = {}
        self.errors: dict[int, tuple[ErrorKind, str]] = {}
        self.streamed: dict[int, str] = {}
        self.finished: list[int] = []

    def token(
        self, request: int, text: str, count: int, tokens: Many[int], logprobs: list[TokenLogprob] | None
    ) -> None:
        self.streamed[request] = self.streamed.get(request, "") + text

    def result(self, request: int, generation: Generation) -> None:
        self.results[request] = generation
        self.finished.append(request)

    def error(self, request: int, kind: ErrorKind, message: str) -> None:
        self.errors[request] = (kind, message)


class Bench:
    """A step loop on a context of its own."""

    def __init__(
        self, model: llama.Model, options: BackendOptions, limits: Limits = LIMITS, size: int = CONTEXT
    ) -> None:
        self.model = model
        self.context = llama.Context(model, size, StepLoop.sequences_needed(limits), limits.batch, options)
        self.heard = Recorder()
        self.loop = StepLoop(model.vocabulary, self.context, limits, self.heard)
        self._number = 0

    def submit(self, text: str, *, max_tokens: int = 12, schema: dict[str, Any] | None = None, **fields: Any) -> int:
        self._number += 1
        now = time.monotonic()
        sampling = SamplingParameters(**{key: fields.pop(key) for key in ("temperature", "top_p") if key in fields})
        rules = None
        if schema is not None:
            rules = llama.Grammar(self.model.vocabulary, grammar.grammar_for(schema))
            least = grammar.smallest_answer(schema)
            fields["closing"] = len(self.model.vocabulary.tokenize(least, control=False)) + 12
        defaults: dict[str, Any] = {"tenant": "t", "seed": 1, "priority": "batch", "deadline": now + 600}
        sequence = Sequence(
            request=self._number,
            prompt=np.array(self.model.vocabulary.tokenize(text, control=True), np.int32),
            max_tokens=max_tokens,
            sampling=sampling,
            arrived=now,
            rules=rules,
            wants_json=schema is not None,
            schema=schema,
            **{**defaults, **fields},
        )
        self.loop.submit(sequence)
        return self._number

    def run(self, steps: int = 5000) -> Recorder:
        for _ in range(steps):
            if not self.loop.step() and self.loop.idle:
                return self.heard
        raise AssertionError("the loop does not come to rest")


@pytest.fixture
def bench(model: llama.Model, options: BackendOptions) -> Iterator[Bench]:
    made = Bench(model, options)
    yield made
    made.context.close()


def test_greedy_answers_are_the_librarys_own(chat_path: Path, bench: Bench) -> None:
    prompts = [
        "The capital of France is",
        "<|im_start|>user\nName three colours.<|im_end|>\n<|im_start|>assistant\n",
        "def fibonacci(n):\n",
    ]
    # With the same attention: another one rounds otherwise, and the likeliest two tokens are often nearly alike.
    library = llama_cpp.Llama(
        str(chat_path), n_ctx=CONTEXT, n_batch=256, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False
    )
    for prompt in prompts:
        number = bench.submit(prompt, max_tokens=24)
        answer = bench.run().results[number]
        expected: list[int] = []
        for token in library.generate(
            library.tokenize(prompt.encode(), add_bos=False, special=True), temp=0.0, repeat_penalty=1.0
        ):
            if token in bench.model.vocabulary.ends or len(expected) == 24:
                break
            expected.append(token)
        assert answer.text == library.detokenize(expected).decode()
        assert answer.completion_tokens == len(expected)


def _distant_words() -> list[str]:
    """4,216 words of three syllables, of which each two differ in two at least; none is another in disorder.

    So a word said wrongly, in a loop or from its middle, as small models do, is no other one.
    """
    syllables = [f"{a}{b}" for a in "bdfgklmnprstvz" for b in "aeiou"]
    size = len(syllables)
    codes = {(a, b, (a + 3 * b) % size) for a, b in itertools.permutations(range(size), 2)}
    apart = [
        code for code in sorted(codes) if len(set(code)) == 3 and codes & {*itertools.permutations(code)} == {code}
    ]
    return ["".join(syllables[part] for part in code) for code in apart]


def test_no_sequence_ever_sees_anothers_words(model: llama.Model, options: BackendOptions) -> None:
    # A prompt that repeats a word makes the model go on repeating it, so whatever it sees it says. Sequences are mixed,
    # cancelled, kept, shared within a tenant and evicted all the while: the context holds but a few of them.
    bench = Bench(model, options, size=768)
    chance = random.Random(SEED)
    words: dict[int, str] = {}
    cancelled: set[int] = set()
    codes = _distant_words()
    for index, word in enumerate(chance.sample(codes, SEQUENCES)):
        tenant = f"t{index % 3}"
        opening = f"Repeat the code of {tenant} without end, word for word, and say nothing else at all, please. " * 2
        number = bench.submit(opening + f" {word}" * 7, max_tokens=chance.randint(4, 16), tenant=tenant)
        words[number] = word
        if chance.random() < 0.15:
            bench.loop.cancel(number)
            cancelled.add(number)
        for _ in range(chance.randint(0, 6)):
            bench.loop.step()
        if chance.random() < 0.1:
            victim = chance.choice(list(words))
            if victim not in bench.heard.results:
                bench.loop.cancel(victim)
                cancelled.add(victim)
        if chance.random() < 0.05:
            bench.loop.purge(tenant)
    heard = bench.run()
    bench.context.close()
    assert set(heard.results) == set(words) - cancelled
    assert not heard.errors
    faithful = 0
    for number, answer in heard.results.items():
        others = [word for other, word in words.items() if other != number and word in answer.text]
        assert not others, f"{words[number]}: {answer.text!r} has {others}"
        faithful += words[number][:2] in answer.text
    # The test would prove nothing if the model did not repeat what it sees.
    assert faithful > 0.8 * len(heard.results)
    assert bench.loop.counters["cached_prompt_tokens_total"] > 0
    assert bench.loop.counters["evicted_prefixes_total"] > 0


def test_a_kept_prefix_changes_the_answer_within_tolerance_only(model: llama.Model, options: BackendOptions) -> None:
    opening = "You are a careful clerk. Read the letter and answer in one short sentence. " * 4
    letters = ["The bill was", "Thank you for the", "Where is my", "I want to"]

    def answers(prefix_cache: bool) -> list[Generation]:
        limits = Limits(batch=256, sequences=4, reserved_sequences=2, threads=1, prefix_cache=prefix_cache)
        bench = Bench(model, options, limits)
        numbers = []
        for letter in letters:
            numbers.append(bench.submit(opening + letter, max_tokens=1, logprobs=5))
            bench.run()
        bench.context.close()
        return [bench.heard.results[number] for number in numbers]

    with_cache, without = answers(prefix_cache=True), answers(prefix_cache=False)
    assert [answer.cached_tokens > 40 for answer in with_cache] == [False, True, True, True]
    assert not any(answer.cached_tokens for answer in without)
    for one, other in zip(with_cache, without, strict=True):
        assert one.logprobs is not None
        assert other.logprobs is not None
        ours, theirs = dict(one.logprobs[0].top), dict(other.logprobs[0].top)
        common = ours.keys() & theirs.keys()
        assert len(common) >= 3
        # Long prompts go through OpenBLAS in float32, short ones through ggml's 8-bit products: that much apart.
        assert all(abs(ours[token] - theirs[token]) < 0.3 for token in common)


def test_neighbours_that_begin_alike_compute_the_beginning_once(bench: Bench) -> None:
    opening = "The same long instructions for everybody who comes here today. " * 10
    numbers = [bench.submit(f"{opening} Number {index}.", max_tokens=2) for index in range(8)]
    results = bench.run().results
    assert sum(results[number].cached_tokens == 0 for number in numbers) == 1


def test_tenants_never_share_a_beginning(bench: Bench) -> None:
    opening = "The same long instructions for everybody who comes here today. " * 10
    numbers = [bench.submit(opening, max_tokens=2, tenant=f"t{index}") for index in range(3)]
    numbers.append(bench.submit(opening, max_tokens=2, tenant="t0"))
    results = bench.run().results
    assert [results[number].cached_tokens > 0 for number in numbers] == [False, False, False, True]


def test_a_purged_tenants_beginning_is_computed_again(bench: Bench) -> None:
    opening = "The same long instructions for everybody who comes here today. " * 10
    bench.submit(opening, max_tokens=2)
    bench.run()
    bench.loop.purge("t")
    assert bench.loop.gauges()["kept_prefixes"] == 0
    number = bench.submit(opening, max_tokens=2)
    assert bench.run().results[number].cached_tokens == 0


def test_nothing_of_a_running_sequence_is_kept_after_a_purge(bench: Bench) -> None:
    bench.submit("The same long instructions for everybody who comes here today. " * 10, max_tokens=8)
    bench.loop.step()
    bench.loop.purge("t")
    bench.run()
    assert bench.loop.gauges()["kept_prefixes"] == 0


def test_nothing_of_a_waiting_sequence_is_kept_after_a_purge(bench: Bench) -> None:
    bench.submit("The same long instructions for everybody who comes here today. " * 10, max_tokens=8)
    bench.loop.purge("t")
    bench.run()
    assert bench.loop.gauges()["kept_prefixes"] == 0


def test_a_conversations_next_turn_begins_where_the_last_one_ended(bench: Bench) -> None:
    first = "<|im_start|>user\nTell me about the sea, in a few words and no more.<|im_end|>\n<|im_start|>assistant\n"
    number = bench.submit(first, max_tokens=16, priority="interactive")
    answer = bench.run().results[number]
    follow_up = f"{first}{answer.text}<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n<|im_start|>assistant\n"
    number = bench.submit(follow_up, max_tokens=4, priority="interactive")
    assert bench.run().results[number].cached_tokens >= answer.prompt_tokens + 8


def test_user_waiting_requests_are_served_before_batch_work_that_came_first(bench: Bench) -> None:
    batch = [bench.submit(f"Count: {index}", max_tokens=12, tenant=f"b{index}") for index in range(12)]
    interactive = bench.submit("Hello", max_tokens=3, priority="interactive")
    finished = bench.run().finished
    assert finished.index(interactive) < finished.index(batch[0])


def test_batch_work_goes_on_under_a_flood_of_user_waiting_requests(bench: Bench) -> None:
    for _ in range(60):
        bench.submit("Hello there", max_tokens=6, priority="interactive")
    batch = bench.submit("Count:", max_tokens=6)
    finished = bench.run().finished
    assert finished.index(batch) < 15


def test_more_than_fits_waits_its_turn_and_is_done(bench: Bench) -> None:
    # Each may come to need a third of the context, so they cannot all be in it at once.
    numbers = [bench.submit(f"Say {index}.", max_tokens=440, tenant=f"t{index}", stop=(" ",)) for index in range(8)]
    bench.loop.step()
    assert bench.loop.gauges()["waiting_batch"] == 5
    assert set(bench.run().results) == set(numbers)
    assert bench.loop.gauges()["context_cells_reserved"] == 0


def test_a_cancelled_sequence_gives_its_memory_back_and_is_not_heard_of(bench: Bench) -> None:
    running, waiting = bench.submit("Tell a long story.", max_tokens=400), bench.submit("Another.", max_tokens=1200)
    for _ in range(5):
        bench.loop.step()
    bench.loop.cancel(running)
    bench.loop.cancel(waiting)
    heard = bench.run()
    assert not heard.results
    assert not heard.errors
    assert bench.loop.gauges()["context_cells_reserved"] == 0


def test_a_deadline_ends_waiting_and_running_sequences(bench: Bench) -> None:
    now = time.monotonic()
    late = bench.submit("Hello", deadline=now - 1)
    slow = bench.submit("one two three four " * 6, max_tokens=1000, deadline=now + 0.3)
    heard = bench.run()
    assert heard.errors[late][0] == "deadline"
    assert "while it waited" in heard.errors[late][1]
    assert heard.errors[slow][0] == "deadline"


def test_babble_ends_at_its_limit(bench: Bench) -> None:
    number = bench.submit("one two three four one two three four one two three four", max_tokens=17)
    answer = bench.run().results[number]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 17)


def test_a_stop_text_ends_the_answer_before_it_and_is_never_streamed(bench: Bench) -> None:
    number = bench.submit("1, 2, 3, 4, 5,", max_tokens=30, stop=(" 9,", "nowhere"), stream=True)
    heard = bench.run()
    assert heard.results[number].text.endswith("8,")
    assert heard.results[number].finish_reason == "stop"
    assert heard.streamed[number] == heard.results[number].text


def test_streamed_text_adds_up_even_where_a_letter_spans_tokens(bench: Bench) -> None:
    number = bench.submit("👋🏽 🧡 👋🏽 🧡 👋🏽 🧡 👋🏽", max_tokens=24, stream=True)
    heard = bench.run()
    assert heard.streamed[number] == heard.results[number].text
    assert len(heard.results[number].text) > 3


def test_log_probabilities_come_with_their_tokens(bench: Bench) -> None:
    number = bench.submit("The capital of France is", max_tokens=4, logprobs=3)
    answer = bench.run().results[number]
    assert answer.logprobs is not None
    assert "".join(entry.text for entry in answer.logprobs) == answer.text
    assert all(len(entry.top) == 3 and entry.top[0] == (entry.text, entry.logprob) for entry in answer.logprobs)


def test_the_same_seed_gives_the_same_answer(bench: Bench) -> None:
    def answer(seed: int) -> str:
        number = bench.submit("Once upon a time", max_tokens=12, temperature=1.2, seed=seed)
        return bench.run().results[number].text

    assert answer(3) == answer(3)
    assert answer(3) != answer(4)


ORDER = {
    "type": "object",
    "properties": {
        "customer": {"type": "string"},
        "items": {"type": "array", "items": {"type": "string"}},
        "urgent": {"type": "boolean"},
        "mood": {"enum": ["calm", "annoyed", "furious"]},
    },
    "required": ["customer", "items", "urgent", "mood"],
}


def test_answers_by_schema_are_whole_within_their_limit_however_the_model_rambles(bench: Bench) -> None:
    numbers = [
        bench.submit(f"Describe order {seed} in JSON: ", max_tokens=56, temperature=1.8, seed=seed, schema=ORDER)
        for seed in range(12)
    ]
    heard = bench.run()
    assert set(heard.results) == set(numbers)
    for answer in heard.results.values():
        assert set(answer.parsed) == set(ORDER["required"])


def test_a_schema_that_nothing_can_meet_fails_closed(bench: Bench) -> None:
    impossible = {"type": "integer", "minimum": 5, "maximum": 4}
    number = bench.submit("A number: ", schema=impossible)
    heard = bench.run()
    assert heard.errors[number][0] == "invalid_output"
    assert number not in heard.results


def test_a_schema_that_needs_more_than_the_limit_fails_closed(bench: Bench) -> None:
    number = bench.submit("Order: ", max_tokens=3, schema=ORDER)
    assert bench.run().errors[number][0] == "invalid_output"


def test_a_resumed_answer_goes_on_after_what_was_sent(bench: Bench) -> None:
    first = bench.submit("The sea is", max_tokens=16)
    whole = bench.run().results[first]
    sent = bench.model.vocabulary.tokenize(whole.text, control=False)[:6]
    again = bench.submit("The sea is", max_tokens=16, resumed=tuple(sent), stream=True)
    heard = bench.run()
    beginning = b"".join(bench.model.vocabulary.piece(token) for token in sent).decode()
    assert heard.results[again].text == beginning + heard.streamed[again]
    assert heard.results[again].completion_tokens == 16
    assert heard.results[again].prompt_tokens == whole.prompt_tokens
