"""A worker: Huey's consumer of one queue, which on each wake-up claims and runs jobs until none is due."""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from huey.consumer import Consumer
from pymongo.errors import PyMongoError

from quern.jobs import backoff, capacity, estimate, queue, wake
from quern.jobs.ends import Ends
from quern.jobs.handler import Context, Handler, Obsolete, Refused, Registry, RetryLater
from quern.jobs.model import CONCURRENCY, Job, Queue, State
from quern.observe import logs, metrics, traces
from quern.store import clock
from quern.store.combine import Combiner
from quern.store.connection import Store, is_away

_log = logging.getLogger(__name__)

#: Seconds between two heartbeats, or a quarter of the lease if that is less.
_BEAT = 2.0
#: Seconds that a stopping worker waits for claims that are on their way.
_LAST_CLAIMS = 5.0
#: Jobs that a process may hold claimed beyond those it runs, for each of its threads (Celery's default is four), while
#: the jobs of its queue take less than _QUICK seconds on the mean: claiming one costs more than doing it, and the
#: interpreter's lock leaves threads nothing to gain. What waits for a network takes longer and is done side by side.
_AHEAD = 3
_QUICK = 0.001
#: Seconds after which a job that was claimed ahead, and stands behind one that is slower than its like, is given back.
_OVERDUE = 0.25
#: Seconds between two batches of quick jobs while they keep coming.
_BREATH = 0.005
#: Seconds that an idle thread waits for a wake-up before it asks again: each asking is a request, and there are many.
ASK_AGAIN = 5.0
#: Seconds between two wake-ups that a busy worker sends for others while it leaves work behind.
_WOKEN = 0.05
_LOST_LEASE = "lost the lease of a job; its next worker does it again"

T = TypeVar("T")


class Leases:
    """The leases that this process holds, and the one thread that keeps them."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Job, threading.Event]] = {}
        self.cancelled: set[str] = set()
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def hold(self, job: Job, stop: threading.Event) -> None:
        with self._lock:
            self._held[job.lease_id] = (job, stop)

    def release(self, job: Job) -> None:
        with self._lock:
            self._held.pop(job.lease_id, None)
            self.cancelled.discard(job.lease_id)

    def held(self) -> list[Job]:
        with self._lock:
            return [job for job, _ in self._held.values()]

    def stop_all(self) -> None:
        """Tell every running handler to give up at its next good place."""
        with self._lock:
            for _, stop in self._held.values():
                stop.set()

    def _beat(self) -> None:
        while True:
            lease = self._store.settings.job.lease
            # More often than a lease needs it: the answer also says who asked to cancel.
            time.sleep(min(lease / 4, _BEAT))
            with self._lock:
                before = dict(self._held)
            if not before:
                continue
            try:
                self._keep(before, lease)
            except PyMongoError as error:
                _log.warning("a heartbeat failed; trying again", extra={"error": type(error).__name__})
            except Exception:
                # Without this thread every lease of the process runs out.
                _log.exception("a heartbeat failed; trying again")

    def _keep(self, before: dict[str, tuple[Job, threading.Event]], lease: float) -> None:
        kept, cancelled = queue.extend(self._store.db, list(before), lease)
        with self._lock:
            for lease_id, (job, stop) in before.items():
                if lease_id not in self._held or stop.is_set():
                    continue
                if lease_id in cancelled:
                    self.cancelled.add(lease_id)
                    stop.set()
                elif lease_id not in kept:
                    metrics.LEASES_LOST.labels(job.queue.value).inc()
                    stop.set()


@dataclass(frozen=True)
class _Held:
    """A job under a lease of this process."""

    job: Job
    stop: threading.Event
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class _Turned:
    """What a thread that asked for a job got."""

    held: _Held | None
    more: bool
    """Whether it is worth asking again."""


@dataclass(frozen=True)
class _Ending:
    end: queue.End
    seconds: float


class Worker:
    """Runs the jobs of one queue until told to stop."""

    def __init__(
        self, store: Store, registry: Registry, waker: wake.Waker, name: Queue, concurrency: int | None = None
    ) -> None:
        self._store, self._registry, self._waker, self._queue = store, registry, waker, name
        self._concurrency = concurrency or CONCURRENCY[name]
        self._leases = Leases(store)
        self._stopping: Callable[[], bool] = lambda: False
        self._name = f"{socket.gethostname()}:{os.getpid()}:{name.value}"
        self._claims = threading.Condition()
        self._claiming = 0
        self._learned: dict[str, float] = {}
        self._claim: Combiner[None, _Turned] = Combiner(self._claim_for)
        self._ahead: deque[_Held] = deque()
        self._ahead_put = threading.Event()
        self._mean = 4 * _QUICK
        self._draining = 0
        self._turnstile = threading.Lock()
        self._queued = False
        self._drained = 0.0
        self._woke = 0.0
        self._ends: Ends[_Ending] = Ends(self._write_ends)

    def run(self, stop: threading.Event | None = None) -> None:
        """Consume until SIGINT (finish what runs, then hand leases back) or SIGTERM (hand them back at once).

        `stop`: set by whoever caught a signal before Huey's consumer took the signals over.
        """
        settings = self._store.settings
        huey = wake.make_huey(self._queue.value, self._store.redis_queue_url, timeout=2 * ASK_AGAIN)
        huey.storage.read_timeout = ASK_AGAIN
        wake.bind(huey, self.drain)
        consumer = Consumer(
            huey,
            workers=self._concurrency,
            periodic=False,
            worker_type="thread",
            initial_delay=0.1,
            backoff=1.5,
            max_delay=2.0,
            scheduler_interval=60,
            shutdown_timeout=settings.job.drain_timeout,
        )
        self._stopping = consumer.stop_flag.is_set
        _log.info(
            "worker started", extra={"queue": self._queue.value, "concurrency": self._concurrency, "pid": os.getpid()}
        )
        threading.Thread(target=self._drain_at_start, name="first drain", daemon=True).start()
        threading.Thread(target=self._announce, name="announcer", daemon=True).start()
        threading.Thread(target=self._watch_ahead, name="ahead", daemon=True).start()
        threading.Thread(target=self._end_waits, args=(consumer.stop_flag,), name="end of waits", daemon=True).start()
        if stop is not None:
            threading.Thread(target=_pass_on, args=(stop, consumer.stop_flag), name="early stop", daemon=True).start()
        consumer.run()
        self._hand_back()
        self._leave()

    def _drain_at_start(self) -> None:
        # Work may have been waiting while no worker lived and its wake-ups were merged or lost.
        self._waker.wake(self._queue.value, self._concurrency)

    def _end_waits(self, stop: threading.Event) -> None:
        """Let the threads that wait for a wake-up see that the worker stops: it ends when all of them have."""
        stop.wait()
        deadline = time.monotonic() + 2 * ASK_AGAIN
        while time.monotonic() < deadline:
            self._waker.wake(self._queue.value, self._concurrency)
            # Another worker of the queue may have taken them.
            time.sleep(0.5)

    def _announce(self) -> None:
        while not self._stopping():
            try:
                capacity.announce(self._store.db, self._name, self._queue.value, self._concurrency)
            except PyMongoError:
                _log.debug("could not announce this worker")
            time.sleep(capacity.EVERY)

    def _leave(self) -> None:
        try:
            capacity.leave(self._store.db, self._name)
        except PyMongoError:
            _log.debug("could not say that this worker left; its announcement runs out")

    def _hand_back(self) -> None:
        with self._claims:
            self._claims.wait_for(lambda: self._claiming == 0, timeout=_LAST_CLAIMS)
        self._ends.flush(_LAST_CLAIMS)
        self._leases.stop_all()
        for job in self._leases.held():
            self._put_back(job, "the worker was stopped")

    def drain(self) -> None:
        """Claim and run until no job is due, and all that ran here is written. What the one Huey task does."""
        quick = self._mean < _QUICK
        with self._claims:
            if quick and self._queued:
                # The thread that waits for the one at work will see what this wake-up announces.
                return
            self._queued |= quick
            self._draining += 1
        # Of quick jobs one thread does a batch while the next one gathers: that costs less than many at once.
        alone = quick and self._turnstile.acquire(timeout=_OVERDUE)
        try:
            if quick:
                self._queued = False
                if not alone:
                    # A slow one after all, or very many: the others help until the mean says quick again.
                    self._mean = 4 * _QUICK
                elif time.monotonic() - self._drained < _BREATH:
                    # Jobs keep coming: fewer and fuller batches.
                    time.sleep(_BREATH)
            self._drain()
            self._drained = time.monotonic()
        finally:
            if alone:
                self._turnstile.release()
            with self._claims:
                self._draining -= 1

    def _drain(self) -> None:
        more = True
        while more or self._ahead:
            asked = time.monotonic()
            held = self._next_ahead()
            if held is None:
                turned = self._ask()
                if turned is None:
                    return
                held, more = turned.held, turned.more
                if held is None:
                    continue
            # What followed from its end, or is to be tried again at once, may wait in this very queue.
            more = self._work(held.job, held.stop, asked) or more
        self._ends.flush()

    def _next_ahead(self) -> _Held | None:
        """A job that was claimed ahead; those that are left when the worker stops are handed back with the others."""
        try:
            return None if self._stopping() else self._ahead.popleft()
        except IndexError:
            return None

    def _ask(self) -> _Turned | None:
        """Claim a job, for this thread and for those that ask meanwhile. None: the worker stops."""
        with self._claims:
            if self._stopping():
                return None
            self._claiming += 1
        try:
            return self._claim(None)
        except PyMongoError as error:
            _log.warning("could not claim; the reconciler will wake us", extra={"error": type(error).__name__})
            return _Turned(None, more=False)
        finally:
            with self._claims:
                self._claiming -= 1
                self._claims.notify_all()

    def _claim_for(self, askers: list[None]) -> list[_Turned]:
        """A job for each of the threads that ask at this moment, and, of quick ones, some that they do next."""
        lease = self._store.settings.job.lease
        wanted = len(askers)
        if self._mean < _QUICK:
            wanted += _AHEAD * self._concurrency
        claimed = queue.claim_many(self._store.db, self._queue.value, lease, wanted)
        held = [_Held(job, threading.Event()) for job in claimed.jobs]
        for one in held:
            self._leases.hold(one.job, one.stop)
        mine, ahead = held[: len(askers)], held[len(askers) :]
        if ahead:
            self._ahead.extend(ahead)
            self._ahead_put.set()
        if claimed.more and claimed.jobs:
            self._wake_another()
        # A thread that got nothing while others did asks again: others were faster at some of them.
        more = claimed.more if not held else True
        return [
            *(_Turned(one, claimed.more) for one in mine),
            *(_Turned(None, more) for _ in range(len(askers) - len(mine))),
        ]

    def _wake_another(self) -> None:
        """There is more to do than was asked for: whoever enqueued it may have sent one wake-up for all of it."""
        now = time.monotonic()
        if self._draining < self._concurrency or now - self._woke > _WOKEN:
            self._woke = now
            self._waker.wake(self._queue.value)

    def _watch_ahead(self) -> None:
        """Give back what was claimed ahead when a job in front of it takes longer than its like."""
        while not self._stopping():
            self._ahead_put.wait(1.0)
            self._ahead_put.clear()
            while self._ahead and not self._stopping():
                time.sleep(_OVERDUE)
                self.give_back_overdue()

    def give_back_overdue(self) -> None:
        """Queue again what was claimed ahead and has not been begun in time, for whoever has a thread to spare."""
        while True:
            try:
                held = self._ahead.popleft()
            except IndexError:
                return
            if time.monotonic() - held.since < _OVERDUE:
                self._ahead.appendleft(held)
                return
            self._put_back(held.job, "the worker was busy")
            self._leases.release(held.job)

    def _put_back(self, job: Job, reason: str) -> None:
        """Queue a job that this worker did not finish, for another one."""
        try:
            if queue.put_back(self._store.db, job, after=0, reason=reason, charged=False):
                self._waker.wake(self._queue.value)
            elif queue.cancel_asked(self._store.db, job):
                self._waker.wake_all(queue.settle(self._store, self._registry, job, State.CANCELLED))
        except queue.LeaseLostError:
            return
        except PyMongoError:
            _log.warning("could not hand a lease back; it runs out by itself", extra={"job": job.id})

    def run_one(self, job: Job) -> None:
        """Run a claimed job and write how it ended."""
        stop = threading.Event()
        self._leases.hold(job, stop)
        self._work(job, stop, time.monotonic())
        self._ends.flush()

    def _work(self, job: Job, stop: threading.Event, asked: float) -> bool:
        """Run a claimed job and see to its end; whether other work may have followed from that."""
        token = logs.request_id.set(job.request_id)
        began = time.monotonic()
        state: str | None = "lost"
        named = {"quern.job": job.id, "quern.queue": job.queue.value}
        traces.ended("claim", job.traceparent, began - asked, **named)
        try:
            with traces.span(f"job {job.kind}", job.traceparent, **named) as parent:
                verdict = self._run(job, Context(self._store, stop, parent))
                state = None if isinstance(verdict, queue.End) else verdict
        finally:
            if state is not None:
                self._leases.release(job)
            logs.request_id.reset(token)
        seconds = time.monotonic() - began
        self._mean += (seconds - self._mean) / 16
        if isinstance(verdict, queue.End):
            self._ends.put(_Ending(verdict, seconds))
        else:
            self._observe(job, verdict, seconds)
        if State.DONE.value == (verdict.state.value if isinstance(verdict, queue.End) else verdict):
            # From the claim on: what stands behind this job waited for that as well.
            self._learn(job, time.monotonic() - asked)
        return not isinstance(verdict, queue.End)

    def _write_ends(self, endings: list[_Ending]) -> None:
        ends, now = [ending.end for ending in endings], clock.now()

        def write() -> list[queue.LeaseLostError | None]:
            return queue.settle_many(self._store, self._registry, ends, now)

        try:
            outcomes = self._persist([end.job for end in ends], write)
        except Exception:
            # A result that cannot be stored, for one; nothing that a job does may end this thread.
            _log.exception("could not write how jobs ended", extra={"jobs": len(endings)})
            outcomes = None
        if outcomes is None and len(endings) > 1:
            # One of them may be what is wrong: the others must not suffer for it.
            for ending in endings:
                self._write_ends([ending])
            return
        for position, ending in enumerate(endings):
            lost = outcomes is None or outcomes[position] is not None
            if outcomes is not None and lost:
                _log.info(_LOST_LEASE, extra={"job": ending.end.job.id})
            self._leases.release(ending.end.job)
            self._observe(ending.end.job, "lost" if lost else ending.end.state.value, ending.seconds)

    def _observe(self, job: Job, state: str, seconds: float) -> None:
        metrics.JOB_SECONDS.labels(job.queue.value, job.kind).observe(seconds)
        metrics.ENDED.labels(job.queue.value, job.kind, state).inc()

    def _learn(self, job: Job, seconds: float) -> None:
        """Keep the mean duration of the kind; a few samples a second are enough, and cost a busy queue nothing."""
        if time.monotonic() - self._learned.get(job.kind, 0.0) < 0.2:
            return
        self._learned[job.kind] = time.monotonic()
        try:
            estimate.learn(self._store.db, job.queue.value, job.kind, seconds)
        except PyMongoError:
            _log.debug("could not keep a duration")

    def _run(self, job: Job, context: Context) -> str | queue.End:
        """Run the handler. Returns how the job ended, once that is durable, or an End that is yet to be written."""
        handler = self._registry.get(job.kind)
        if handler is None:
            return self._retry(
                job, None, RetryLater(f"no handler for {job.kind} in this version", after=10, charged=False)
            )
        if job.deadline is not None and job.deadline < clock.now():
            return self._settle(job, State.DEAD, error="its deadline passed while it waited")
        try:
            result = handler.run(job, context)
        except Refused as verdict:
            return self._settle(job, State.DEAD, error=verdict.reason)
        except Obsolete as verdict:
            return self._settle(job, State.CANCELLED, error=verdict.reason)
        except RetryLater as verdict:
            return self._ended_by_stop(job, context) or self._retry(job, handler, verdict)
        except Exception as error:
            stopped = self._ended_by_stop(job, context)
            if stopped:
                return stopped
            away = is_away(error)
            if not away:
                _log.exception("a job failed", extra={"job": job.id, "kind": job.kind})
            reason = "the database was out of reach" if away else f"unexpected {type(error).__name__}"
            return self._retry(job, handler, RetryLater(reason, charged=not away))
        return self._settle(job, State.DONE, result=result)

    def _ended_by_stop(self, job: Job, context: Context) -> str | queue.End | None:
        """What to do with a handler that failed after it was told to stop: that is no failure of the job."""
        if not context.stop.is_set():
            return None
        if job.lease_id in self._leases.cancelled:
            return self._settle(job, State.CANCELLED)
        return self._retry(job, None, RetryLater("the worker was stopped", after=0, charged=False))

    def _retry(self, job: Job, handler: Handler | None, verdict: RetryLater) -> str | queue.End:
        settings = self._store.settings.job
        most = (handler.max_failures if handler else None) or settings.max_failures
        failures = job.failures + (1 if verdict.charged else 0)
        if verdict.last or (verdict.charged and failures >= most):
            return self._settle(job, State.DEAD, error=verdict.reason)
        after = verdict.after
        if after is None:
            after = backoff.delay(max(failures, 1), settings.backoff_base, settings.backoff_cap)

        def write() -> str:
            if queue.put_back(self._store.db, job, after=after, reason=verdict.reason, charged=verdict.charged):
                return "retry"
            if queue.cancel_asked(self._store.db, job):
                self._waker.wake_all(queue.settle(self._store, self._registry, job, State.CANCELLED))
                return State.CANCELLED.value
            return "lost"

        return self._persist([job], write) or "lost"

    def _settle(
        self, job: Job, state: State, result: dict[str, object] | None = None, error: str | None = None
    ) -> str | queue.End:
        handler = self._registry.get(job.kind)
        if handler is None or handler.on_end is None:
            return queue.End(job, state, result, error)

        def write() -> str:
            opened = queue.settle(self._store, self._registry, job, state, result=result, error=error)
            self._waker.wake_all(opened)
            return state.value

        return self._persist([job], write) or "lost"

    def _persist(self, jobs: list[Job], write: Callable[[], T]) -> T | None:
        """Write an end, again and again while the database is away and our lease can still be held. None: in vain."""
        patience = time.monotonic() + max(30.0, self._store.settings.job.lease)
        while True:
            try:
                return write()
            except queue.LeaseLostError:
                _log.info(_LOST_LEASE, extra={"job": jobs[0].id})
                return None
            except PyMongoError as error:
                if not is_away(error) or time.monotonic() > patience:
                    for job in jobs:
                        _log.exception("could not write how a job ended", extra={"job": job.id, "kind": job.kind})
                    return None
                time.sleep(0.2)


def _pass_on(stop: threading.Event, flag: threading.Event) -> None:
    stop.wait()
    flag.set()
