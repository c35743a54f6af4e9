"""The process that holds the models and runs native code; the engine starts it, and starts it again when it dies.

Four threads: one reads the channel, one turns requests into tokens and grammars, one embeds, and the main one steps.
Each writes into the step record what it is about to do. The channel is a socket pair of JSON lines; its frames are
`Command` and `Report` below. Run as `python -m quern.inference.modelprocess CHANNEL_FD RECORD_FD`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import orjson

from quern.inference import grammar, sampling
from quern.inference.chat import ChatTemplate, TemplateRefusedError
from quern.inference.classifier import label_texts, shares
from quern.inference.embedder import Embedder
from quern.inference.llama import Context, Grammar, LlamaError, Model, start_backend
from quern.inference.llama_options import BackendOptions
from quern.inference.protocol import (
    REQUEST,
    TOO_LONG,
    Classification,
    ClassifyRequest,
    CountTokensRequest,
    Done,
    EmbedRequest,
    ErrorKind,
    FaultRequest,
    Frame,
    GenerateRequest,
    Generation,
    PurgeRequest,
    Stats,
    StatsRequest,
    TokenCount,
    TokenLogprob,
)
from quern.inference.registry import FileIdentity, file_path, identity
from quern.inference.registry import Model as ModelEntry
from quern.inference.settings import EngineSettings
from quern.inference.steploop import Limits, Sequence, StepLoop
from quern.inference.steprecord import Lane, StepRecord

log = logging.getLogger(__name__)

_PR_SET_PDEATHSIG = 1
#: Answers in JSON are wound up this many tokens before the least that they need, for a tokeniser may split it badly.
CLOSING_MARGIN = 12
#: Cancelled requests are remembered, newest first, until they surely have passed through every thread.
REMEMBERED_CANCELS = 10_000
#: Most embedding requests taken together.
EMBED_TOGETHER = 64


class RefusedError(Exception):
    """A request is wrong in itself."""


class Channel:
    """The way back to the engine: whole lines, from any thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, report: dict[str, Any]) -> None:
        """Send one report; the process ends when nobody listens any more."""
        line = orjson.dumps(report, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n"
        try:
            with self._lock:
                self._connection.sendall(line)
        except OSError:
            os._exit(0)

    def result(self, request: int, data: Frame) -> None:
        """A request's result."""
        self.send({"report": "result", "request": request, "data": data.model_dump(mode="json")})

    def error(self, request: int, kind: ErrorKind, message: str) -> None:
        """A request's end without a result."""
        self.send({"report": "error", "request": request, "kind": kind, "message": message})

    def token(
        self, request: int, text: str, count: int, tokens: Many[int], logprobs: list[TokenLogprob] | None
    ) -> None:
        """More of a streamed answer."""
        told = [entry.model_dump() for entry in logprobs] if logprobs is not None else None
        self.send(
            {
                "report": "token",
                "request": request,
                "text": text,
                "count": count,
                "tokens": list(tokens),
                "logprobs": told,
            }
        )


class _Listener:
    """The step loop's words, passed on to the engine."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def token(
        self, request: int, text: str, count: int, tokens: Many[int], logprobs: list[TokenLogprob] | None
    ) -> None:
        self._channel.token(request, text, count, tokens, logprobs)

    def result(self, request: int, generation: Generation) -> None:
        self._channel.result(request, generation)

    def error(self, request: int, kind: ErrorKind, message: str) -> None:
        self._channel.error(request, kind, message)


class Faults:
    """Faults to be made on purpose, for the engine's own tests."""

    def __init__(self) -> None:
        self.poisons: set[str] = set()
        self.poisoned: set[int] = set()
        self._next: str | None = None

    def order(self, request: FaultRequest) -> None:
        """Take an order."""
        if request.action == "poison":
            self.poisons.add(request.text)
        elif request.action == "clear":
            self.poisons.clear()
            self.poisoned.clear()
            self._next = None
        else:
            self._next = request.action

    def before_step(self, requests: Many[int]) -> None:
        """Make the ordered fault, if it is time."""
        if self._next == "hang_next_step":
            time.sleep(3600)
        if self._next == "crash_next_step" or self.poisoned.intersection(requests):
            os.kill(os.getpid(), signal.SIGSEGV)


class ModelProcess:
    """Everything in this process but the channel's reader."""

    def __init__(self, settings: EngineSettings, options: BackendOptions, channel: Channel, record: StepRecord) -> None:
        self._settings, self._options, self._channel, self._record = settings, options, channel, record
        self._faults = Faults()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_prepare: queue.SimpleQueue[tuple[int, dict[str, Any], Any]] = queue.SimpleQueue()
        self._to_embed: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()

    def load(self, entries: dict[str, ModelEntry], checked: dict[str, dict[str, FileIdentity]]) -> None:
        """Load the models whose files the engine has checked; a file changed since then is not touched."""
        paths: dict[str, dict[str, Path]] = {}
        for kind, entry in entries.items():
            for file in entry.files:
                path = file_path(entry, file, self._settings.models)
                if identity(path) != checked[kind][file.path]:
                    raise LlamaError(f"{path} was changed after it was checked")
                paths.setdefault(kind, {})[path.suffix] = path
        self._entries = entries
        self._loop: StepLoop | None = None
        self._embedder: Embedder | None = None
        if "chat" in entries:
            self._load_chat(entries["chat"], paths["chat"][".gguf"])
        if "embedding" in entries:
            files, context = paths["embedding"], entries["embedding"].context
            embedder = self._embedder = Embedder(files[".onnx"], files[".json"], context, self._options.threads)
            _start_thread("embed", lambda: self._embed_forever(embedder))
        _start_thread("prepare", self._prepare_forever)

    def _load_chat(self, entry: ModelEntry, path: Path) -> None:
        settings = self._settings
        start_backend(self._options.blas)
        model = Model(path)
        limits = Limits(
            batch=self._options.batch,
            sequences=settings.max_sequences,
            reserved_sequences=settings.reserved_sequences,
            threads=self._options.threads,
            prefix_cache=settings.prefix_cache,
            adapt_threads=settings.adapt_threads,
        )
        context = Context(
            model, settings.context, StepLoop.sequences_needed(limits), self._options.batch, self._options
        )
        self._vocabulary = model.vocabulary
        self._template = ChatTemplate(model.chat_template, model.vocabulary)
        self._most_tokens = min(context.size, entry.context, model.trained_context)
        self._loop = StepLoop(model.vocabulary, context, limits, _Listener(self._channel), self._before_step)

    def _before_step(self, requests: Many[int]) -> None:
        self._record.begin(Lane.DECODE, requests)
        self._faults.before_step(requests)

    # ---- the channel's reader

    def take(self, command: dict[str, Any]) -> None:
        """Carry out one command of the engine, or pass it to the thread that does."""
        match command["command"]:
            case "cancel":
                self._cancelled.add(command["request"])
                if len(self._cancelled) > 2 * REMEMBERED_CANCELS:
                    self._cancelled = set(sorted(self._cancelled)[-REMEMBERED_CANCELS:])
                self._inbox.put(("cancel", command["request"]))
            case "request":
                self._take_request(command["request"], REQUEST.validate_python(command["body"]), command)
            case other:
                raise ValueError(f"unknown command {other!r}")

    def _take_request(self, number: int, body: Any, command: dict[str, Any]) -> None:
        match body:
            case GenerateRequest() | CountTokensRequest():
                self._to_prepare.put((number, command, body))
            case EmbedRequest() | ClassifyRequest():
                self._to_embed.put((number, body))
            case PurgeRequest():
                self._inbox.put(("purge", number, body.tenant))
            case StatsRequest():
                self._channel.result(number, Stats(values=self._stats()))
            case FaultRequest():
                self._faults.order(body)
                self._channel.result(number, Done())
            case _:
                self._channel.error(number, "refused", f"the model's process has no operation {body.op!r}")

    def _stats(self) -> dict[str, float]:
        values: dict[str, float] = {}
        if self._loop is not None:
            values |= self._loop.counters | self._loop.gauges()
        if self._embedder is not None:
            values |= {
                "embedding_cache_hits_total": self._embedder.hits,
                "embedding_cache_misses_total": self._embedder.misses,
                "embedding_cache_size": len(self._embedder),
            }
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        values["resident_bytes"] = pages * resource.getpagesize()
        return {name: float(value) for name, value in values.items()}

    # ---- the thread that prepares

    def _prepare_forever(self) -> None:
        while True:
            number, command, body = self._to_prepare.get()
            self._record.begin(Lane.PREPARE, [number])
            try:
                if self._loop is None:
                    raise RefusedError("this engine has no chat model")
                if isinstance(body, CountTokensRequest):
                    count = len(self._prompt(body))
                    self._channel.result(number, TokenCount(tokens=count))
                elif number not in self._cancelled:
                    self._inbox.put(("submit", self._prepare(number, command, body)))
            except (RefusedError, TemplateRefusedError, grammar.SchemaRefusedError) as error:
                self._channel.error(number, "refused", str(error))
            finally:
                self._record.end(Lane.PREPARE)

    def _prompt(self, body: GenerateRequest | CountTokensRequest) -> list[int]:
        if body.messages is not None:
            return self._template.tokens(body.messages, body.tools)
        return self._vocabulary.tokenize(body.prompt or "", control=False, bos=self._vocabulary.adds_bos)

    def _prepare(self, number: int, command: dict[str, Any], body: GenerateRequest) -> Sequence:
        prompt = self._prompt(body)
        if not prompt:
            raise RefusedError("expected a prompt of at least one token, found none")
        max_tokens = body.max_tokens
        if body.fits_room:
            max_tokens = min(max_tokens, max(1, self._most_tokens - len(prompt)))
        if len(prompt) + max_tokens > self._most_tokens:
            raise RefusedError(
                f"{TOO_LONG} {self._most_tokens} tokens, found {len(prompt)} of prompt and {max_tokens} of answer"
            )
        if self._faults.poisons and any(text in str(body) for text in self._faults.poisons):
            self._faults.poisoned.add(number)
        rules, closing = None, 0
        if body.json_schema is not None or body.json_mode:
            text = (
                grammar.grammar_for(body.json_schema) if body.json_schema is not None else grammar.JSON_OBJECT_GRAMMAR
            )
            try:
                rules = Grammar(self._vocabulary, text)
            except LlamaError as error:
                raise RefusedError("the grammar of this schema is more than llama.cpp takes") from error
            least = grammar.smallest_answer(body.json_schema)
            closing = len(self._vocabulary.tokenize(least, control=False)) + CLOSING_MARGIN
        return Sequence(
            request=number,
            tenant=body.tenant,
            prompt=np.array(prompt, np.int32),
            max_tokens=max_tokens,
            sampling=sampling.SamplingParameters(
                temperature=body.temperature,
                top_p=body.top_p,
                top_k=body.top_k,
                min_p=body.min_p,
                repetition_penalty=body.repetition_penalty,
                presence_penalty=body.presence_penalty,
                frequency_penalty=body.frequency_penalty,
                logit_bias=body.logit_bias,
            ),
            seed=command["seed"],
            priority=body.priority,
            deadline=command["deadline"],
            arrived=command["arrived"],
            model=self._entries["chat"].name,
            stop=tuple(body.stop),
            stream=body.stream,
            logprobs=body.logprobs,
            rules=rules,
            wants_json=rules is not None,
            schema=body.json_schema,
            closing=closing,
            resumed=[*self._vocabulary.tokenize(body.begins, control=False), *(command.get("resumed") or ())],
        )

    # ---- the thread that embeds

    def _embed_forever(self, embedder: Embedder) -> None:
        while True:
            work = [self._to_embed.get()]
            # What came before a purge is embedded before it, so that nothing of it stays; what came after, after it.
            while not isinstance(work[-1][1], PurgeRequest) and len(work) < EMBED_TOGETHER:
                if self._to_embed.empty():
                    break
                work.append(self._to_embed.get())
            purges = [body.tenant for _, body in work if isinstance(body, PurgeRequest)]
            items = [(number, body) for number, body in work if not isinstance(body, PurgeRequest)]
            items = [(number, body) for number, body in items if number not in self._cancelled]
            if items:
                self._record.begin(Lane.EMBED, [number for number, _ in items])
                self._embed(embedder, items)
                self._record.end(Lane.EMBED)
            for tenant in purges:
                embedder.purge(tenant)

    def _embed(self, embedder: Embedder, items: list[tuple[int, EmbedRequest | ClassifyRequest]]) -> None:
        """Embed the texts of all these requests together, and answer each."""
        texts: list[tuple[str, str]] = []
        places: list[range] = []
        for _, body in items:
            wanted = body.texts if isinstance(body, EmbedRequest) else [body.text]
            if isinstance(body, ClassifyRequest):
                wanted = wanted + [text for label in body.labels for text in label_texts(label)]
            places.append(range(len(texts), len(texts) + len(wanted)))
            texts += [(body.tenant, text) for text in wanted]
        embedded = embedder.embed(texts)
        model = self._entries["embedding"].name
        for (number, body), place in zip(items, places, strict=True):
            vectors = [embedded.vectors[index] for index in place]
            if isinstance(body, EmbedRequest):
                tokens = sum(embedded.tokens[index] for index in place)
                data = {"vectors": vectors, "model": model, "tokens": tokens}
                self._channel.send({"report": "result", "request": number, "data": data})
            else:
                self._channel.result(number, self._classify(body, vectors, model))

    @staticmethod
    def _classify(body: ClassifyRequest, vectors: list[Any], model: str) -> Classification:
        start, groups = 1, []
        for label in body.labels:
            end = start + len(label_texts(label))
            groups.append(np.stack(vectors[start:end]))
            start = end
        found = shares(vectors[0], groups)
        scores = {label.name: float(share) for label, share in zip(body.labels, found, strict=True)}
        best = max(scores, key=lambda name: scores[name])
        return Classification(label=best, score=scores[best], scores=scores, model=model)

    # ---- the main thread

    def run(self) -> NoReturn:
        """Step for ever; sleeps when there is nothing to do."""
        while True:
            self._take_in(block=self._loop is None or self._loop.idle)
            if self._loop is not None and not self._loop.idle:
                self._loop.step()
                self._record.end(Lane.DECODE)

    def _take_in(self, *, block: bool) -> None:
        while block or not self._inbox.empty():
            self._take_message(self._inbox.get())
            block = False

    def _take_message(self, message: Any) -> None:
        loop = self._loop
        match message:
            case ("submit", Sequence() as sequence):
                if loop is not None and sequence.request not in self._cancelled:
                    loop.submit(sequence)
                elif sequence.rules:
                    sequence.rules.close()
            case ("cancel", int(number)):
                if loop is not None:
                    loop.cancel(number)
            case ("purge", int(number), str(tenant)):
                if loop is not None:
                    loop.purge(tenant)
                self._to_embed.put((number, PurgeRequest(tenant=tenant)))
                self._channel.result(number, Done())


def _start_thread(name: str, body: Callable[[], None]) -> None:
    def run() -> None:
        try:
            body()
        except BaseException as error:
            _die_of(name, error)

    threading.Thread(target=run, name=name, daemon=True).start()


def _die_of(thread: str, error: BaseException) -> NoReturn:
    """End like a crash: the step record still names the requests that this thread was working on."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
    # Not the error's own text: it may quote what a person wrote.
    sys.stderr.write(f"the model process's {thread} thread failed: {type(error).__name__} at {where}\n")
    sys.stderr.flush()
    os._exit(70)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def main() -> None:
    """Serve the engine on the other end of the channel until it hangs up."""
    _die_with_parent()
    # A dump of this process would be full of people's words.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine decides when this process ends
    connection = socket.socket(fileno=int(sys.argv[1]))
    channel, record = Channel(connection), StepRecord(int(sys.argv[2]))
    lines = connection.makefile("rb")
    start = orjson.loads(lines.readline())
    process = ModelProcess(
        EngineSettings.model_validate(start["settings"]), BackendOptions(**start["options"]), channel, record
    )
    try:
        process.load(
            {kind: ModelEntry.model_validate(entry) for kind, entry in start["models"].items()},
            {
                kind: {name: FileIdentity(*found) for name, found in files.items()}
                for kind, files in start["checked"].items()
            },
        )
    except Exception as error:
        channel.send({"report": "failed", "message": f"{type(error).__name__}: {error}"})
        sys.exit(1)
    channel.send({"report": "ready"})

    def read() -> None:
        for line in lines:
            process.take(orjson.loads(line))
        os._exit(0)  # the engine is gone

    _start_thread("read", read)
    try:
        process.run()
    except BaseException as error:
        _die_of("step", error)


if __name__ == "__main__":
    main()
