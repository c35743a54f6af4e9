"""What a workflow is: named steps with conditions and dependencies, as a form's version fixes them."""

import re
from functools import lru_cache
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, EmailStr, Field, StringConstraints, model_validator

from quern.forms.fields import NAME, Name
from quern.jobs.model import Queue
from quern.workflows import template
from quern.workflows.condition import MAX_DEPTH, Condition, depth, paths

MAX_STEPS: Final = 30
MAX_SCHEMA_NODES: Final = 200

Template = Annotated[str, StringConstraints(max_length=4000), AfterValidator(template.check)]
Label = Annotated[str, StringConstraints(min_length=1, max_length=60, pattern=r"^[^\x00-\x1f]+$")]
Fields = Annotated[list[Name], Field(min_length=1, max_length=50)]


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    needs: list[Name] = Field(default_factory=list, max_length=MAX_STEPS)
    """Steps that must have ended first."""
    when: Condition | None = None
    """Else the step is skipped."""
    after_failure: Literal["skip", "run"] = "skip"
    """What to do when a step in `needs` failed or was skipped."""
    deadline_seconds: int | None = Field(None, ge=1, le=7 * 86_400)
    """Counted from the submission."""


class _AiStep(_Step):
    fields: Fields | None = None
    """Answers that the step reads; by default every text in the form."""


class SummarizeStep(_AiStep):
    type: Literal["summarize"]
    max_words: int = Field(40, ge=5, le=300)
    instructions: Template | None = None


class ClassifyStep(_AiStep):
    """Chooses one label by comparing meanings (`embedding`, fast) or by asking the language model (`model`)."""

    type: Literal["classify"]
    labels: dict[Label, Annotated[str, StringConstraints(max_length=500)]] = Field(min_length=2, max_length=50)
    """Label to what it means."""
    method: Literal["embedding", "model"] = "embedding"
    instructions: Template | None = None


class ExtractStep(_AiStep):
    """Fills in a JSON Schema from the text; the result is valid against it or the step fails."""

    type: Literal["extract"]
    json_schema: dict[str, Any]
    instructions: Template | None = None
    max_tokens: int = Field(256, ge=16, le=2048)

    @model_validator(mode="after")
    def _schema_is_sound(self) -> "ExtractStep":
        check_schema(self.json_schema)
        return self


class SentimentStep(_AiStep):
    """Positive, neutral or negative, by the same two methods as `classify`."""

    type: Literal["sentiment"]
    method: Literal["embedding", "model"] = "embedding"


class TranslateStep(_AiStep):
    type: Literal["translate"]
    to: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Za-z ]{1,40}$")] = "English"
    """The language's English name."""


class EmbedStep(_AiStep):
    type: Literal["embed"]


class FromField(BaseModel):
    """An address that the person gave in an email field."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    field: Name


class EmailStep(_Step):
    type: Literal["email"]
    to: list[EmailStr] | FromField
    subject: Annotated[str, StringConstraints(min_length=1, max_length=500), AfterValidator(template.check)]
    body: Annotated[str, StringConstraints(min_length=1, max_length=20_000), AfterValidator(template.check)]


class WebhookStep(_Step):
    type: Literal["webhook"]
    endpoint: Annotated[str, StringConstraints(pattern=r"^whe_[0-9a-z]{26}$")]
    event: Annotated[str, StringConstraints(pattern=r"^[a-z]+(\.[a-z_]+)*$", max_length=100)] = "response.processed"
    include_answers: bool = True


Step = Annotated[
    SummarizeStep | ClassifyStep | ExtractStep | SentimentStep | TranslateStep | EmbedStep | EmailStep | WebhookStep,
    Field(discriminator="type"),
]

QUEUE: Final = {"email": Queue.DEFAULT, "webhook": Queue.WEBHOOKS}


def queue_of(step: _Step) -> Queue:
    """The queue whose workers do this kind of step: AI goes to `batched`."""
    return QUEUE.get(getattr(step, "type", ""), Queue.BATCHED)


class Workflow(BaseModel):
    """Steps in any order; `needs` makes the order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: list[Step] = Field(default_factory=list, max_length=MAX_STEPS)

    @model_validator(mode="after")
    def _hangs_together(self) -> "Workflow":
        names = [step.name for step in self.steps]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"step names must differ; found twice: {', '.join(twice)}")
        for step in self.steps:
            if strangers := sorted(set(step.needs) - set(names)):
                raise ValueError(f"step {step.name} needs {', '.join(strangers)}, which the workflow does not have")
            if step.when is not None:
                _check_condition(step)
        _check_acyclic({step.name: set(step.needs) for step in self.steps})
        return self


def _check_condition(step: _Step) -> None:
    if step.when is None:
        return
    if depth(step.when) > MAX_DEPTH:
        raise ValueError(f"the condition of step {step.name} nests deeper than {MAX_DEPTH}")
    for path in sorted(paths(step.when)):
        root, _, rest = path.partition(".")
        if root not in ("answers", "results") or not rest:
            raise ValueError(f"step {step.name} looks at {path}; a path begins with `answers.` or `results.`")
        if root == "results" and rest.split(".")[0] not in step.needs:
            raise ValueError(
                f"step {step.name} looks at the result of {rest.split('.')[0]}, so it must be in its `needs`"
            )


def _check_acyclic(needs: dict[str, set[str]]) -> None:
    left = dict(needs)
    while left:
        free = [name for name, wanted in left.items() if not wanted & left.keys()]
        if not free:
            raise ValueError(f"steps wait for each other in a circle: {', '.join(sorted(left))}")
        for name in free:
            del left[name]


_KEYWORDS: Final = frozenset(
    [
        "type",
        "properties",
        "required",
        "items",
        "enum",
        "const",
        "minItems",
        "maxItems",
        "minLength",
        "maxLength",
        "minimum",
        "maximum",
        "additionalProperties",
        "description",
        "title",
        "anyOf",
        "format",
        "pattern",
    ]
)


def check_schema(schema: dict[str, Any]) -> None:
    """Accept JSON Schemas that a grammar can hold to and that end: objects with named properties, no references.

    Raises:
        ValueError: naming what is not accepted.
    """
    # Two megabytes in each process that reads workflows, for one kind of step.
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"not a JSON Schema: {error.message}") from None
    if schema.get("type") != "object" or not schema.get("properties"):
        raise ValueError('the schema must be {"type": "object", "properties": {…}} with at least one property')
    _walk(schema, [0])


def _walk(schema: Any, seen: list[int]) -> None:
    seen[0] += 1
    if seen[0] > MAX_SCHEMA_NODES:
        raise ValueError(f"the schema has more than {MAX_SCHEMA_NODES} parts")
    if not isinstance(schema, dict):
        raise ValueError("each part of the schema must be an object")
    if strangers := sorted(schema.keys() - _KEYWORDS):
        raise ValueError(f"the schema uses {', '.join(strangers)}; accepted are {', '.join(sorted(_KEYWORDS))}")
    for name, part in schema.get("properties", {}).items():
        if not re.fullmatch(NAME, name):
            raise ValueError(f"property names are letters, digits and _; found {name!r}")
        _walk(part, seen)
    if "items" in schema:
        _walk(schema["items"], seen)
    for part in schema.get("anyOf", []):
        _walk(part, seen)
    if isinstance(schema.get("additionalProperties"), dict):
        raise ValueError("additionalProperties must be true or false")


@lru_cache(maxsize=512)
def parsed(workflow: str) -> Workflow:
    """The workflow given as JSON; kept, since a version never changes."""
    return Workflow.model_validate_json(workflow)
