"""The AI steps: what each asks of the engine, and what it keeps of the answer."""

from dataclasses import dataclass
from typing import Any

from quern.forms.fields import FormDefinition, LongTextField, TextField
from quern.inference import client as engine
from quern.inference.protocol import EmbedRequest, GenerateRequest, Label, Message
from quern.jobs.handler import Context, Refused, RetryLater
from quern.jobs.model import Job
from quern.store import clock
from quern.workflows import prompt, template
from quern.workflows.definition import (
    ClassifyStep,
    EmbedStep,
    ExtractStep,
    SentimentStep,
    Step,
    SummarizeStep,
    TranslateStep,
)

_TOKENS_PER_WORD = 3
_TRANSLATE_TOKENS = 400


@dataclass(frozen=True)
class Reading:
    """What a step reads: the text, whether it was cut, and the form's name."""

    text: str
    cut: bool
    form: str


def text_fields(definition: str) -> list[str]:
    """Names of a form's text fields, in its order; the definition is JSON."""
    fields = FormDefinition.model_validate_json(definition).fields
    return [field.name for field in fields if isinstance(field, TextField | LongTextField)]


def run(step: Step, reading: Reading, job: Job, context: Context, client: engine.EngineClient) -> dict[str, Any]:
    """Carry out one AI step; returns its result.

    Raises:
        RetryLater: the engine is busy, away, or crashed. Refused: this step cannot succeed with this text.
    """
    if not reading.text.strip():
        return {"empty": True}
    try:
        result = _ask(step, reading, job, context, client)
    except engine.EngineRefused as error:
        raise Refused(f"the engine refused: {error}") from None
    except engine.EngineDeadline:
        raise Refused("its deadline passed in the engine") from None
    except engine.EngineBusy as error:
        raise RetryLater("the engine is busy", after=error.retry_after, charged=False) from None
    except engine.EngineUnavailable:
        raise RetryLater("the engine is away", after=1.0, charged=False) from None
    except engine.EngineCrashed as error:
        if error.suspect:
            raise Refused("the engine crashes on this text") from None
        raise RetryLater("the engine crashed on another text", after=0.5, charged=False) from None
    except engine.EngineOutputInvalid as error:
        raise RetryLater(f"the model's answer was not valid: {error}") from None
    except engine.EngineCancelled:
        raise RetryLater("stopped", after=0, charged=False) from None
    if reading.cut:
        result["cut"] = True
    return result


def _ask(step: Step, reading: Reading, job: Job, context: Context, client: engine.EngineClient) -> dict[str, Any]:
    match step:
        case SummarizeStep():
            text = _write(step, reading, job, context, client, step.max_words * _TOKENS_PER_WORD)
            return {"text": _first_words(text, step.max_words)}
        case TranslateStep():
            return {"text": _write(step, reading, job, context, client, _TRANSLATE_TOKENS), "language": step.to}
        case ExtractStep():
            return {"data": _fill_in(step, step.json_schema, step.max_tokens, reading, job, context, client)}
        case ClassifyStep(method="model"):
            return _choose(step, list(step.labels), reading, job, context, client)
        case ClassifyStep():
            labels = [Label(name=name, description=meaning) for name, meaning in step.labels.items()]
            return _nearest(labels, reading, job, client)
        case SentimentStep(method="model"):
            return _choose(step, list(prompt.SENTIMENTS), reading, job, context, client)
        case SentimentStep():
            labels = [Label(name=name, examples=examples) for name, examples in prompt.SENTIMENTS.items()]
            return _nearest(labels, reading, job, client)
        case EmbedStep():
            asked = EmbedRequest(tenant=job.tenant, texts=[reading.text], deadline=_time_left(job))
            made = client.embeddings(asked, context.stop.is_set)
            return {"vector": made.vectors[0], "model": made.model}
    raise Refused(f"no rule for a {step.type} step")


def _choose(
    step: Step, labels: list[str], reading: Reading, job: Job, context: Context, client: engine.EngineClient
) -> dict[str, Any]:
    schema = {
        "type": "object",
        "properties": {"label": {"type": "string", "enum": labels}},
        "required": ["label"],
        "additionalProperties": False,
    }
    return {"label": _fill_in(step, schema, 64, reading, job, context, client)["label"]}


def _nearest(labels: list[Label], reading: Reading, job: Job, client: engine.EngineClient) -> dict[str, Any]:
    found = client.classify(job.tenant, reading.text, labels, deadline=_time_left(job))
    return {
        "label": found.label,
        "score": round(found.score, 4),
        "scores": {k: round(v, 4) for k, v in found.scores.items()},
    }


def _request(step: Step, reading: Reading, job: Job, max_tokens: int, schema: dict[str, Any] | None) -> GenerateRequest:
    try:
        messages = prompt.messages(step, reading.form, reading.text)
    except template.RenderError as error:
        raise Refused(f"the instructions of step {step.name}: {error}") from None
    return GenerateRequest(
        tenant=job.tenant,
        messages=[Message.model_validate(message) for message in messages],
        max_tokens=max_tokens,
        json_schema=schema,
        # A schema's answer that was cut off is tried again with another seed and some freedom.
        temperature=0.0 if job.failures == 0 else 0.7,
        seed=job.failures,
        repetition_penalty=1.05 if schema is None else 1.0,
        deadline=_time_left(job),
    )


def _write(
    step: Step, reading: Reading, job: Job, context: Context, client: engine.EngineClient, max_tokens: int
) -> str:
    answer = client.generate(_request(step, reading, job, max_tokens, None), should_stop=context.stop.is_set)
    if not answer.text.strip():
        raise RetryLater("the model wrote nothing")
    return answer.text.strip()


def _fill_in(
    step: Step,
    schema: dict[str, Any],
    max_tokens: int,
    reading: Reading,
    job: Job,
    context: Context,
    client: engine.EngineClient,
) -> Any:
    request = _request(step, reading, job, max_tokens, schema)
    return client.generate(request, should_stop=context.stop.is_set).parsed


def _time_left(job: Job) -> float | None:
    return max(0.1, (job.deadline - clock.now()).total_seconds()) if job.deadline else None


def _first_words(text: str, most: int) -> str:
    """The text up to its `most`-th word: a small model does not count."""
    words = text.split()
    return text if len(words) <= most else " ".join(words[:most]) + " …"
