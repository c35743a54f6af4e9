"""Keeps a model process alive and every request in order through its deaths.

No native code runs here. A request that was in no step when the process died is simply given to the next one. Those
that were are suspects: each runs again alone, and one that kills the process again ends as `crashed`; the others lose
nothing. A stream goes on where it stopped. A process that was killed from outside (`SIGKILL`: an operator, the kernel
out of memory) speaks much less against its requests than one that died of itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from pydantic import BaseModel

from quern.inference import registry, steprecord, tuning
from quern.inference.llama_options import BackendOptions
from quern.inference.protocol import (
    ClassifyRequest,
    CountTokensRequest,
    EmbedRequest,
    ErrorEvent,
    ErrorKind,
    FaultRequest,
    GenerateRequest,
    Health,
    PurgeRequest,
    QueuedEvent,
    ResultEvent,
    ServedModel,
    StatsRequest,
    TokenEvent,
)
from quern.inference.settings import EngineSettings
from quern.inference.watchdog import Watchdog, threads_of

log = logging.getLogger(__name__)

#: A request that ran alone is given up after this many deaths from outside; of a death of itself one is enough.
STRIKES_FROM_OUTSIDE = 6
#: Pauses between starts that fail, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0
#: Deaths while the models are loaded, one after another, that make the engine say so instead of going on in silence.
DEATHS_WHILE_LOADING = 3
WATCH_INTERVAL = 0.5
#: How long after its deadline a request that the model process says nothing of is given up.
DEADLINE_GRACE = 2.0
REPORT_LIMIT = 64 * 1024 * 1024

#: Requests that enter no native code, and so need not wait while a suspect runs alone.
_ASIDE = (StatsRequest, PurgeRequest, FaultRequest)

Event = QueuedEvent | TokenEvent | ResultEvent | ErrorEvent


@dataclass(eq=False)
class Pending:
    """A request that has no answer yet. Times are `time.monotonic()` seconds."""

    number: int
    body: BaseModel
    arrived: float
    deadline: float
    seed: int
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    at_work: bool = False
    killed: int = 0
    sent_tokens: list[int] = field(default_factory=list)
    ended: bool = False
    drop: Callable[[], None] = lambda: None


class Supervisor:
    """The requests to one model process, and that process. Everything runs on one event loop.

    Args:
        on_change: called when the models are loaded or cannot be, and when a request ends.
    """

    def __init__(self, settings: EngineSettings, on_change: Callable[[], None] = lambda: None) -> None:
        self._settings = settings
        self._on_change = on_change
        self._held = False
        self._pending: dict[int, Pending] = {}
        self._suspects: deque[Pending] = deque()
        self._alone: Pending | None = None
        self._numbers = 0
        self._writer: asyncio.StreamWriter | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._record_descriptor = steprecord.create()
        self._record = steprecord.StepRecord(self._record_descriptor)
        self._health = Health(status="starting")
        self._was_ready = False
        self._seconds_each = 0.5
        self._last_end = 0.0
        self._faults: list[dict[str, Any]] = []
        self.counters: dict[str, float] = dict.fromkeys(
            (
                "requests_total",
                "results_total",
                "refused_total",
                "busy_total",
                "crashes_total",
                "given_up_total",
                "hangs_total",
            ),
            0.0,
        )
        self.models: dict[str, registry.Model] = {}

    # ---- what the socket's side calls

    @property
    def health(self) -> Health:
        """Whether the models are loaded."""
        return self._health

    def served(self) -> list[ServedModel]:
        """The models."""
        loaded = self._health.status == "ready"
        return [
            ServedModel(name=model.name, kind=model.kind, context=model.context, licence=model.licence, loaded=loaded)
            for model in self.models.values()
        ]

    def gauges(self) -> dict[str, float]:
        """How things stand now."""
        return {
            "pending_requests": len(self._pending),
            "suspect_requests": len(self._suspects) + (self._alone is not None),
        }

    def submit(self, body: BaseModel) -> Pending | ErrorEvent:
        """Take a request in, or say at once why not."""
        self.counters["requests_total"] += 1
        if (refusal := self._wrong_model(body)) is not None:
            self.counters["refused_total"] += 1
            return refusal
        if self._health.status == "failed":
            return ErrorEvent(kind="unavailable", message=self._health.detail, retry_after=5.0)
        if len(self._pending) >= self._settings.max_waiting:
            self.counters["busy_total"] += 1
            wait = min(60.0, max(1.0, self._seconds_each * self._settings.max_waiting / 10))
            message = f"expected fewer than {self._settings.max_waiting} requests at once, found {len(self._pending)}"
            return ErrorEvent(kind="busy", message=message, retry_after=round(wait, 1))
        now = time.monotonic()
        seconds = getattr(body, "deadline", None) or self._settings.default_deadline
        seed = getattr(body, "seed", None)
        self._numbers += 1
        pending = Pending(self._numbers, body, now, now + seconds, secrets.randbits(62) if seed is None else seed)
        pending.drop = lambda: self.drop(pending)
        self._pending[pending.number] = pending
        if isinstance(body, GenerateRequest) and (ahead := self._ahead_of(pending)) > 0:
            pending.events.put_nowait(QueuedEvent(ahead=ahead))
        if isinstance(body, _ASIDE) or (not self._suspects and self._alone is None):
            self._give(pending)
        return pending

    @property
    def wanted_since(self) -> float | None:
        """When the oldest request that needs the model arrived; None when there is none."""
        waiting = (one.arrived for one in self._pending.values() if not isinstance(one.body, _ASIDE))
        return min(waiting, default=None)

    @property
    def busy(self) -> bool:
        """Whether the model process works on a request."""
        return any(pending.at_work for pending in self._pending.values())

    def hold(self) -> None:
        """Give the model process nothing more until it was parked; what it works on is finished."""
        self._held = True

    def release(self) -> None:
        """Undo `hold`."""
        if self._held:
            self._held = False
            self._go_on()

    def park(self) -> None:
        """Note that the model process ends, by intention; requests wait until `run` is called again."""
        self._held = False
        self._health = Health(status="starting", detail="the model is not loaded")
        for pending in self._pending.values():
            pending.at_work = False

    def expire(self) -> None:
        """End the requests whose deadline has passed."""
        now = time.monotonic()
        for pending in [pending for pending in self._pending.values() if now > pending.deadline + DEADLINE_GRACE]:
            if pending.at_work:
                self._send({"command": "cancel", "request": pending.number})
            self._end(pending, ErrorEvent(kind="deadline", message="the deadline passed while it waited"))

    def refuse_all(self, kind: ErrorKind, message: str) -> None:
        """End every request with the same word."""
        for pending in list(self._pending.values()):
            self._end(pending, ErrorEvent(kind=kind, message=message, retry_after=5.0))

    def drop(self, pending: Pending) -> None:
        """Nobody waits for this request any more."""
        if pending.ended:
            return
        self._forget(pending)
        if pending.at_work:
            self._send({"command": "cancel", "request": pending.number})
        self._go_on()

    def _wrong_model(self, body: BaseModel) -> ErrorEvent | None:
        kind = {
            GenerateRequest: "chat",
            CountTokensRequest: "chat",
            EmbedRequest: "embedding",
            ClassifyRequest: "embedding",
        }.get(type(body))
        if kind is None:
            return None
        model, wanted = self.models.get(kind), getattr(body, "model", None)
        if model is None and self._health.status != "starting":
            return ErrorEvent(kind="refused", message=f"this engine serves no {kind} model")
        if model is not None and wanted is not None and wanted != model.name:
            return ErrorEvent(kind="refused", message=f"expected the {kind} model {model.name}, found {wanted!r}")
        return None

    def _ahead_of(self, pending: Pending) -> int:
        others = [other.body for other in self._pending.values() if other is not pending]
        generating = [body for body in others if isinstance(body, GenerateRequest)]
        if isinstance(pending.body, GenerateRequest) and pending.body.priority == "interactive":
            generating = [body for body in generating if body.priority == "interactive"]
        return max(0, len(generating) - self._settings.max_sequences)

    # ---- the model process

    async def run(self) -> None:
        """Keep a model process running until cancelled."""
        pause, deaths = FIRST_PAUSE, 0
        try:
            while True:
                self._was_ready = False
                try:
                    checked = await self._check_models()
                except (registry.ModelFileError, registry.UnknownModelError) as error:
                    self._fail(str(error))
                else:
                    await self._run_process(checked)
                    deaths = 0 if self._was_ready or self._health.status == "failed" else deaths + 1
                    if deaths >= DEATHS_WHILE_LOADING:
                        self._fail(f"the model process died {deaths} times while it loaded its models")
                if self._was_ready:
                    pause = FIRST_PAUSE
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        finally:
            await self._stop_process()

    async def _check_models(self) -> dict[str, dict[str, registry.FileIdentity]]:
        wanted = {"chat": self._settings.chat_model, "embedding": self._settings.embedding_model}
        folder = self._settings.models
        self.models = {kind: registry.find(name, kind, folder) for kind, name in wanted.items() if name}
        return {kind: await asyncio.to_thread(registry.verify, model, folder) for kind, model in self.models.items()}

    async def _run_process(self, checked: dict[str, dict[str, registry.FileIdentity]]) -> None:
        options = await self._options()
        ours, theirs = socket.socketpair()
        self._record.clear()
        descriptors = (theirs.fileno(), self._record_descriptor)
        command = [
            sys.executable,
            "-m",
            "quern.inference.modelprocess",
            *(str(descriptor) for descriptor in descriptors),
        ]
        self._process = await asyncio.create_subprocess_exec(
            *command, pass_fds=descriptors, stdin=asyncio.subprocess.DEVNULL, env=options.way.environment()
        )
        theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=REPORT_LIMIT)
        self._send(
            {
                "settings": self._settings.model_dump(mode="json"),
                "options": options._asdict(),
                "models": {kind: model.model_dump(mode="json") for kind, model in self.models.items()},
                "checked": {
                    kind: {name: list(found) for name, found in files.items()} for kind, files in checked.items()
                },
            }
        )
        watch = asyncio.create_task(self._watch())
        try:
            while line := await reader.readline():
                self._hear(orjson.loads(line))
        except (ValueError, ConnectionError) as error:
            log.error("the model process's channel broke", extra={"reason": type(error).__name__})
        finally:
            watch.cancel()
            self._writer.close()
            self._writer = None
            code = await self._stop_process()
        if self._health.status != "failed":
            self._bury(code)

    async def _options(self) -> BackendOptions:
        settings = self._settings
        threads = settings.threads or len(os.sched_getaffinity(0))
        options = BackendOptions(threads, 0, blas=False)
        drive = settings.poll is None or settings.batch_size is None
        if (settings.blas is None or drive) and (model := self.models.get("chat")) is not None:
            file = model.files[0]
            path = registry.file_path(model, file, settings.models)
            options = await tuning.choose(path, file.sha256, settings.tuning, threads, drive=drive)
        return options._replace(
            poll=options.poll if settings.poll is None else settings.poll,
            blas=options.blas if settings.blas is None else settings.blas,
            batch=settings.batch_size or options.batch,
        )

    async def _stop_process(self) -> int:
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            # It holds nothing that is not here; and one whose channel closed ends by itself.
            with contextlib.suppress(TimeoutError, ProcessLookupError):
                await asyncio.wait_for(process.wait(), 0.5)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        code = await process.wait()
        self._process = None
        return code

    async def _watch(self) -> None:
        """End a step that hangs, and requests whose deadline the model process slept through."""
        dog = Watchdog(self._settings.step_timeout)
        while True:
            await asyncio.sleep(WATCH_INTERVAL)
            now, process = time.monotonic(), self._process
            if process is not None and (entry := dog.hanging(self._record.read(), now, threads_of(process.pid))):
                log.error(
                    "a step hangs", extra={"seconds": round(now - entry.since, 1), "requests": len(entry.requests)}
                )
                self.counters["hangs_total"] += 1
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGABRT)
            self.expire()

    def _send(self, command: dict[str, Any]) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(orjson.dumps(command, option=orjson.OPT_NON_STR_KEYS) + b"\n")

    def _give(self, pending: Pending) -> None:
        if self._health.status != "ready" or (self._held and not isinstance(pending.body, _ASIDE)):
            return
        pending.at_work = True
        self._send(
            {
                "command": "request",
                "request": pending.number,
                "body": pending.body.model_dump(mode="json"),
                "seed": pending.seed,
                "arrived": pending.arrived,
                "deadline": pending.deadline,
                "resumed": pending.sent_tokens,
            }
        )

    def _hear(self, report: dict[str, Any]) -> None:
        kind = report["report"]
        if kind == "ready":
            self._health = Health(status="ready")
            self._was_ready = True
            log.info("the models are loaded", extra={"models": [model.name for model in self.models.values()]})
            for fault in self._faults:
                self._send({"command": "request", "request": 0, "body": fault})
            self._go_on()
            self._on_change()
            return
        if kind == "failed":
            self._fail(report["message"])
            return
        pending = self._pending.get(report["request"])
        if pending is None:
            return
        match kind:
            case "token":
                pending.sent_tokens += report["tokens"]
                pending.events.put_nowait(
                    TokenEvent(text=report["text"], tokens=report["count"], logprobs=report["logprobs"])
                )
            case "result":
                self.counters["results_total"] += 1
                self._end(pending, ResultEvent(data=report["data"]))
            case "error":
                self.counters["refused_total"] += report["kind"] == "refused"
                self._end(pending, ErrorEvent(kind=report["kind"], message=report["message"]))

    def _fail(self, detail: str) -> None:
        log.error("the models cannot be loaded", extra={"detail": detail})
        self._health = Health(status="failed", detail=detail)
        self.refuse_all("unavailable", detail)
        self._on_change()

    def _bury(self, code: int) -> None:
        """Sort the requests of a dead process into suspects and the others."""
        # First, so that nothing that ends here has anything given to a process that is gone.
        self._health = Health(status="starting", detail="the model process died and is being started again")
        at_work = frozenset[int]().union(*(entry.requests for entry in self._record.read()))
        self.counters["crashes_total"] += 1
        log.error(
            "the model process died",
            extra={"exit_code": code, "in_step": len(at_work), "pending": len(self._pending)},
        )
        alone, self._alone = self._alone, None
        for pending in list(self._pending.values()):
            pending.at_work = False
            if pending is alone:
                self._judge(pending, of_itself=code != -signal.SIGKILL)
            elif pending.number in at_work and pending not in self._suspects:
                self._suspects.append(pending)

    def _judge(self, pending: Pending, *, of_itself: bool) -> None:
        """A suspect ran alone, and the process died again."""
        pending.killed += not of_itself
        if of_itself or pending.killed >= STRIKES_FROM_OUTSIDE:
            self.counters["given_up_total"] += 1
            self._end(pending, self._error("crashed", "the model process died of this request", suspect=True))
        else:
            self._suspects.append(pending)

    @staticmethod
    def _error(kind: ErrorKind, message: str, *, suspect: bool = False) -> ErrorEvent:
        return ErrorEvent(kind=kind, message=message, suspect=suspect)

    def _go_on(self) -> None:
        """Give the model process what it may have next: one suspect alone, or everything else."""
        if self._health.status != "ready":
            return
        for pending in [pending for pending in self._pending.values() if isinstance(pending.body, _ASIDE)]:
            if not pending.at_work:
                self._give(pending)
        if self._alone is not None:
            return
        if any(pending.at_work for pending in self._pending.values()) and self._suspects:
            return
        if self._suspects:
            self._alone = self._suspects.popleft()
            self._give(self._alone)
            return
        for pending in list(self._pending.values()):
            if not pending.at_work:
                self._give(pending)

    def _end(self, pending: Pending, event: Event) -> None:
        if pending.ended:
            return
        pending.events.put_nowait(event)
        now = time.monotonic()
        if isinstance(event, ResultEvent) and isinstance(pending.body, GenerateRequest):
            # The pace at which answers come, for an honest word on when to come again.
            gap = now - max(self._last_end, pending.arrived)
            self._seconds_each += 0.1 * (min(gap, 60.0) - self._seconds_each)
            self._last_end = now
        self._forget(pending)
        self._go_on()

    def _forget(self, pending: Pending) -> None:
        pending.ended = True
        self._pending.pop(pending.number, None)
        if self._alone is pending:
            self._alone = None
        elif pending in self._suspects:
            self._suspects.remove(pending)
        self._on_change()

    def remember_fault(self, fault: dict[str, Any]) -> None:
        """Order the same fault of the next process, too (tests only)."""
        self._faults = (
            []
            if fault["action"] == "clear"
            else [*self._faults, fault]
            if fault["action"] == "poison"
            else self._faults
        )
