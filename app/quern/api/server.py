"""Gunicorn, set up from the settings: threads for what answers at once (what waits is served by `quern.events`)."""

import gc
import os
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication

from quern.api.app import create_app
from quern.api.patience import worker_class
from quern.config import LiveSettings, Settings
from quern.observe import logs, traces
from quern.runtime import Runtime

#: Resident memory of one worker, in bytes, as measured, rounded up.
_WORKER_BYTES = 120 * 1024 * 1024
_SHARE_OF_MEMORY = 0.25


def default_workers(cores: int, memory_bytes: int) -> int:
    """2 × cores + 1, but no more than a quarter of the memory holds, and at least one."""
    return max(1, min(2 * cores + 1, int(memory_bytes * _SHARE_OF_MEMORY / _WORKER_BYTES)))


def _memory() -> int:
    """Bytes that this process's slice may use: the machine's, or the control group's limit (version 2)."""
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    place = Path("/sys/fs/cgroup") / group
    for folder in (place, *place.parents):
        limit = folder / "memory.max"
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            found.append(int(text))
    return min(found)


class Server(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    """The API's master process."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        options: dict[str, Any] = {
            "bind": settings.api_bind,
            "workers": settings.api_workers or default_workers(len(os.sched_getaffinity(0)), _memory()),
            "worker_class": worker_class(settings.api_receive_seconds),
            "threads": settings.api_threads,
            "timeout": 30,
            "graceful_timeout": 20,
            "keepalive": 30,
            # More than nginx takes, so that a longer one is refused by it with a problem document.
            "limit_request_line": 8190,
            "limit_request_fields": 60,
            "limit_request_field_size": 8190,
            "forwarded_allow_ips": "*",
            "proc_name": "quern-api",
            "accesslog": None,
            "errorlog": "-",
            "loglevel": "warning",
            "logger_class": "quern.api.server.Logger",
            "control_socket_disable": True,
            # The master makes the application, and its workers share what they never change of it.
            "preload_app": True,
            "when_ready": lambda _: gc.freeze(),
            "post_fork": _post_fork,
            "child_exit": _child_exit,
            "umask": 0o117,
        }
        for name, value in options.items():
            if name in self.cfg.settings:
                self.cfg.set(name, value)

    def load(self) -> Any:
        return create_app(Runtime(LiveSettings()))


def _post_fork(_server: Any, _worker: Any) -> None:
    from quern.config import load

    settings = load()
    logs.configure("api", settings.log_level, settings.log_file)
    traces.configure("api", settings.otlp_endpoint)


def _child_exit(_server: Any, worker: Any) -> None:
    if os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        from prometheus_client import multiprocess

        multiprocess.mark_process_dead(worker.pid)  # type: ignore[no-untyped-call]


class Logger:
    """Gunicorn's own messages through ours."""

    def __init__(self, _cfg: Any) -> None:
        import logging

        log = logging.getLogger("gunicorn")
        self.critical, self.error, self.warning = log.critical, log.error, log.warning
        self.info, self.debug, self.exception = log.debug, log.debug, log.exception
        self.log = log.log

    def access(self, *_: Any) -> None:
        """The application counts and logs requests itself."""

    def reopen_files(self) -> None: ...

    def close_on_exec(self) -> None: ...


def serve(settings: Settings) -> None:
    """Run the API until it is told to stop."""
    Server(settings).run()
