"""The fields of a form, as their author writes them, and the model that checks answers against them."""

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

#: A field's name is a key in the database, a column in the warehouse and a part of a JSON pointer.
NAME: Final = r"^[A-Za-z][A-Za-z0-9_]{0,62}$"
MAX_DEPTH: Final = 4
MAX_FIELDS: Final = 500
_MAX_NUMBER: Final = 1e15

Name = Annotated[str, StringConstraints(pattern=NAME)]
Label = Annotated[str, StringConstraints(max_length=500)]


class _Field(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    label: Label = ""
    help: Annotated[str, StringConstraints(max_length=2000)] = ""
    required: bool = False


class TextField(_Field):
    """One line."""

    type: Literal["text"]
    max_length: int = Field(500, ge=1, le=5_000)
    pattern: Annotated[str, StringConstraints(max_length=200)] | None = None
    """A regular expression in RE2's safe dialect (linear time); the whole text must match."""

    @model_validator(mode="after")
    def _pattern_compiles(self) -> "TextField":
        if self.pattern is not None:
            try:
                create_model("Probe", probe=(Annotated[str, Field(pattern=self.pattern)], ...))
            except Exception:
                raise ValueError(
                    "pattern is not a regular expression of the linear-time dialect (no look-around)"
                ) from None
        return self


class LongTextField(_Field):
    """Many lines."""

    type: Literal["long_text"]
    max_length: int = Field(20_000, ge=1, le=500_000)


class NumberField(_Field):
    type: Literal["number"]
    minimum: float | None = Field(None, ge=-_MAX_NUMBER, le=_MAX_NUMBER)
    maximum: float | None = Field(None, ge=-_MAX_NUMBER, le=_MAX_NUMBER)
    integer: bool = False


class Option(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    value: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    label: Label = ""


class ChoiceField(_Field):
    """One of some options."""

    type: Literal["choice"]
    options: list[Option] = Field(min_length=1, max_length=500)


class MultipleChoiceField(_Field):
    """Any of some options, each at most once."""

    type: Literal["multiple_choice"]
    options: list[Option] = Field(min_length=1, max_length=500)
    min_chosen: int = Field(0, ge=0, le=500)
    max_chosen: int | None = Field(None, ge=1, le=500)


class EmailField(_Field):
    type: Literal["email"]


class DateField(_Field):
    """A calendar day, `YYYY-MM-DD`."""

    type: Literal["date"]
    earliest: date | None = None
    latest: date | None = None


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

    @model_validator(mode="after")
    def _names_differ(self) -> "GroupField":
        check_names(self.fields)
        return self


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


def check_names(fields: list[Any]) -> None:
    """Raises ValueError when two fields of one group share a name, or for too many or too deeply nested ones."""
    names = [field.name for field in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"field names must differ; found twice: {', '.join(twice)}")
    if _depth(fields) > MAX_DEPTH:
        raise ValueError(f"groups may nest {MAX_DEPTH - 1} deep")
    if _count(fields) > MAX_FIELDS:
        raise ValueError(f"a form may have {MAX_FIELDS} fields")


def _depth(fields: list[Any]) -> int:
    return 1 + max((_depth(field.fields) for field in fields if isinstance(field, GroupField)), default=0)


def _count(fields: list[Any]) -> int:
    return sum(1 + (_count(field.fields) if isinstance(field, GroupField) else 0) for field in fields)


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
                    min_length=1 if field.required else 0, max_length=field.max_length, pattern=_anchored(field.pattern)
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
            low = -_MAX_NUMBER if field.minimum is None else field.minimum
            high = _MAX_NUMBER if field.maximum is None else field.maximum
            return Annotated[int, Field(ge=low, le=high)] if field.integer else Annotated[float, Field(ge=low, le=high)]
        case ChoiceField():
            return Literal[tuple(option.value for option in field.options)]
        case MultipleChoiceField():
            chosen: Any = Literal[tuple(option.value for option in field.options)]
            most = field.max_chosen or len(field.options)
            fewest = max(field.min_chosen, 1 if field.required else 0)
            return Annotated[list[chosen], Field(min_length=fewest, max_length=most), AfterValidator(_each_once)]
        case EmailField():
            return Annotated[EmailStr, Field(max_length=254)]
        case DateField():
            first, last = field.earliest or date(1, 1, 1), field.latest or date(9999, 12, 31)
            return Annotated[date, Field(ge=first, le=last, strict=False), BeforeValidator(_iso_day)]
        case RatingField():
            return Annotated[int, Field(ge=1, le=field.scale)]
        case ConsentField():
            return Literal[True] if field.required else bool
        case GroupField():
            group: Any = answers_model(field.fields, name)
            fewest = 1 if field.required else 0
            if not field.repeated:
                return group
            return Annotated[list[group], Field(min_length=fewest, max_length=field.max_items)]
    raise TypeError(f"no rule for {type(field).__name__}")


def _anchored(pattern: str | None) -> str | None:
    return f"^(?:{pattern})$" if pattern else None


def _without_nul(value: Any) -> Any:
    if isinstance(value, str) and "\x00" in value:
        raise ValueError("a NUL character is not text")
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
    if not isinstance(value, str) or len(value) != 10:
        raise ValueError("expected a day as YYYY-MM-DD")
    return date.fromisoformat(value) if value.isascii() else value


class FormDefinition(BaseModel):
    """What a version of a form asks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fields: list[AnyField] = Field(min_length=1, max_length=MAX_FIELDS)

    @model_validator(mode="after")
    def _names_differ(self) -> "FormDefinition":
        check_names(self.fields)
        return self


def check_answers(model: type[BaseModel], answers: Any) -> dict[str, Any]:
    """The answers as they are stored: validated, days as `YYYY-MM-DD`, nothing that was not sent.

    Raises:
        ValidationError: with the place of each fault in `loc`.
    """
    return model.model_validate(answers).model_dump(mode="json", by_alias=True, exclude_unset=True)


def pointer(location: tuple[int | str, ...]) -> str:
    """A JSON pointer (RFC 6901) to a fault's place."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


@lru_cache(maxsize=512)
def compiled(definition: str) -> type[BaseModel]:
    """The answers' model of a definition given as JSON; kept, since compiling one costs milliseconds."""
    return answers_model(list(FormDefinition.model_validate_json(definition).fields))


__all__ = ["AnyField", "FormDefinition", "ValidationError", "answers_model", "check_answers", "compiled", "pointer"]
