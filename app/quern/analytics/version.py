"""What a version of a form means for the warehouse: its leaf fields and steps, and where copies of values stand."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import orjson

from quern.analytics import schema, source
from quern.forms.fields import ChoiceField, FormDefinition, GroupField, MultipleChoiceField, RatingField
from quern.store.connection import Db
from quern.workflows.definition import Workflow

#: Kinds of fields and steps with a short text (an option, a label), and with a number (an answer, a score).
_PROMOTED_TEXTS: Final = frozenset({"choice", "classify", "sentiment"})
_PROMOTED_NUMBERS: Final = frozenset({"number", "rating", "classify", "sentiment"})


@dataclass(frozen=True)
class Leaf:
    """One field that holds a value, or one step."""

    source: str
    path: str
    kind: str
    position: int
    label: str = ""
    required: bool = False
    repeated: bool = False
    options: str | None = None
    scale: int | None = None
    text_column: int | None = None
    number_column: int | None = None
    """Where a copy of an answer stands in `fact_response`; of a step: of its label, and of its score."""


@dataclass(frozen=True)
class Version:
    """What one version of a form means for flattening."""

    form: str
    number: int
    leaves: tuple[Leaf, ...]
    steps: tuple[Leaf, ...]
    by_path: dict[str, Leaf]
    step_kinds: dict[str, str]
    first_sentiment: str | None
    first_label: str | None
    answer_columns: dict[str, str]
    """Path to the column of `fact_response` that has a copy of its value."""
    result_columns: dict[str, str]
    """`<step>.<member>`, likewise."""

    @classmethod
    def of(cls, form: str, number: int, definition: str, workflow: str) -> "Version":
        """From a version's two JSON texts, see `forms.form.Version`."""
        leaves = tuple(_leaves(FormDefinition.model_validate_json(definition).fields))
        steps = tuple(
            Leaf("result", step.name, step.type, position)
            for position, step in enumerate(Workflow.model_validate_json(workflow).steps)
        )
        return cls._made(form, number, leaves, steps)

    @classmethod
    def unknown(cls, form: str, number: int) -> "Version":
        """Of a version that is not there (any more)."""
        return cls._made(form, number, (), ())

    @classmethod
    def _made(cls, form: str, number: int, leaves: tuple[Leaf, ...], steps: tuple[Leaf, ...]) -> "Version":
        first = {step.kind: step.path for step in reversed(steps)}
        leaves, steps = _with_columns(leaves, steps)
        answers = {leaf.path: f"text_{leaf.text_column}" for leaf in leaves if leaf.text_column}
        answers |= {leaf.path: f"number_{leaf.number_column}" for leaf in leaves if leaf.number_column}
        results = {f"{step.path}.label": f"text_{step.text_column}" for step in steps if step.text_column}
        results |= {f"{step.path}.score": f"number_{step.number_column}" for step in steps if step.number_column}
        return cls(
            form,
            number,
            leaves,
            steps,
            {leaf.path: leaf for leaf in leaves},
            {step.path: step.kind for step in steps},
            first.get("sentiment"),
            first.get("classify"),
            answers,
            results,
        )


class Versions:
    """Versions of forms for flattening, kept: they never change."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._kept: dict[tuple[str, int], Version] = {}

    def get(self, form: str, number: int) -> Version:
        """The version, or one that explains nothing when it is not there."""
        key = (form, number)
        found = self._kept.get(key)
        if found is None:
            stored = source.version(self._db, form, number)
            found = Version.unknown(*key) if stored is None else Version.of(*key, stored.definition, stored.workflow)
            if len(self._kept) >= 2000:
                self._kept.clear()
            self._kept[key] = found
        return found


def _with_columns(leaves: tuple[Leaf, ...], steps: tuple[Leaf, ...]) -> tuple[tuple[Leaf, ...], tuple[Leaf, ...]]:
    """The same with the columns that hold copies of their values: of the first that are short and come once."""
    texts, numbers = (iter(range(1, schema.PROMOTED + 1)) for _ in range(2))
    made = [
        replace(
            leaf,
            text_column=next(texts, None) if leaf.kind in _PROMOTED_TEXTS else None,
            number_column=next(numbers, None) if leaf.kind in _PROMOTED_NUMBERS else None,
        )
        if not leaf.repeated
        else leaf
        for leaf in (*steps, *leaves)
    ]
    return tuple(made[len(steps) :]), tuple(made[: len(steps)])


def _leaves(fields: Sequence[Any], prefix: str = "", repeated: bool = False) -> Iterator[Leaf]:
    position = 0
    for item in fields:
        path = prefix + item.name
        if isinstance(item, GroupField):
            for inner in _leaves(item.fields, path + ".", repeated or item.repeated):
                yield _at(inner, position)
                position += 1
            continue
        options = None
        if isinstance(item, ChoiceField | MultipleChoiceField):
            options = orjson.dumps({option.value: option.label or option.value for option in item.options}).decode()
        yield Leaf(
            "answer",
            path,
            item.type,
            position,
            item.label,
            item.required,
            repeated or isinstance(item, MultipleChoiceField),
            options,
            item.scale if isinstance(item, RatingField) else None,
        )
        position += 1


def _at(leaf: Leaf, position: int) -> Leaf:
    return Leaf(**{**vars(leaf), "position": position})
