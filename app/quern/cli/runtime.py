"""The runtime of a command: made once, from the environment."""

from functools import lru_cache

from quern.config import LiveSettings
from quern.runtime import Runtime


@lru_cache(maxsize=1)
def open_runtime() -> Runtime:
    """The runtime. Raises SettingsError for a wrong setting, with its name, what is wrong and an example."""
    return Runtime(LiveSettings())
