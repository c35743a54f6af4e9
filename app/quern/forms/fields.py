"""The fields of a form, as their author writes them, and the model that checks answers against them."""

import math
import re
from collections.abc import Iterator
from datetime import date
from functools import lru_cache
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    EmailStr,
    Field,
    StringConstraints,
    ValidationError,
    create_model,
    model_validator,
)

from quern.forms import pattern as patterns

#: A field's name is a key in the database, a column in the warehouse and a part of a JSON pointer.
NAME: Final = r"^[A-Za-z][A-Za-z0-9_]{0,62}$"
MAX_DEPTH: Final = 4
MAX_FIELDS: Final = 500
_MAX_NUMBER: Final = 1e15
_DAY: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}")

Name = Annotated[str, StringConstraints(pattern=NAME)]
Label = Annotated[str, StringConstraints(max_length=500)]


class _Field(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name
    label: Label = ""
    help: Annotated[str, StringConstraints(max_length=2000)] = ""
    required: bool = False


class TextField(_Field):
    """One line."""

    type: Literal["text"]
    max_length: int = Field(500, ge=1, le=5_000)
    pattern: Annotated[str, StringConstraints(max_length=200), AfterValidator(patterns.check)] | None = None
    """The whole text must match; see `patterns` for the dialect."""


class LongTextField(_Field):
    """Many lines."""

    type: Literal["long_text"]
    max_length: int = Field(20_000, ge=1, le=500_000)


class NumberField(_Field):
    type: Literal["number"]
    minimum: float | None = Field(None, ge=-_MAX_NUMBER, le=_MAX_NUMBER)
    maximum: float | None = Field(None, ge=-_MAX_NUMBER, le=_MAX_NUMBER)
    integer: bool = False

    @model_validator(mode="after")
    def _can_be_answered(self) -> "NumberField":
        _in_order(self.minimum, self.maximum, "minimum", "maximum")
        if self.integer and self.whole_bounds[0] > self.whole_bounds[1]:
            raise ValueError("there is no whole number between `minimum` and `maximum`")
        return self

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the greatest answer."""
        low = -_MAX_NUMBER if self.minimum is None else self.minimum
        return low, _MAX_NUMBER if self.maximum is None else self.maximum

    @property
    def whole_bounds(self) -> tuple[int, int]:
        """The smallest and the greatest whole answer."""
        return math.ceil(self.bounds[0]), math.floor(self.bounds[1])


class Option(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    value: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    label: Label = ""


def _options_differ(options: list[Option]) -> list[Option]:
    values = [option.value for option in options]
    if len(set(values)) != len(values):
        raise ValueError("the options' values must differ")
    return options


def _in_order(low: Any, high: Any, low_name: str, high_name: str) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"expected `{low_name}` to be at most {high_name}")


Options = Annotated[list[Option], Field(min_length=1, max_length=500), AfterValidator(_options_differ)]


class ChoiceField(_Field):
    """One of some options."""

    type: Literal["choice"]
    options: Options


class MultipleChoiceField(_Field):
    """Any of some options, each at most once."""

    type: Literal["multiple_choice"]
    options: Options
    min_chosen: int = Field(0, ge=0, le=500)
    max_chosen: int | None = Field(None, ge=1, le=500)

    @model_validator(mode="after")
    def _can_be_answered(self) -> "MultipleChoiceField":
        most = len(self.options) if self.max_chosen is None else self.max_chosen
        _in_order(self.min_chosen, min(most, len(self.options)), "min_chosen", "max_chosen, and the number of options")
        return self


class EmailField(_Field):
    type: Literal["email"]


class DateField(_Field):
    """A calendar day, `YYYY-MM-DD`."""

    type: Literal["date"]
    earliest: Annotated[date, Field(strict=False)] | None = None
    latest: Annotated[date, Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _can_be_answered(self) -> "DateField":
        _in_order(self.earliest, self.latest, "earliest", "latest")
        return self


class RatingField(_Field):
    """A whole number from 1 to `scale`."""

    type: Literal["rating"]
    scale: int = Field(5, ge=2, le=100)


class ConsentField(_Field):
    """A box to tick; a required one must be true."""

    type: Literal["consent"]


class GroupField(_Field):
    """Fields that belong together; `repeated` makes it a list of such groups."""

    type: Literal["group"]
    fields: list["AnyField"] = Field(min_length=1, max_length=MAX_FIELDS)
    repeated: bool = False
    max_items: int = Field(20, ge=1, le=200)


AnyField = Annotated[
    TextField
    | LongTextField
    | NumberField
    | ChoiceField
    | MultipleChoiceField
    | EmailField
    | DateField
    | RatingField
    | ConsentField
    | GroupField,
    Field(discriminator="type"),
]
GroupField.model_rebuild()


def _bounded(value: Any) -> Any:
    """Refuse a definition that is too large before anything is made of it. Raises ValueError."""
    layer, count = [value], 0
    for _ in range(MAX_DEPTH):
        inner = [part for part in layer if isinstance(part, list)]
        fields = [field for part in inner for field in part]
        count += len(fields)
        if count > MAX_FIELDS:
            raise ValueError(f"a form may have {MAX_FIELDS} fields, groups and their fields included")
        layer = [field["fields"] for field in fields if isinstance(field, dict) and "fields" in field]
        if not layer:
            return value
    raise ValueError(f"groups may nest {MAX_DEPTH - 1} deep")


def _sound(fields: list[Any]) -> list[Any]:
    """Fields of one form whose names differ, group by group, and whose patterns together are not too large."""
    for group in _groups(fields):
        names = [field.name for field in group]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"field names must differ; found twice: {', '.join(twice)}")
    if _pattern_weight(fields) > patterns.MAX_WEIGHT:
        raise ValueError(
            f"the form's patterns are too large together; their size may be {patterns.MAX_WEIGHT}, "
            "and a repeated group's counts for each of its items"
        )
    return fields


def _groups(fields: list[Any]) -> Iterator[list[Any]]:
    yield fields
    for field in fields:
        if isinstance(field, GroupField):
            yield from _groups(field.fields)


def _pattern_weight(fields: list[Any]) -> int:
    total = 0
    for field in fields:
        if isinstance(field, TextField) and field.pattern is not None:
            total += patterns.weight(field.pattern)
        elif isinstance(field, GroupField):
            total += _pattern_weight(field.fields) * (field.max_items if field.repeated else 1)
    return total


Fields = Annotated[
    list[AnyField],
    Field(min_length=1, max_length=MAX_FIELDS),
    BeforeValidator(_bounded, json_schema_input_type=list[AnyField]),
    AfterValidator(_sound),
]
"""All the fields of a form."""


class _Answers(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def answers_model(fields: list[Any], name: str = "Answers") -> type[BaseModel]:
    """The pydantic model of the answers to `fields`: what may be sent, and its JSON Schema for clients."""
    definitions: dict[str, Any] = {}
    for field in fields:
        kind = _annotation(field, f"{name}_{field.name}")
        description = field.label or None
        # The alias keeps names such as `copy` or `json` from clashing with the model's own.
        if field.required:
            definitions[f"a_{field.name}"] = (kind, Field(alias=field.name, description=description))
        else:
            definitions[f"a_{field.name}"] = (kind | None, Field(None, alias=field.name, description=description))
    return create_model(name, __base__=_Answers, **definitions)


def _annotation(field: Any, name: str) -> Any:
    match field:
        case TextField():
            return Annotated[
                str,
                BeforeValidator(_without_nul),
                Field(
                    min_length=1 if field.required else 0,
                    max_length=field.max_length,
                    pattern=patterns.anchored(field.pattern) if field.pattern else None,
                ),
                AfterValidator(_one_line),
            ]
        case LongTextField():
            return Annotated[
                str,
                BeforeValidator(_without_nul),
                Field(min_length=1 if field.required else 0, max_length=field.max_length),
            ]
        case NumberField():
            kind, bounds = (int, field.whole_bounds) if field.integer else (float, field.bounds)
            return Annotated[kind, Field(ge=bounds[0], le=bounds[1])]
        case ChoiceField():
            return Literal[tuple(option.value for option in field.options)]
        case MultipleChoiceField():
            chosen: Any = Literal[tuple(option.value for option in field.options)]
            most = field.max_chosen or len(field.options)
            fewest = max(field.min_chosen, 1 if field.required else 0)
            return Annotated[list[chosen], Field(min_length=fewest, max_length=most), AfterValidator(_each_once)]
        case EmailField():
            return Annotated[EmailStr, BeforeValidator(_bare_address), Field(max_length=254)]
        case DateField():
            first, last = field.earliest or date(1, 1, 1), field.latest or date(9999, 12, 31)
            return Annotated[date, Field(ge=first, le=last, strict=False), BeforeValidator(_iso_day)]
        case RatingField():
            return Annotated[int, Field(ge=1, le=field.scale)]
        case ConsentField():
            # Literal compares, and 1 equals True.
            return Annotated[Literal[True], BeforeValidator(_boolean)] if field.required else bool
        case GroupField():
            group: Any = answers_model(field.fields, name)
            fewest = 1 if field.required else 0
            if not field.repeated:
                return group
            return Annotated[list[group], Field(min_length=fewest, max_length=field.max_items)]
    raise TypeError(f"no rule for {type(field).__name__}")


def _without_nul(value: Any) -> Any:
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("a NUL character is not text")
    return value


def _boolean(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("must be true")
    return value


def _bare_address(value: Any) -> Any:
    # The library also reads `Name <address>`, and trims.
    if isinstance(value, str) and re.search(r"[\s<>]", value):
        raise ValueError("expected an address alone, such as maud@example.org")
    return value


def _one_line(value: str) -> str:
    if "\n" in value or "\r" in value:
        raise ValueError("must be one line")
    return value


def _each_once(value: list[str]) -> list[str]:
    if len(set(value)) != len(value):
        raise ValueError("each option may be chosen once")
    return value


def _iso_day(value: Any) -> Any:
    # Alone, fromisoformat also takes a day of a week (2026-W01-1).
    if not isinstance(value, str) or not _DAY.fullmatch(value):
        raise ValueError("expected a day as YYYY-MM-DD")
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise ValueError("there is no such day") from None


class FormDefinition(BaseModel):
    """What a version of a form asks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: Fields


def check_answers(model: type[BaseModel], answers: Any) -> dict[str, Any]:
    """The answers as they are stored: validated, days as `YYYY-MM-DD`, nothing that was not sent.

    Raises:
        ValidationError: with the place of each fault in `loc`.
    """
    return model.model_validate(answers).model_dump(mode="json", by_alias=True, exclude_unset=True)


def pointer(location: tuple[int | str, ...], value: Any, missing: bool = False) -> str:
    """A JSON pointer (RFC 6901) to a fault's place in `value`, from where pydantic found it.

    pydantic's place also names the branch of a union that it tried (`fields, 0, text, label`), which is no part of
    what the client sent. Where a member is `missing`, its name is kept.
    """
    parts: list[str] = []
    for position, part in enumerate(location):
        try:
            value = _member(value, part)
        except LookupError:
            if not (missing and position == len(location) - 1):
                continue
        parts.append("/" + str(part).replace("~", "~0").replace("/", "~1"))
    return "".join(parts)


def _member(value: Any, part: int | str) -> Any:
    if isinstance(value, dict):
        return value[part]
    if isinstance(value, list) and isinstance(part, int):
        return value[part]
    raise LookupError(part)


@lru_cache(maxsize=128)
def compiled(definition: str) -> type[BaseModel]:
    """The answers' model of a definition given as JSON; kept, since compiling one costs milliseconds."""
    return answers_model(list(FormDefinition.model_validate_json(definition).fields))


__all__ = [
    "AnyField",
    "Fields",
    "FormDefinition",
    "ValidationError",
    "answers_model",
    "check_answers",
    "compiled",
    "pointer",
]
