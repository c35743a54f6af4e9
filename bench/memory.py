"""Memory at rest of Quern's own processes, by process: summed PSS, from /proc/PID/smaps_rollup.

PSS counts a page that n processes share as 1/n of it in each, so the sum is what the machine holds. The processes are
started as the units start them (roles/app), beside a real mongod and Redis, which are not counted; nor is the engine,
which is not started. A host runs the API twice. What is not ours (nginx, exporters, Prometheus) is measured on a host:
docs/performance-host.md.

    .venv/bin/python bench/memory.py --seconds 60
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quern.analytics.client import AnalyticsClient
from quern.analytics.manifest import Manifest, NoWarehouseError
from quern.analytics.question import Measure, Question
from quern.analytics.service_settings import ServiceSettings
from quern.embedded.stack import Stack, temporary_stack

_SERVICES = {"mongod", "redis", "cache"}
_FIELDS = ("Pss", "Pss_Anon", "Pss_File")
#: Instances of a process on a host (roles/app), where it is not one.
_INSTANCES = {"api": 2}
#: How long the ETL, which a fresh warehouse calls for, may take before it is counted all the same.
_ETL_SECONDS = 180
UNFORESEEN = Question(measure=Measure.RESPONSES, grain="hour", dimensions=["form", "version"])


def family(process: int) -> Iterator[int]:
    """The process and its living descendants."""
    yield process
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from family(int(child))


def megabytes(process: int) -> list[float]:
    """The fields of one process. Raises OSError when it has ended."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]
    found = {name: int(rest.split()[0]) / 1024 for name, _, rest in (line.partition(":") for line in lines)}
    return [found[name] for name in _FIELDS]


def published(stack: Stack) -> int:
    """The generation of the warehouse; 0 before there is one."""
    try:
        return Manifest.load(stack.directory / "warehouse").generation
    except NoWarehouseError:
        return 0


def rest(stack: Stack, seconds: float) -> None:
    """Wait, and until the ETL, at work in a process of its own, has ended: that is no rest."""
    time.sleep(seconds)
    low, patience = stack.processes["worker-low"].pid, time.monotonic() + _ETL_SECONDS
    while low is not None and len(list(family(low))) > 1 and time.monotonic() < patience:
        time.sleep(0.5)


def show(stack: Stack, title: str) -> None:
    """The table of all processes."""
    total = 0.0
    print(f"\n{title}; generation of the warehouse: {published(stack)}")
    print(f"{'process':<18}{'of':>4}{'PSS':>9}{'private':>9}{'files':>9}   MB")
    for name, service in stack.processes.items():
        if name in _SERVICES or service.pid is None:
            continue
        members = [megabytes(process) for process in family(service.pid)]
        sums = [sum(column) for column in zip(*members, strict=True)]
        total += sums[0] * _INSTANCES.get(name, 1)
        print(f"{name:<18}{len(members):>4}" + "".join(f"{value:>9.1f}" for value in sums))
    twice = " and ".join(f"{name} × {count}" for name, count in _INSTANCES.items())
    print(f"sum, with {twice}: {total:.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="How long they rest before they are measured")
    parser.add_argument("--workers", type=int, default=2, help="Gunicorn workers, as on a host of two cores")
    arguments = parser.parse_args()
    with temporary_stack(with_engine=False, api_workers=arguments.workers) as stack:
        rest(stack, arguments.seconds)
        show(stack, "at rest")
        if not published(stack):
            etl = [sys.executable, "-m", "quern.cli.main", "etl", "run"]
            subprocess.run(etl, env={**os.environ, **stack.environment}, check=True, capture_output=True)
            rest(stack, arguments.seconds)
            show(stack, "after the first run of the ETL")
        settings = ServiceSettings(socket=Path(stack.environment["QUERN_ANALYTICS__SERVICE__SOCKET"]), patience=60)
        # A tenant without rows will do: the engine is opened all the same.
        AnalyticsClient(settings).page(UNFORESEEN, "nobody", 10, None)
        rest(stack, 5)
        show(stack, "after a question that nobody foresaw")


if __name__ == "__main__":
    main()
