"""The jobs that answer: ask the engine, tell what comes, and write the end in the transaction that ends the job."""

import struct
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from pydantic import ValidationError
from pymongo.client_session import ClientSession
from redis import Redis

from quern.inference import client as engine
from quern.inference.protocol import (
    NO_TOOLS,
    TOO_LONG,
    EmbedRequest,
    GenerateRequest,
    Generation,
    QueuedEvent,
    TokenEvent,
    TokenLogprob,
)
from quern.jobs.handler import Context, Followup, Handler, Obsolete, Refused, RetryLater
from quern.jobs.model import Job, State
from quern.observe import traces
from quern.openai import batches, conversation, deltas, ledger, notice, prompt, tools
from quern.openai.error import invalid
from quern.openai.ledger import Asked
from quern.openai.outcome import Choice, Failure, Outcome, Record
from quern.openai.prompt import Question
from quern.openai.request import BODIES, ChatBody, CompletionBody, EmbeddingBody, ResponseBody
from quern.openai.settings import OpenAISettings
from quern.store import clock
from quern.store.connection import Db

#: Tries of an answer that must fit a schema and did not, each with another seed.
_TRIES = 3
#: Kinds of requests that are answered with text.
_TEXT_KINDS = ("chat", "completion", "response")


class RequestFailed(Exception):
    """The request was carried out and cannot succeed: an answer of its own, not a failure of the queue."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class Answering:
    """Makes the handlers of all kinds of requests. `redis` gives the connection to Redis `queue`."""

    def __init__(
        self, engine_client: engine.EngineClient, redis: Callable[[], "Redis"], settings: OpenAISettings
    ) -> None:
        self._engine, self._redis, self._settings = engine_client, redis, settings

    def handlers(self) -> list[Handler]:
        text = [Handler(f"openai_{kind}", self._generate, self._on_end, keeps_result=False) for kind in _TEXT_KINDS]
        return [*text, Handler("openai_embedding", self._embed, self._on_end, keeps_result=False)]

    def _begin(self, job: Job, context: Context) -> Asked:
        asked = ledger.get(context.db, job.tenant, job.subject or "")
        if asked is None:
            raise Obsolete("the request was deleted")
        ledger.begin(context.db, asked)
        return asked

    def _generate(self, job: Job, context: Context) -> dict[str, Any]:
        with traces.span("answer", step=job.kind):
            asked = self._begin(job, context)
            redis = self._redis()
            stop = (
                deltas.watch_gone(redis, asked.id, context.stop.is_set) if asked.batch is None else context.stop.is_set
            )
            try:
                question = self._question(asked, context.db, job)
                outcome = self._answer(question, asked, redis, stop, job)
            except RequestFailed as failed:
                return {"failure": failed.failure.model_dump()}
            return {"answer": outcome.model_dump_json()}

    def _question(self, asked: Asked, db: Db, job: Job) -> Question:
        setting = prompt.Setting(
            tenant=asked.tenant,
            priority="interactive" if asked.waits else "batch",
            seed=(asked.seed + job.failures) % 2**62,
            most_tokens=self._settings.max_answer_tokens,
        )
        body = _body(asked)
        match body:
            case ChatBody():
                return prompt.of_chat(body, setting)
            case CompletionBody():
                return prompt.of_completion(body, setting)
            case ResponseBody():
                return prompt.of_response(body, conversation.before(db, asked), setting)
        raise Refused(f"no rule for {asked.kind}")

    def _answer(self, question: Question, asked: Asked, redis: "Redis", stop: Callable[[], bool], job: Job) -> Outcome:
        told = deltas.told_before(redis, asked.id) if asked.stream and job.attempt > 1 else []
        teller = deltas.Teller(redis, asked.id, told) if asked.stream and question.streams else None
        try:
            generations = self._all(question, teller, told, stop)
        except engine.EngineRefused as error:
            if str(error) != NO_TOOLS:
                raise RequestFailed(self._refusal(str(error), asked)) from None
            return self._answer(prompt.without_template_tools(question), asked, redis, stop, job)
        except engine.EngineOutputInvalid as error:
            message = f"The model wrote nothing that fits the format: {error}. Allow more tokens or a simpler schema."
            raise RequestFailed(Failure(status=422, message=message, code="output_invalid")) from None
        except engine.EngineError as error:
            raise _verdict(error) from None
        if teller is not None:
            teller.flush()
        return _outcome(question, generations, told, teller.records if teller else [])

    def _all(
        self, question: Question, teller: deltas.Teller | None, told: list[Record], stop: Callable[[], bool]
    ) -> list[Generation]:
        failed = threading.Event()

        def useless() -> bool:
            return failed.is_set() or stop()

        asks = [
            partial(self._one, question, index, teller, told, useless) for index in range(len(question.generations))
        ]
        if len(asks) == 1:
            return [asks[0]()]
        # The engine decodes them together, and reads their prompt once. When one fails, the others are of no use.
        with ThreadPoolExecutor(max_workers=min(8, len(asks))) as pool:
            futures = [pool.submit(ask) for ask in asks]
            try:
                return [future.result() for future in futures]
            except BaseException:
                failed.set()
                raise

    def _one(
        self, question: Question, index: int, teller: deltas.Teller | None, told: list[Record], stop: Callable[[], bool]
    ) -> Generation:
        request = question.generations[index]
        if teller is None:
            return self._until_valid(request, stop)
        echo = question.echo[index] if question.echo else ""
        begins = _told_of(told, index)[0]
        if echo and not begins:
            teller.tell((index, echo, None))

        def progress(event: TokenEvent | QueuedEvent) -> None:
            if isinstance(event, TokenEvent):
                teller.tell((index, event.text, event.logprobs))

        asked = request.model_copy(update={"stream": True, "begins": begins.removeprefix(echo)})
        return self._engine.generate(asked, progress, stop)

    def _until_valid(self, request: GenerateRequest, stop: Callable[[], bool]) -> Generation:
        for attempt in range(_TRIES):
            try:
                seed = ((request.seed or 0) + attempt * 1_000_003) % 2**63
                return self._engine.generate(request.model_copy(update={"seed": seed}), None, stop)
            except engine.EngineOutputInvalid:
                if attempt == _TRIES - 1 or request.temperature == 0.0:
                    raise
        raise AssertionError("unreachable")

    def _embed(self, job: Job, context: Context) -> dict[str, Any]:
        with traces.span("answer", step=job.kind):
            asked = self._begin(job, context)
            try:
                body = _body(asked)
            except RequestFailed as failed:
                return {"failure": failed.failure.model_dump()}
            if not isinstance(body, EmbeddingBody):
                raise Refused(f"no rule for {asked.kind}")
            texts = [body.input] if isinstance(body.input, str) else list(body.input)
            request = EmbedRequest(
                tenant=asked.tenant,
                model=body.model,
                texts=texts,
                priority="interactive" if asked.waits else "batch",
            )
            try:
                found = self._engine.embeddings(request, context.stop.is_set)
            except engine.EngineRefused as error:
                return {"failure": self._refusal(str(error), asked).model_dump()}
            except engine.EngineError as error:
                raise _verdict(error) from None
            size = len(found.vectors[0])
            if body.dimensions is not None and body.dimensions > size:
                message = f"dimensions: this model's vectors have {size}, found {body.dimensions}."
                return {
                    "failure": Failure(
                        status=400, message=message, code="invalid_value", param="dimensions"
                    ).model_dump()
                }
            flat = [number for vector in found.vectors for number in vector]
            outcome = Outcome(
                model=found.model, choices=[], prompt_tokens=found.tokens, cached_tokens=0, completion_tokens=0
            )
            return {"answer": outcome.model_dump_json(), "vectors": struct.pack(f"<{len(flat)}f", *flat)}

    def _refusal(self, message: str, asked: Asked) -> Failure:
        """A refusal of the engine as the client's fault, with the code that clients look for."""
        if message.startswith(TOO_LONG):
            return Failure(status=400, message=message, code="context_length_exceeded", param="messages")
        kind = "embedding" if asked.kind == "embedding" else "chat"
        try:
            served = {model.name for model in self._engine.models() if model.kind == kind}
        except engine.EngineError as error:
            raise _verdict(error) from None
        if asked.body["model"] not in served:
            return Failure(status=404, message=message, code="model_not_found", param="model")
        return Failure(status=400, message=message, code="invalid_value")

    def _on_end(
        self, db: Db, session: ClientSession, job: Job, state: State, result: dict[str, Any] | None, error: str | None
    ) -> Followup:
        result = result or {}
        failure = Failure.model_validate(result["failure"]) if "failure" in result else None
        answer = result["answer"].encode() if "answer" in result else None
        if state is State.CANCELLED:
            ended = "cancelled"
        elif answer is not None:
            ended = "incomplete" if job.kind == "openai_response" and _is_cut(answer) else "completed"
        else:
            ended = "failed"
            failure = failure or _dead(error)
        asked = ledger.end(
            db,
            job.subject or "",
            ended,
            self._settings,
            session,
            answer=answer,
            vectors=result.get("vectors"),
            failure=failure,
        )
        if asked is None:
            return Followup()
        if asked.batch is not None:
            return Followup(enqueue=batches.count(db, session, asked, job))
        if asked.background:
            event = f"response.{ended}"
            return Followup(enqueue=notice.jobs(db, session, asked.tenant, event, asked.public_id, clock.now(), job))
        return Followup()


def _body(asked: Asked) -> ChatBody | CompletionBody | EmbeddingBody | ResponseBody:
    """The body, checked: one of a batch was not before."""
    try:
        body = BODIES[asked.kind].model_validate(asked.body)
    except ValidationError as error:
        fault = invalid(error)
        failure = Failure(status=400, message=fault.message, code=fault.code or "invalid_value", param=fault.param)
        raise RequestFailed(failure) from None
    if asked.batch is not None:
        for name in ("stream", "background", "previous_response_id"):
            if getattr(body, name, None):
                message = f"{name} is not supported in a batch."
                raise RequestFailed(Failure(status=400, message=message, code="unsupported_parameter", param=name))
    return body


def _outcome(question: Question, generations: list[Generation], told: list[Record], records: list[Record]) -> Outcome:
    choices = []
    names = {function["name"] for function in question.functions}
    for index, generation in enumerate(generations):
        text, calls = generation.text, list[tools.Call]()
        if names:
            calls, text = tools.find_calls(text, names)
        echo = question.echo[index] if question.echo else ""
        logprobs = generation.logprobs
        if logprobs is not None:
            logprobs = [*_told_of(told, index)[1], *logprobs]
        choices.append(
            Choice(
                text=echo + text,
                finish="tool_calls" if calls else generation.finish_reason,
                calls=calls,
                logprobs=logprobs,
            )
        )
    prompts = {request.prompt for request in question.generations}
    # A prompt that several choices share is one prompt to who counts.
    each = len(generations) // len(prompts)
    return Outcome(
        model=generations[0].model,
        choices=choices,
        prompt_tokens=sum(generation.prompt_tokens for generation in generations[::each]),
        cached_tokens=sum(generation.cached_tokens for generation in generations[::each]),
        completion_tokens=sum(generation.completion_tokens for generation in generations),
        cuts=[[(index, len(text), len(logprobs or ())) for index, text, logprobs in record] for record in records],
    )


def _told_of(told: list[Record], index: int) -> tuple[str, list[TokenLogprob]]:
    pieces = [piece for record in told for piece in record if piece[0] == index]
    return "".join(piece[1] for piece in pieces), [one for piece in pieces for one in piece[2] or ()]


def _is_cut(answer: bytes) -> bool:
    return any(choice.finish == "length" for choice in Outcome.model_validate_json(answer).choices)


def _dead(error: str | None) -> Failure:
    if error and "deadline" in error:
        return Failure(status=504, message="The request expired before it was carried out.", code="expired")
    return Failure(status=500, message=f"The request failed: {error or 'unknown'}.", code="server_error")


def _verdict(error: engine.EngineError) -> Exception:
    """What the queue does about an engine that did not answer."""
    match error:
        case engine.EngineDeadline():
            return Refused("its deadline passed in the engine")
        case engine.EngineBusy(retry_after=after):
            return RetryLater("the engine is busy", after=after, charged=False)
        case engine.EngineCrashed(suspect=True):
            return Refused("the engine crashes on this text")
        case engine.EngineCrashed():
            return RetryLater("the engine crashed on another text", after=0.5, charged=False)
        case engine.EngineCancelled():
            return RetryLater("stopped", after=0, charged=False)
    return RetryLater("the engine is away", after=1.0, charged=False)
