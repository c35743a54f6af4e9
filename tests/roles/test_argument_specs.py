"""Every input of every role is typed and explained, and the defaults are what the specification says."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.roles.rendering import ROLES, specification

_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (float, int),
    "list": (list,),
    "dict": (dict,),
    "path": (str,),
    "raw": (object,),
}
ROLE_NAMES = sorted(path.name for path in ROLES.iterdir())


def defaults(role: str) -> dict[str, Any]:
    path = ROLES / role / "defaults/main.yml"
    return (yaml.safe_load(path.read_text()) or {}) if path.exists() else {}


@pytest.mark.parametrize("role", ROLE_NAMES)
def test_every_default_is_specified(role: str) -> None:
    assert set(defaults(role)) - set(specification(ROLES / role)) == set()


@pytest.mark.parametrize("role", ROLE_NAMES)
def test_every_input_has_a_default_or_is_required(role: str) -> None:
    lacking = [
        name
        for name, option in specification(ROLES / role).items()
        if name not in defaults(role) and not option.get("required")
    ]
    assert lacking == []


@pytest.mark.parametrize("role", ROLE_NAMES)
def test_every_input_is_named_typed_and_explained(role: str) -> None:
    for name, option in specification(ROLES / role).items():
        assert name.startswith(f"{role}_"), name
        assert option["type"] in _TYPES, name
        assert option["description"].strip(), name
        if option["type"] == "list":
            assert "elements" in option, name


@pytest.mark.parametrize("role", ROLE_NAMES)
def test_defaults_are_of_their_type_and_choice(role: str) -> None:
    given = defaults(role)
    for name, option in specification(ROLES / role).items():
        value = given.get(name)
        if value is None or (isinstance(value, str) and "{{" in value):
            continue
        assert isinstance(value, _TYPES[option["type"]]), f"{name}: {value!r} is no {option['type']}"
        assert value in option.get("choices", [value]), name
        # Said twice, it must be the same twice.
        assert option.get("default", value) == value, name


@pytest.mark.parametrize("role", ROLE_NAMES)
def test_every_template_is_used(role: str) -> None:
    """A template that no task names is dead, or its task's list forgot it."""
    tasks = "\n".join(path.read_text() for path in (ROLES / role).glob("*/*.yml"))
    folder = ROLES / role / "templates"
    unused = [
        path for path in folder.glob("**/*.j2") if not any(word in tasks for word in _names(path.relative_to(folder)))
    ]
    assert unused == []


def _names(path: Path) -> list[str]:
    plain = str(path).removesuffix(".j2")
    return [plain, f"{path.name}", path.name.removesuffix(".j2")]
