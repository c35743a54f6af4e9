"""Continuous batching: all live sequences go forward together, one `llama_decode` a step.

A step takes one token of every sequence that is answering, fills the rest of the batch with prompt pieces of those that
are not there yet, computes, and chooses each next token. Sequences come and go between steps (Yu et al., "Orca", 2022;
chunked prefill: Agrawal et al., "Sarathi", 2023). A sequence is admitted when its whole need (prompt and longest
answer) fits into the context memory, so nothing that was admitted ever runs out of it.
"""

from __future__ import annotations

import codecs
import itertools
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from quern.inference import grammar, sampling
from quern.inference.llama import Batch, Context, Grammar, LlamaError, NoRoomError, Vocabulary
from quern.inference.pace import ThreadPace, thread_choices
from quern.inference.prefixes import SHORTEST, Prefix, PrefixCache, Tokens, common_length
from quern.inference.protocol import ErrorKind, Generation, Priority, TokenLogprob

#: Kept beginnings at most.
KEPT_PREFIXES = 16
_GREEDY = sampling.SamplingParameters()
#: How far into a queue to look for one that need not wait for a neighbour's prompt.
LOOK_AHEAD = 32


class Listener(Protocol):
    """Who hears what becomes of the sequences. Called from the step loop's thread."""

    def token(
        self, request: int, text: str, count: int, tokens: Many[int], logprobs: list[TokenLogprob] | None
    ) -> None:
        """More of a streamed answer."""

    def result(self, request: int, generation: Generation) -> None:
        """An answer is complete."""

    def error(self, request: int, kind: ErrorKind, message: str) -> None:
        """There will be no answer."""


@dataclass(frozen=True)
class Limits:
    """How much may go on at once. Sizes in tokens; `threads` at most, fewer while others want the cores."""

    batch: int
    sequences: int
    reserved_sequences: int
    threads: int
    prefix_cache: bool = True
    adapt_threads: bool = True


@dataclass(eq=False)
class Sequence:
    """A request on its way. Times are `time.monotonic()` seconds.

    `resumed`: tokens of the answer that were sent before the model's process died; they are computed again, not chosen.
    """

    request: int
    tenant: str
    prompt: Tokens
    max_tokens: int
    sampling: sampling.SamplingParameters
    seed: int
    priority: Priority
    deadline: float
    arrived: float
    model: str = ""
    stop: Many[str] = ()
    stream: bool = False
    logprobs: int | None = None
    rules: Grammar | None = None
    wants_json: bool = False
    schema: dict[str, Any] | None = None
    closing: int = 0
    resumed: Many[int] = ()

    slot: int = -1
    past: int = 0
    answer: list[int] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    sent_tokens: int = 0
    told_logprobs: list[TokenLogprob] = field(default_factory=list)
    borrowed: Prefix | None = None
    lent: Prefix | None = None
    cached: int = 0
    charge: int = 0
    admitted: float = 0.0
    first_token: float = 0.0
    cancelled: bool = False
    forgotten: bool = False

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        if len(self.resumed):
            self.prompt = np.concatenate([self.prompt, np.asarray(self.resumed, np.int32)])
        self.asked = len(self.prompt) - len(self.resumed)
        self.hold_back = max((len(text) for text in self.stop), default=1) - 1

    @property
    def prompt_left(self) -> int:
        """Prompt tokens that are not computed yet."""
        return max(0, len(self.prompt) - self.past)

    @property
    def need(self) -> int:
        """Context memory that it may come to, in tokens."""
        return self.asked + self.max_tokens


class StepLoop:
    """The sequences of one context. Not safe to share between threads: one thread calls everything."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        context: Context,
        limits: Limits,
        listener: Listener,
        before_step: Callable[[Many[int]], None] = lambda _: None,
    ) -> None:
        self._vocabulary, self._context, self._limits, self._listener = vocabulary, context, limits, listener
        self._before_step = before_step
        self._batch = Batch(limits.batch)
        self._pace = ThreadPace(thread_choices(limits.threads) if limits.adapt_threads else (limits.threads,))
        self._waiting: dict[Priority, deque[Sequence]] = {"interactive": deque(), "batch": deque()}
        self._live: list[Sequence] = []
        places = limits.sequences + limits.reserved_sequences
        self._free = list(range(places + KEPT_PREFIXES))[::-1]
        self._kept = PrefixCache(KEPT_PREFIXES)
        self._used = 0
        self._closers = {inside: self._find_closers('"' if inside else '}]"') for inside in (False, True)}
        pieces = [vocabulary.piece(token) for token in range(vocabulary.size)]
        self._first_bytes = sampling.FirstBytes(pieces, vocabulary.ends)
        self._blanks = np.array([token for token, piece in enumerate(pieces) if not piece.strip()], np.int32)
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "steps_total",
                "step_seconds_total",
                "sampling_seconds_total",
                "prompt_tokens_total",
                "cached_prompt_tokens_total",
                "completion_tokens_total",
                "admitted_total",
                "cancelled_total",
                "deadlines_total",
                "evicted_prefixes_total",
            ),
            0.0,
        )

    @staticmethod
    def sequences_needed(limits: Limits) -> int:
        """How many sequences the context must be made for."""
        return limits.sequences + limits.reserved_sequences + KEPT_PREFIXES

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self._live and not any(self._waiting.values())

    def gauges(self) -> dict[str, float]:
        """How things stand now."""
        return {
            "live_sequences": len(self._live),
            "waiting_interactive": len(self._waiting["interactive"]),
            "waiting_batch": len(self._waiting["batch"]),
            "context_cells": self._context.size,
            "context_cells_reserved": self._used,
            "context_cells_kept": self._kept.cells,
            "kept_prefixes": len(self._kept),
        }

    def submit(self, sequence: Sequence) -> None:
        """Take a sequence in; it is admitted when there is room."""
        self._waiting[sequence.priority].append(sequence)

    def cancel(self, request: int) -> None:
        """Drop a request at the next step; nobody hears of it again."""
        for sequence in [*self._live, *self._waiting["interactive"], *self._waiting["batch"]]:
            if sequence.request == request:
                sequence.cancelled = True

    def purge(self, tenant: str) -> None:
        """Forget what is kept of a tenant, and keep nothing of its sequences that run or wait."""
        for prefix in self._kept.purge(tenant):
            self._release(prefix)
        for sequence in [*self._live, *self._waiting["interactive"], *self._waiting["batch"]]:
            if sequence.tenant == tenant:
                sequence.forgotten = True

    def step(self) -> bool:
        """Go one step forward; False when there is nothing to do."""
        self._drop_lapsed()
        self._admit()
        rows = self._fill()
        if not self._batch.size:
            return False
        self._before_step([sequence.request for sequence in self._live])
        threads = self._pace.choose(self._batch.size)
        self._context.use_threads(threads)
        started = time.perf_counter()
        self._compute()
        computed = time.perf_counter()
        self._pace.observe(self._batch.size, threads, computed - started)
        self.counters["steps_total"] += 1
        self.counters["step_seconds_total"] += computed - started
        if rows:
            self._choose(rows)
            self.counters["sampling_seconds_total"] += time.perf_counter() - computed
        return True

    # ---- coming and going

    def _drop_lapsed(self) -> None:
        now = time.monotonic()
        for queue in self._waiting.values():
            if any(sequence.cancelled or sequence.deadline <= now for sequence in queue):
                kept = [sequence for sequence in queue if not self._lapsed(sequence, now)]
                queue.clear()
                queue.extend(kept)
        for sequence in [sequence for sequence in self._live if self._lapsed(sequence, now)]:
            self._leave(sequence, keep=False)

    def _lapsed(self, sequence: Sequence, now: float) -> bool:
        if sequence.cancelled:
            self.counters["cancelled_total"] += 1
        elif sequence.deadline <= now:
            self.counters["deadlines_total"] += 1
            state = f"after {len(sequence.answer)} tokens" if sequence.slot >= 0 else "while it waited"
            self._listener.error(sequence.request, "deadline", f"the deadline passed {state}")
        else:
            return False
        if sequence.slot < 0 and sequence.rules:
            sequence.rules.close()
        return True

    def _admit(self) -> None:
        # User-waiting requests first; but when batch work waits, one place is always left to it.
        interactive, batch = self._waiting["interactive"], self._waiting["batch"]
        places = self._limits.sequences + self._limits.reserved_sequences
        live_batch = sum(sequence.priority == "batch" for sequence in self._live)
        live_interactive = len(self._live) - live_batch
        left_to_batch = 1 if batch and not live_batch else 0
        while interactive and live_interactive + live_batch < places - left_to_batch and self._take(interactive, 0):
            live_interactive += 1
        # Batch work leaves an eighth of the memory to user-waiting requests, unless it is alone and needs it all.
        while batch and live_batch < self._limits.sequences and len(self._live) < places:
            if not self._take(batch, self._context.size // 8 if self._live else 0):
                break
            live_batch += 1

    def _take(self, queue: deque[Sequence], spare: int) -> bool:
        """Admit the first that need not wait for a neighbour's prompt; False when there is none or no room."""
        for index, sequence in enumerate(itertools.islice(queue, LOOK_AHEAD)):
            prefix, length, soon = self._source(sequence)
            if soon > length:
                # A neighbour computes the same beginning right now: with it done, this one starts far ahead.
                continue
            charge = sequence.need - length
            if prefix is not None:
                self._kept.borrow(prefix)  # first, so that making room does not let go of it
            if not self._make_room(charge, spare):
                if prefix is not None:
                    self._give_back(prefix)
                return False
            del queue[index]
            self._enter(sequence, prefix, length, charge)
            return True
        return False

    def _source(self, sequence: Sequence) -> tuple[Prefix | None, int, int]:
        """What a sequence may begin with: a kept or lent prefix, its length, and what a neighbour will soon have."""
        if not self._limits.prefix_cache or sequence.forgotten:
            return None, 0, 0
        prefix, length = self._kept.best(sequence.tenant, sequence.prompt)
        soon, lender = 0, None
        for other in self._live:
            if other.tenant != sequence.tenant or other.forgotten:
                continue
            shared = min(common_length(other.prompt, sequence.prompt), len(sequence.prompt) - 1)
            if shared < SHORTEST:
                continue
            if other.past >= shared:
                if shared > length:
                    prefix, length, lender = None, shared, other
            else:
                soon = max(soon, shared)
        if lender is not None:
            if lender.lent is None:
                lender.lent = Prefix(lender.tenant, lender.prompt[:length], lender.slot)
            elif len(lender.lent.tokens) < length:
                lender.lent.tokens = lender.prompt[:length]
            prefix = lender.lent
        return prefix, length, soon

    def _make_room(self, charge: int, spare: int) -> bool:
        while self._used + self._kept.cells + charge > self._context.size - spare or not self._free:
            if self._used + charge > self._context.size - spare:
                return False
            evicted = self._kept.evict()
            if evicted is None:
                return False
            self._release(evicted)
        return True

    def _enter(self, sequence: Sequence, prefix: Prefix | None, length: int, charge: int) -> None:
        sequence.slot = self._free.pop()
        sequence.charge = charge
        self._used += charge
        if prefix is not None:
            self._context.share(prefix.sequence, sequence.slot, length)
            sequence.borrowed, sequence.past, sequence.cached = prefix, length, length
            if (
                prefix.hits == 1
                and prefix.users == 1
                and prefix.sequence not in self._slots()
                and length < len(prefix.tokens)
            ):
                # Used for the first time, and only this far: the rest was one prompt's own.
                self._context.cut(prefix.sequence, length)
                prefix.tokens = prefix.tokens[:length]
        sequence.admitted = time.monotonic()
        self.counters["admitted_total"] += 1
        self.counters["prompt_tokens_total"] += sequence.asked
        self.counters["cached_prompt_tokens_total"] += sequence.cached
        self._live.append(sequence)

    def _slots(self) -> set[int]:
        return {sequence.slot for sequence in self._live}

    def _leave(self, sequence: Sequence, *, keep: bool) -> None:
        self._live.remove(sequence)
        self._used -= sequence.charge
        if sequence.rules:
            sequence.rules.close()
        if sequence.borrowed is not None:
            self._give_back(sequence.borrowed)
        lent = sequence.lent
        if lent is not None and (lent.users or (keep and not sequence.forgotten)):
            lent.doomed = sequence.forgotten
            self._keep(lent)
        elif keep and not sequence.forgotten and self._is_worth_keeping(sequence):
            tokens = sequence.prompt[: min(sequence.past, len(sequence.prompt))]
            if sequence.priority == "interactive":
                # The next turn of a conversation begins with this one's answer, too.
                answer = np.asarray(sequence.answer, np.int32)
                tokens = np.concatenate([sequence.prompt[: sequence.asked], answer])[: sequence.past]
            self._keep(Prefix(sequence.tenant, tokens, sequence.slot))
        else:
            self._context.forget(sequence.slot)
            self._free.append(sequence.slot)

    def _is_worth_keeping(self, sequence: Sequence) -> bool:
        if not self._limits.prefix_cache or sequence.past < SHORTEST:
            return False
        # A batch prompt that began with a kept prefix has nothing else that others would begin with.
        return sequence.priority == "interactive" or sequence.borrowed is None

    def _keep(self, prefix: Prefix) -> None:
        self._context.cut(prefix.sequence, len(prefix.tokens))
        evicted = self._kept.keep(prefix)
        if evicted is not None:
            self._release(evicted)
        while self._used + self._kept.cells > self._context.size:
            evicted = self._kept.evict()
            if evicted is None:
                break
            self._release(evicted)

    def _give_back(self, prefix: Prefix) -> None:
        gone = self._kept.give_back(prefix)
        if gone is not None:
            self._release(gone)

    def _release(self, prefix: Prefix) -> None:
        self._context.forget(prefix.sequence)
        self._free.append(prefix.sequence)
        self.counters["evicted_prefixes_total"] += 1

    # ---- one step

    def _fill(self) -> list[tuple[Sequence, int]]:
        batch = self._batch
        batch.clear()
        rows: list[tuple[Sequence, int]] = []
        for sequence in self._live:
            if not sequence.prompt_left and sequence.answer:
                rows.append(
                    (sequence, batch.add(sequence.answer[-1:], sequence.past, sequence.slot, wants_logits=True))
                )
                sequence.past += 1
        unread = [sequence for sequence in self._live if sequence.prompt_left > 0 and not sequence.answer]
        for sequence in sorted(unread, key=lambda sequence: (sequence.priority != "interactive", sequence.admitted)):
            if not batch.room:
                break
            piece = sequence.prompt[sequence.past : sequence.past + batch.room]
            last = len(piece) == sequence.prompt_left
            row = batch.add(piece, sequence.past, sequence.slot, wants_logits=last)
            sequence.past += len(piece)
            if last:
                rows.append((sequence, row))
        return rows

    def _compute(self) -> None:
        try:
            self._context.decode(self._batch)
        except NoRoomError:
            # The bookkeeping counts shared cells more than once, never less: only scattered cells can lead here.
            while (evicted := self._kept.evict()) is not None:
                self._release(evicted)
            self._context.decode(self._batch)

    def _choose(self, rows: list[tuple[Sequence, int]]) -> None:
        for sequence, row in rows:
            logits = self._context.logits(row)
            try:
                self._advance(sequence, logits)
            except sampling.NothingAllowedError:
                self._fail(sequence, "invalid_output", "the grammar of this schema allows no token here")
            except grammar.AnswerRefusedError as error:
                self._fail(sequence, "invalid_output", str(error))

    def _advance(self, sequence: Sequence, logits: NDArray[np.float32]) -> None:
        now = time.monotonic()
        if not sequence.answer:
            sequence.first_token = now
            for token in sequence.resumed:  # sent before; only caught up with
                self._take_in(sequence, token)
                sequence.random.random()
            sequence.sent, sequence.sent_tokens = len(sequence.text), len(sequence.answer)
        adjusted = sampling.adjust(logits, sequence.sampling, sequence.answer)
        token = self._pick(sequence, adjusted)
        if np.isnan(logits[token]):
            raise LlamaError("the model computes numbers that are none")
        self.counters["completion_tokens_total"] += 1
        if token in self._vocabulary.ends:
            sequence.text += sequence.decoder.decode(b"", final=True)
            self._finish(sequence, "stop")
            return
        if sequence.logprobs is not None:
            value, best = sampling.log_probabilities(logits, token, sequence.logprobs)
            named = [(self._vocabulary.text(other), probability) for other, probability in best]
            sequence.told_logprobs.append(TokenLogprob(text=self._vocabulary.text(token), logprob=value, top=named))
        self._take_in(sequence, token)
        if (cut := self._stop_at(sequence)) is not None:
            sequence.text = sequence.text[:cut]
            self._finish(sequence, "stop")
        elif len(sequence.answer) >= sequence.max_tokens:
            self._finish(sequence, "length")
        elif sequence.stream:
            self._send(sequence, len(sequence.text) - sequence.hold_back)

    def _take_in(self, sequence: Sequence, token: int) -> None:
        sequence.answer.append(token)
        sequence.text += sequence.decoder.decode(self._vocabulary.piece(token))
        if sequence.rules:
            sequence.rules.accept(token)

    def _pick(self, sequence: Sequence, logits: NDArray[np.float32]) -> int:
        rules = sequence.rules
        if rules is not None and sequence.max_tokens - len(sequence.answer) <= sequence.closing:
            # The answer must be whole within its last tokens: whatever closes what is open comes first.
            closers = self._closers[grammar.ends_within_string(sequence.text)]
            allowed = closers[rules.allowed(closers)]
            if len(allowed):
                return int(allowed[0])
            logits = logits.copy()
            logits[self._blanks] = -np.inf
            return sampling.choose(logits, _GREEDY, sequence.random, rules, self._first_bytes)
        return sampling.choose(logits, sequence.sampling, sequence.random, rules, self._first_bytes)

    def _find_closers(self, characters: str) -> NDArray[np.int32]:
        tokens = [self._vocabulary.tokenize(character, control=False) for character in characters]
        return np.array([*self._vocabulary.ends, *(found[0] for found in tokens if len(found) == 1)], np.int32)

    def _stop_at(self, sequence: Sequence) -> int | None:
        found = [sequence.text.find(text, max(0, sequence.sent - len(text))) for text in sequence.stop]
        return min((place for place in found if place >= 0), default=None)

    def _send(self, sequence: Sequence, end: int) -> None:
        if end <= sequence.sent and len(sequence.answer) == sequence.sent_tokens:
            return
        end = max(end, sequence.sent)
        new = sequence.answer[sequence.sent_tokens :]
        told = (
            sequence.told_logprobs[len(sequence.told_logprobs) - len(new) :]
            if sequence.logprobs is not None and new
            else None
        )
        self._listener.token(sequence.request, sequence.text[sequence.sent : end], len(sequence.answer), new, told)
        sequence.sent, sequence.sent_tokens = end, len(sequence.answer)

    def _finish(self, sequence: Sequence, reason: Literal["stop", "length"]) -> None:
        parsed = grammar.parse_answer(sequence.text, sequence.schema) if sequence.wants_json else None
        if sequence.stream:
            self._send(sequence, len(sequence.text))
        now = time.monotonic()
        generation = Generation(
            text=sequence.text,
            finish_reason=reason,
            parsed=parsed,
            model=sequence.model,
            seed=sequence.seed,
            prompt_tokens=sequence.asked,
            cached_tokens=min(sequence.cached, sequence.asked),
            completion_tokens=len(sequence.answer),
            waited=sequence.admitted - sequence.arrived,
            prompt_time=sequence.first_token - sequence.admitted,
            completion_time=now - sequence.first_token,
            logprobs=sequence.told_logprobs if sequence.logprobs is not None else None,
        )
        self._leave(sequence, keep=True)
        self._listener.result(sequence.request, generation)

    def _fail(self, sequence: Sequence, kind: ErrorKind, message: str) -> None:
        self._leave(sequence, keep=True)
        self._listener.error(sequence.request, kind, message)
