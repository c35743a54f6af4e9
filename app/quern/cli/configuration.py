"""`quern config check`: whether a release takes the settings in its environment, before anything runs by them."""

import os
import typing
from collections.abc import Mapping
from typing import Final

import click
from pydantic import BaseModel, ValidationError

from quern.cli.output import emit_json, json_option
from quern.config import PREFIX, Settings, SettingsError, load

_ENGINE: Final = f"{PREFIX}ENGINE_"
#: Read by scripts and by single processes, not by `Settings`.
_OTHERS: Final = {"CACHE", "CLICKHOUSE_PASSWORD", "ENV_FILE", "MONGOD", "REDIS_CACHE_URL", "RELEASE"}
#: What is secret reaches each process by itself, and is none of this command's business.
_PLACEHOLDERS: Final = {
    f"{PREFIX}MONGODB_URI": "mongodb://localhost",
    f"{PREFIX}REDIS_QUEUE_URL": "redis://localhost",
}


@click.group("config")
def config_group() -> None:
    """The settings in this process's environment."""


@config_group.command("check")
@json_option
def check(as_json: bool) -> None:
    """Judge every setting without a secret, a database or a socket; exit status 1 names what this release refuses."""
    found = faults(os.environ)
    if as_json:
        emit_json(found)
    else:
        click.echo("\n".join(found) or "Every setting is one that this release takes.")
    if found:
        raise click.exceptions.Exit(1)


def faults(environment: Mapping[str, str]) -> list[str]:
    """One line a setting that is wrong, or that no part of this release reads."""
    for name, value in _PLACEHOLDERS.items():
        os.environ.setdefault(name, value)
    found = [
        f"{name}: expected the name of a setting, found one that nothing reads; app/quern/config.py has them all."
        for name in sorted(environment)
        if name.startswith(PREFIX) and not _is_known(name)
    ]
    try:
        load()
    except SettingsError as error:
        found += str(error).splitlines()
    return found + _engine_faults()


def _engine_faults() -> list[str]:
    from quern.inference.settings import EngineSettings

    try:
        EngineSettings()
    except ValidationError as error:
        wrong = error.errors(include_input=False)
        return [f"{_ENGINE}{'_'.join(map(str, item['loc'])).upper()}: {item['msg']}." for item in wrong]
    return []


def _is_known(name: str) -> bool:
    from quern.inference.settings import EngineSettings

    bare = name.removeprefix(PREFIX)
    if bare in _OTHERS:
        return True
    if name.startswith(_ENGINE) and name.removeprefix(_ENGINE).lower() in EngineSettings.model_fields:
        return True
    return _leads_somewhere(Settings, bare.lower().split("__"))


def _leads_somewhere(model: type[BaseModel], path: list[str]) -> bool:
    """Whether the names of a path are fields, each of the model that the one before holds."""
    field = model.model_fields.get(path[0])
    if field is None:
        return False
    if len(path) == 1:
        return True
    kinds = [field.annotation, *typing.get_args(field.annotation)]
    inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return inner is not None and _leads_somewhere(inner, path[1:])
