"""`python -m quern.analytics`: the analytics service, in a process that loads nothing of MongoDB."""

import sys

from quern.analytics.service import NotConfiguredError, ProcessSettings, serve
from quern.observe import logs


def main() -> None:
    """Serve until told to stop; a wrong setting ends it with one line."""
    settings = ProcessSettings()
    logs.configure("analytics", settings.log_level)
    try:
        serve(settings)
    except NotConfiguredError as error:
        sys.exit(f"quern analytics: {error}")


if __name__ == "__main__":
    main()
