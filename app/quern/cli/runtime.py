"""The runtime of a command: made once, from the environment."""

from functools import lru_cache

import click

from quern.config import LiveSettings, SettingsError
from quern.runtime import Runtime


@lru_cache(maxsize=1)
def open_runtime() -> Runtime:
    """The runtime; a wrong setting ends the command with its name, what is wrong and an example."""
    try:
        return Runtime(LiveSettings())
    except SettingsError as error:
        raise click.ClickException(f"the configuration is not usable:\n{error}") from None
