"""`python -m quern.analytics.beforehand`: answer what will be asked, in a process that ends with it.

What DuckDB took once, its process keeps: so the one that serves opens it only for a question that nobody foresaw. The
answers wait in Redis `cache`; nothing runs for long, and whoever waits for an answer goes first.
"""

import contextlib
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

_log = logging.getLogger(__name__)

_NICE: Final = 10
#: Where memory ends, this process goes, and not the one that somebody waits for (proc_pid_oom_score_adj(5)).
_GIVES_WAY: Final = "500"


class BeforehandError(Exception):
    """The process failed; its own log says why."""


def answer_in_a_process(stop: threading.Event) -> int:
    """Start one with this process's settings, and wait for it; `stop` ends it.

    Returns how many questions were not kept yet. Raises BeforehandError.
    """
    command = [sys.executable, "-P", "-m", __name__]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        while True:
            try:
                said, _ = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                if stop.is_set():
                    process.kill()
    if stop.is_set():
        return 0
    if process.returncode:
        raise BeforehandError(f"expected the process to end with 0, found {process.returncode}")
    return int(said)


def main() -> None:
    """Answer, and say how many answers were not kept yet."""
    # A unit's sandbox may refuse either.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_GIVES_WAY)
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    from quern.analytics.service import ProcessSettings, make_desk
    from quern.observe import logs

    settings = ProcessSettings()
    logs.configure("analytics", settings.log_level)
    sys.stdout.write(f"{make_desk(settings).answer_beforehand(threading.Event())}\n")


if __name__ == "__main__":
    main()
