"""How good are the estimates of the time left? `python -m bench.estimates [--jobs 200] [--seed 1]`

The whole service with real models works on responses that come in bursts; each has seven steps of different kinds and
cost (AI, email, webhook). Each job is asked once, by `GET /api/v1/jobs/{id}` while it waits or runs, how long it will
take; when it has ended, the answer is compared with how long it took. The error is |estimate - actual| / actual; its
median over all jobs is to be at most 30 %. Means are learned from a warm-up that is not counted.
"""

import argparse
import random
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import httpcore2
import orjson

from quern.embedded.receiver import Answer
from quern.embedded.stack import Stack, temporary_stack
from quern.tenants import keys, tenant

TARGET = 0.30
STEPS = 7


@dataclass(frozen=True)
class Sample:
    """What was said of a job at a moment (UTC), and how it came out; times in seconds."""

    kind: str
    state: str
    place: int | None
    estimate: float
    actual: float

    @property
    def error(self) -> float:
        """Relative to the actual time."""
        return abs(self.estimate - self.actual) / self.actual


class Client:
    """The API, for one key."""

    def __init__(self, url: str, key: str) -> None:
        self._url = url
        self._headers = [("Authorization", f"Bearer {key}"), ("Content-Type", "application/json")]
        self._pool = httpcore2.ConnectionPool()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON answer; None for 404. Raises RuntimeError for anything else but 2xx."""
        content = orjson.dumps(body) if body is not None else None
        answer = self._pool.request(method, self._url + path, headers=self._headers, content=content)
        if answer.status == 404:
            return None
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {answer.content[:300]!r}")
        return orjson.loads(answer.content) if answer.content else None


def workflow(endpoint: str) -> dict[str, Any]:
    """Seven steps that need nothing of each other, so that all of them queue at once."""
    schema = {
        "type": "object",
        "properties": {"wants_reply": {"type": "boolean"}},
        "required": ["wants_reply"],
        "additionalProperties": False,
    }
    labels = {"billing": "invoices and payments", "delivery": "parcels and shipping", "staff": "employees"}
    mail = {"to": ["desk@example.org"], "subject": "Hello", "body": "{{ answers.comment }}"}
    return {
        "steps": [
            {"name": "gist", "type": "summarize", "max_words": 12},
            {"name": "facts", "type": "extract", "json_schema": schema, "max_tokens": 32},
            {"name": "topic", "type": "classify", "labels": labels},
            {"name": "mood", "type": "sentiment"},
            {"name": "vector", "type": "embed"},
            {"name": "mail", "type": "email"} | mail,
            {"name": "hook", "type": "webhook", "endpoint": endpoint},
        ]
    }


def prepare(stack: Stack) -> tuple[Client, str]:
    """A tenant without a limit and a published form; returns its client and the form."""
    db = stack.runtime.store.db
    made = tenant.create(db, "bench", requests_per_minute=0)
    _, key = keys.create(db, made["_id"], "bench")
    client = Client(stack.url, key)
    hook = client.call("POST", "/api/v1/webhooks", {"url": f"{stack.receiver.url}/bench"})
    fields = [{"name": "comment", "type": "long_text", "required": True}]
    draft = {"name": "Bench", "fields": fields, "workflow": workflow(hook["id"])}
    form: str = client.call("POST", "/api/v1/forms", draft)["id"]
    client.call("POST", f"/api/v1/forms/{form}/publish")
    return client, form


def texts() -> list[str]:
    """Real feedback, the package's own samples."""
    lines = (files("quern.embedded") / "samples" / "feedback.jsonl").read_text().splitlines()
    return [orjson.loads(line)["answers"]["comment"] for line in lines]


def submit(client: Client, form: str, text: str) -> dict[str, str]:
    """Submit one response; job identifier to step."""
    accepted = client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": text}})
    return {job["id"]: job["step"] for job in accepted["jobs"]}


def wait_for_end(stack: Stack) -> None:
    """Until no job waits or runs; at most 15 minutes."""
    db = stack.runtime.store.db
    deadline = time.monotonic() + 900
    left = {"state": {"$in": ["blocked", "queued", "running"]}}
    while db.responses.find_one({"outbox.at": {"$exists": True}}) or db.jobs.find_one(left):
        if time.monotonic() > deadline:
            raise TimeoutError("expected all jobs to end within 15 minutes")
        time.sleep(0.1)


Asked = dict[str, tuple[datetime, str, int | None, float]]


def ask(client: Client, jobs: list[str], asked: Asked) -> None:
    """Ask each job once how long it will take; a job that has ended already is left out."""
    waiting = list(jobs)
    while waiting:
        still = []
        for job in waiting:
            found = client.call("GET", f"/api/v1/jobs/{job}")
            if found is None:
                still.append(job)
            elif found["seconds_left"] is not None:
                asked[job] = (datetime.now(UTC), found["status"], found["place"], found["seconds_left"])
        waiting = still
        time.sleep(0.01)


def measure(stack: Stack, jobs: int, seed: int) -> list[Sample]:
    """Samples of at least `jobs` jobs, but for those that end while they are asked."""
    rng = random.Random(seed)
    client, form = prepare(stack)
    comments = texts()
    rng.shuffle(comments)
    for text in comments[:12]:
        submit(client, form, text)
    wait_for_end(stack)
    asked: Asked = {}
    kinds: dict[str, str] = {}
    while len(asked) < jobs:
        burst: list[str] = []
        for _ in range(rng.randint(1, 8)):
            made = submit(client, form, rng.choice(comments))
            kinds |= made
            burst += made
        rng.shuffle(burst)
        ask(client, burst, asked)
        time.sleep(rng.uniform(0.5, 4.0))
    wait_for_end(stack)
    samples = []
    for job, (at, state, place, seconds) in asked.items():
        ended = stack.runtime.store.db.jobs.find_one({"_id": job})
        if ended is not None and ended["state"] == "done" and ended["ended"] > at:
            samples.append(Sample(kinds[job], state, place, seconds, (ended["ended"] - at).total_seconds()))
    print(f"jobs {len(kinds)}; ended before they could be asked {len(kinds) - len(asked)}; compared {len(samples)}")
    return samples


def report(samples: list[Sample]) -> float:
    """Print the errors by step and by state; returns the median of all."""
    groups: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.kind].append(sample)
        groups[f"while {sample.state}"].append(sample)
    groups["all"] = samples
    print(f"{'':<16} {'jobs':>5} {'actual s (median)':>18} {'estimate s (median)':>20} {'error (median)':>15}")
    for name, group in groups.items():
        actual, estimate, error = (
            statistics.median(getattr(sample, what) for sample in group) for what in ("actual", "estimate", "error")
        )
        print(f"{name:<16} {len(group):>5} {actual:>18.2f} {estimate:>20.2f} {error:>15.0%}")
    return statistics.median(sample.error for sample in samples)


def main() -> int:
    """Exit 0 only if the median error is at most TARGET."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    with temporary_stack() as stack:
        stack.receiver.default = Answer(delay=0.2)
        error = report(measure(stack, given.jobs, given.seed))
    print(f"median absolute error: {error:.0%} (target: at most {TARGET:.0%})")
    return 0 if error <= TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
