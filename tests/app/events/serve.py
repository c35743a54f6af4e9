"""The events process as the tests run it: the real one, with keys from a file instead of the tenants' collection.

`serve.py SETTINGS KEYS`: both JSON files. KEYS, read again at each request, maps an Authorization header to
`{"tenant": …, "scopes": […]}`; `null` stands for a database that is away.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pymongo.errors import AutoReconnect

from quern.config import LiveSettings, Settings
from quern.events.authentication import Principal
from quern.events.server import main
from quern.observe import logs


@dataclass(frozen=True)
class Caller:
    tenant: str
    scopes: frozenset[str]


if __name__ == "__main__":
    settings, keys = (Path(name) for name in sys.argv[1:])

    async def authenticate(header: str | None) -> Principal | None:
        known = json.loads(keys.read_text())
        if known is None:
            raise AutoReconnect("the keys cannot be read")
        found = known.get(header)
        return Caller(found["tenant"], frozenset(found["scopes"])) if found else None

    logs.configure("events", "info")
    main(LiveSettings(Settings.model_validate_json(settings.read_text())), authenticate)
