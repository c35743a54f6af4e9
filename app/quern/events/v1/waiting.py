"""From a request that is durable to its answer: whole, or as it is made."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass

from quart import Response, request

from quern.events import sse
from quern.events.exchange import held
from quern.events.hub import Subscription
from quern.events.v1.desk import Desk, reply
from quern.events.v1.feeds import Feed
from quern.inference.protocol import TokenLogprob
from quern.openai import answer, ledger
from quern.openai.answer import Shape
from quern.openai.error import ApiError
from quern.openai.ledger import Asked
from quern.openai.outcome import Failure, Outcome, Record

#: How long the head of a stream waits for its first word, so that an early failure gets a status of its own.
_FIRST_WORD_SECONDS = 5.0


async def whole(desk: Desk, asked: Asked, headers: dict[str, str]) -> Response:
    """The answer, once there is one.

    Raises:
        ApiError: the request failed, was cancelled, or took too long.
    """
    done = desk.attend(asked)
    subscription = held(request.scope).enter_context(desk.edge.hub.subscribe(asked.job_id))
    try:
        async with asyncio.timeout(desk.settings.wait_seconds):
            while not _ended(subscription):
                if desk.edge.hub.draining:
                    raise ApiError(503, "The server is restarting.", code="restarting", headers={"Retry-After": "2"})
                await subscription.changed()
    except TimeoutError:
        seconds = desk.settings.wait_seconds
        raise ApiError(504, f"No answer within {seconds:g} s; the request was cancelled.", code="timeout") from None
    done()
    return reply(await desk.run(_shown, desk, asked), headers=headers)


def _shown(desk: Desk, asked: Asked) -> answer.Json:
    ended = ledger.get(desk.db, asked.tenant, asked.id)
    failure = _failure(ended)
    if ended is None or failure is not None:
        failure = failure or _GONE
        raise ApiError(failure.status, failure.message, code=failure.code, param=failure.param)
    return answer.whole(ended)


_GONE = Failure(status=404, message="The request was deleted.", code="not_found")


def _failure(ended: Asked | None) -> Failure | None:
    """What to tell a client whose request did not succeed."""
    if ended is None:
        return _GONE
    if ended.outcome is not None:
        return None
    if ended.state == "cancelled":
        return Failure(status=400, message="The request was cancelled.", code="cancelled")
    return ended.error or Failure(status=500, message="The request failed.", code="server_error")


def _ended(subscription: Subscription) -> bool:
    return subscription.log is not None and subscription.log.ended


@dataclass
class Following:
    """A stream in the making: what was told so far, by choice."""

    desk: Desk
    asked: Asked
    shape: Shape
    feed: Feed
    subscription: Subscription
    done: Callable[[], None]
    count: int = 0

    def __post_init__(self) -> None:
        self._texts: dict[int, str] = {}
        self._tokens: dict[int, int] = {}

    async def stirs(self, seconds: float) -> bool:
        """Wait for more of the answer, or its end; False when neither came within `seconds`."""
        waits = [asyncio.ensure_future(self.feed.bell.wait()), asyncio.ensure_future(self.subscription.changed())]
        try:
            found, _ = await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.feed.bell.clear()
        return bool(found)

    async def frames(self) -> AsyncIterator[bytes]:
        """All that goes over the wire."""
        yield b"".join(self.shape.begin())
        loop = asyncio.get_running_loop()
        limit = loop.time() + self.desk.settings.wait_seconds
        while not _ended(self.subscription):
            if frames := self._fresh():
                yield b"".join(frames)
            if self.feed.lacks(self.count):
                await self.desk.feeds.catch_up(self.feed)
            if self.desk.edge.hub.draining or loop.time() > limit:
                code = "restarting" if self.desk.edge.hub.draining else "timeout"
                message = "The stream ends before the answer does; ask again."
                yield b"".join(self.shape.fail(None, Failure(status=503, message=message, code=code)))
                return
            beat = self.desk.edge.settings.heartbeat * random.uniform(0.7, 1.0)  # noqa: S311 - spreads load
            if not await self.stirs(beat):
                yield await self._sign()
        if frames := self._fresh():
            yield b"".join(frames)
        ended = await self.desk.run(ledger.get, self.desk.db, self.asked.tenant, self.asked.id)
        self.done()
        yield b"".join(self._end(ended))

    def _fresh(self) -> list[bytes]:
        frames = []
        for record in self.feed.after(self.count):
            self.count += 1
            self._note(record)
            frames += self.shape.more(record)
        return frames

    def _note(self, record: Record) -> None:
        for index, text, logprobs in record:
            self._texts[index] = self._texts.get(index, "") + text
            self._tokens[index] = self._tokens.get(index, 0) + len(logprobs or ())

    async def _sign(self) -> bytes:
        """A comment: proof of life, and the place while it waits."""
        if self.count:
            return sse.comment("answering")
        standing = await self.desk.run(self.desk.standing, self.asked.job_id)
        place = standing.get("X-Quern-Queue-Place")
        return sse.comment(f"queued, place {place}" if place else "answering")

    def _end(self, ended: Asked | None) -> list[bytes]:
        failure = _failure(ended)
        if ended is None or failure is not None or ended.outcome is None:
            return self.shape.fail(ended, failure or _GONE)
        rest = self._rest(ended.outcome)
        if rest is None:
            message = "The answer had to be made again and came out differently from what was streamed; ask again."
            return self.shape.fail(None, Failure(status=500, message=message, code="server_error"))
        frames = [frame for record in rest for frame in self.shape.more(record)]
        return frames + self.shape.finish(ended, ended.outcome)

    def _rest(self, outcome: Outcome) -> list[Record] | None:
        """What is still to be told of the answer; None when it does not begin with what was told."""
        for index, text in self._texts.items():
            if not outcome.choices[index].text.startswith(text):
                return None
        records = outcome.records()
        before: dict[int, str] = {}
        for record in records[: self.count]:
            for index, text, _ in record:
                before[index] = before.get(index, "") + text
        if before == {index: text for index, text in self._texts.items() if text} or before == self._texts:
            return records[self.count :]
        rest: Record = []
        for index, choice in enumerate(outcome.choices):
            logprobs: list[TokenLogprob] | None = None
            if choice.logprobs is not None:
                logprobs = choice.logprobs[self._tokens.get(index, 0) :]
            if (text := choice.text[len(self._texts.get(index, "")) :]) or logprobs:
                rest.append((index, text, logprobs))
        return [rest] if rest else []


async def stream(
    desk: Desk, asked: Asked, feed: Feed, headers: dict[str, str], *, after: int = -1, joins: bool = False
) -> Response:
    """The answer as it is made. `feed` has followed the request since before it was durable, or `joins` it now.

    Raises:
        ApiError: the request failed before its first word.
    """
    done = desk.attend(asked)
    subscription = held(request.scope).enter_context(desk.edge.hub.subscribe(asked.job_id))
    following = Following(desk, asked, answer.shape(asked, after), feed, subscription, done)
    if joins:
        await desk.feeds.catch_up(feed)
    else:
        await _first_word(following)
    response = Response(
        following.frames(),
        content_type=sse.CONTENT_TYPE,
        headers={**headers, "Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )
    response.timeout = None
    return response


async def _first_word(following: Following) -> None:
    loop = asyncio.get_running_loop()
    limit = loop.time() + _FIRST_WORD_SECONDS
    while not _ended(following.subscription) and following.feed.is_empty:
        if not await following.stirs(max(0.0, limit - loop.time())):
            return
    if not _ended(following.subscription):
        return
    desk, asked = following.desk, following.asked
    ended = await desk.run(ledger.get, desk.db, asked.tenant, asked.id)
    failure = _failure(ended)
    if failure is not None:
        following.done()
        raise ApiError(failure.status, failure.message, code=failure.code, param=failure.param)


def following_before(desk: Desk, identity: str) -> Feed:
    """Follow a request before it is durable, so that nothing told of it is missed."""
    stack: ExitStack = ExitStack()
    feed = stack.enter_context(desk.feeds.follow(identity))
    held(request.scope).callback(stack.close)
    return feed
