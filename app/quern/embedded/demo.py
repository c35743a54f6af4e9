"""`make demo`: the main job on real input, with real services and real small models, on one machine.

With `--check` it does not stay up, and exits 0 only if every result is really there and right.
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import time
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from types import FrameType
from typing import Any, Final

import httpcore2
import orjson
from jsonschema import Draft202012Validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from quern.embedded.process import ServiceError
from quern.embedded.stack import Stack
from quern.tenants import keys, tenant

TOPICS: Final = {
    "billing": "invoices, payments, refunds, being charged a wrong price",
    "delivery": "parcels, shipping, late or lost deliveries, waiting for an appointment to be kept",
    "staff": "friendly or rude employees, help by a person, how one was treated",
    "product quality": "an item that is broken, well made, durable, or does not work as it should",
    "website": "the web site, the app, logging in, forms, search and pages online",
}
EXTRACTED: Final = {
    "type": "object",
    "properties": {
        "order_number": {"type": ["string", "null"], "maxLength": 40},
        "wants_reply": {"type": "boolean"},
    },
    "required": ["order_number", "wants_reply"],
    "additionalProperties": False,
}
MAX_WORDS: Final = 40
DIMENSIONS: Final = 384
PATIENCE_SECONDS: Final = 1500
#: Of the English samples; guessing would get a fifth and a third.
LEAST_TOPICS_RIGHT: Final = 0.5
LEAST_SENTIMENTS_RIGHT: Final = 0.4

_ENGLISH = "en"


def _form(endpoint: str) -> dict[str, Any]:
    options = [{"value": name} for name in ("retail", "health", "energy", "education", "transport")]
    about = [{"value": name} for name in ("staff", "price", "waiting", "quality", "website")]
    body = (
        "Dear {{ answers.name | default('customer') }},\n\nthank you for your feedback. We understood:\n\n"
        "{{ results.summary.text }}\n\nYour reference is {{ response.id }}.\n"
    )
    return {
        "name": "Service feedback",
        "fields": [
            {"name": "name", "type": "text", "max_length": 200},
            {"name": "email", "type": "email"},
            {"name": "sector", "type": "choice", "options": options, "required": True},
            {"name": "visit_date", "type": "date"},
            {"name": "rating", "type": "rating", "scale": 5, "required": True},
            {"name": "topics", "type": "multiple_choice", "options": about},
            {"name": "comment", "type": "long_text", "max_length": 10_000, "required": True},
            {"name": "consent", "type": "consent", "required": True},
        ],
        "workflow": {
            "steps": [
                {"name": "summary", "type": "summarize", "fields": ["comment"], "max_words": MAX_WORDS},
                {"name": "topic", "type": "classify", "fields": ["comment"], "labels": TOPICS},
                {"name": "facts", "type": "extract", "fields": ["comment"], "json_schema": EXTRACTED, "max_tokens": 96},
                {"name": "mood", "type": "sentiment", "fields": ["comment"]},
                {"name": "vector", "type": "embed", "fields": ["comment"]},
                {
                    "name": "thanks",
                    "type": "email",
                    "needs": ["summary"],
                    "to": {"field": "email"},
                    "subject": "Your feedback on {{ form.name }}",
                    "body": body,
                },
                {
                    "name": "notify",
                    "type": "webhook",
                    "needs": ["summary", "topic", "facts", "mood", "vector"],
                    "after_failure": "run",
                    "endpoint": endpoint,
                },
            ]
        },
    }


@dataclass
class Client:
    """A client as any integrator would write it: HTTP and JSON, nothing else."""

    url: str
    key: str

    def call(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """The JSON answer. Raises RuntimeError for anything but 2xx."""
        given = [
            ("Authorization", f"Bearer {self.key}"),
            ("Content-Type", "application/json"),
            *(headers or {}).items(),
        ]
        with httpcore2.ConnectionPool() as pool:
            answer = pool.request(
                method, self.url + path, headers=given, content=orjson.dumps(body) if body is not None else None
            )
        if not 200 <= answer.status < 300:
            raise RuntimeError(f"{method} {path}: expected success, found {answer.status} {answer.content[:500]!r}")
        return orjson.loads(answer.content) if answer.content else None


@dataclass
class Demo:
    """The demo's course: one method a stage."""

    stack: Stack
    console: Console
    samples: list[dict[str, Any]] = field(default_factory=list)
    responses: dict[str, dict[str, Any]] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    forged: list[str] = field(default_factory=list)
    seen: int = 0

    def prepare(self) -> None:
        """Tenant, keys, webhook endpoint, and the published form."""
        db = self.stack.runtime.store.db
        made = tenant.create(db, "demo", requests_per_minute=0)
        _, self.key = keys.create(db, made["_id"], "demo secret")
        self.client = Client(self.stack.url, self.key)
        publishable = self.client.call("POST", "/api/v1/keys", {"name": "demo web page", "kind": "publishable"})
        self.publishable_key: str = publishable["key"]
        hook = self.client.call("POST", "/api/v1/webhooks", {"url": f"{self.stack.receiver.url}/quern"})
        self.secret: str = hook["secret"]
        form = self.client.call("POST", "/api/v1/forms", _form(hook["id"]))
        self.form: str = form["id"]
        self.client.call("POST", f"/api/v1/forms/{self.form}/publish")

    def write_environment(self, path: Path) -> None:
        """`.demo/env`, readable by its owner only: any outside client can be pointed at the demo with it."""
        values = {
            "QUERN_URL": self.stack.url,
            "QUERN_API_KEY": self.key,
            "QUERN_PUBLISHABLE_KEY": self.publishable_key,
            "QUERN_FORM_ID": self.form,
            "QUERN_WEBHOOK_SECRET": self.secret,
        }
        path.parent.mkdir(exist_ok=True, mode=0o700)
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.writelines(f"{name}={shlex.quote(value)}\n" for name, value in values.items())

    def submit(self) -> None:
        """Every sample, by the publishable key, as a web page would."""
        text = (files("quern.embedded") / "samples" / "feedback.jsonl").read_text()
        self.samples = [orjson.loads(line) for line in text.splitlines()]
        page = Client(self.stack.url, self.publishable_key)
        for number, sample in enumerate(self.samples):
            accepted = page.call(
                "POST",
                f"/api/v1/forms/{self.form}/responses",
                {"answers": sample["answers"]},
                {"Idempotency-Key": f"demo-{number}"},
            )
            self.responses[accepted["id"]] = {"sample": sample}

    def follow(self) -> None:
        """Show progress until every job has ended. Raises TimeoutError after PATIENCE_SECONDS."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        said = 0.0
        with Progress(*columns, console=self.console, disable=not self.console.is_terminal) as progress:
            bar = progress.add_task("AI, email, webhooks", total=0)
            while True:
                self.verify_webhooks()
                steps = self._steps()
                ended = sum(count for state, count in steps.items() if state not in ("blocked", "queued", "running"))
                total = sum(steps.values())
                progress.update(bar, total=total, completed=ended)
                if not self.console.is_terminal and time.monotonic() - said > 5:
                    said = time.monotonic()
                    self.console.print(f"  {ended} of {total} jobs ended")
                if ended == total:
                    self.verify_webhooks()
                    return
                if time.monotonic() > deadline:
                    raise TimeoutError(f"expected all jobs to end within {PATIENCE_SECONDS} s, found {steps}")
                time.sleep(0.5)

    def _steps(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        cursor = ""
        while True:
            page = self.client.call("GET", f"/api/v1/forms/{self.form}/responses?limit=200{cursor}")
            for item in page["items"]:
                for job in item["jobs"]:
                    counts[job["status"]] = counts.get(job["status"], 0) + 1
            if page["next_cursor"] is None:
                return counts
            cursor = f"&cursor={page['next_cursor']}"

    def collect(self) -> None:
        """Read every enriched response as a client would."""
        for identity, known in self.responses.items():
            known["response"] = self.client.call("GET", f"/api/v1/responses/{identity}")

    def check(self) -> list[str]:
        """What is missing or wrong; empty when every result is there and right."""
        faults: list[str] = []
        for identity, known in self.responses.items():
            faults += [f"{identity}: {fault}" for fault in self._faults(known["response"], known["sample"])]
        english = [known for known in self.responses.values() if known["sample"]["language"] == _ENGLISH]
        for step, expected, least in (
            ("topic", "topic", LEAST_TOPICS_RIGHT),
            ("mood", "sentiment", LEAST_SENTIMENTS_RIGHT),
        ):
            share = self.share_right(english, step, expected)
            if share < least:
                faults.append(f"{step}: expected at least {least:.0%} of the English labels right, found {share:.0%}")
        faults += self.forged
        if missing := self.responses.keys() - self.verified:
            faults.append(f"{len(missing)} responses have no webhook with a valid signature")
        return faults

    @staticmethod
    def share_right(known: list[dict[str, Any]], step: str, expected: str) -> float:
        """Share of the labels of `step` that equal what a person expects."""
        right = [
            item["response"]["results"].get(step, {}).get("label") == item["sample"]["expected"][expected]
            for item in known
        ]
        return right.count(True) / len(right)

    def _faults(self, response: dict[str, Any], sample: dict[str, Any]) -> list[str]:
        faults = []
        results = response["results"]
        if response["status"] != "processed":
            faults.append(f"expected status processed, found {response['status']}")
        if response["answers"] != sample["answers"]:
            faults.append("the answers are not what was sent")
        summary = results.get("summary", {}).get("text", "")
        if not summary or len(summary.split()) > MAX_WORDS + 1:
            faults.append(f"summary: expected 1 to {MAX_WORDS} words, found {len(summary.split())}")
        if results.get("topic", {}).get("label") not in TOPICS:
            faults.append("topic: not one of the labels")
        if not Draft202012Validator(EXTRACTED).is_valid(results.get("facts", {}).get("data")):
            faults.append("facts: not valid against the schema")
        if results.get("mood", {}).get("label") not in ("positive", "neutral", "negative"):
            faults.append("mood: not a sentiment")
        vector = results.get("vector", {}).get("vector", [])
        if len(vector) != DIMENSIONS or not math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-3):
            faults.append(f"vector: expected {DIMENSIONS} numbers of length 1, found {len(vector)}")
        return faults + self._mail_faults(response, summary)

    def _mail_faults(self, response: dict[str, Any], summary: str) -> list[str]:
        message_id = response["results"].get("thanks", {}).get("message_id")
        got = [item for item in self.stack.smtp.messages if item.message["Message-ID"] == message_id]
        if not got:
            return ["email: none arrived with the Message-ID that the result names"]
        mail = got[0].message
        if mail["To"] != response["answers"]["email"]:
            return ["email: another recipient"]
        body = mail.get_content()
        return [] if summary in body.replace("\r\n", "\n") and response["id"] in body else ["email: another text"]

    def verify_webhooks(self) -> None:
        """Check the signatures of what the receiver got since the last call: a signature is valid for five minutes."""
        verifier = Webhook(self.secret)
        requests = self.stack.receiver.requests
        for request in requests[self.seen :]:
            headers = {name.lower(): value for name, value in request.headers.items()}
            try:
                payload = verifier.verify(request.body, headers)
            except WebhookVerificationError as error:
                self.forged.append(f"webhook: {error}")
                continue
            with contextlib.suppress(WebhookVerificationError):
                verifier.verify(request.body.replace(b"processed", b"forged"), headers)
                self.forged.append("webhook: a forged body passed the verification")
            self.verified.add(payload["data"]["id"])
        self.seen = len(requests)

    def show(self) -> None:
        """Some enriched responses, an email and a webhook as they were received."""
        say = self.console.print
        for known in list(self.responses.values())[:: max(1, len(self.responses) // 6)][:6]:
            results = known["response"]["results"]
            say()
            say(f"[bold]{known['response']['id']}[/bold] ({known['sample']['language']})", highlight=False)
            say(
                textwrap.shorten(known["sample"]["answers"]["comment"], 160), markup=False, style="dim", highlight=False
            )
            for name, shown in (
                ("summary", results.get("summary", {}).get("text")),
                ("topic", results.get("topic", {}).get("label")),
                ("sentiment", results.get("mood", {}).get("label")),
                ("extracted", orjson.dumps(results.get("facts", {}).get("data")).decode()),
                ("embedding", f"{len(results.get('vector', {}).get('vector', []))} dimensions"),
            ):
                say(f"  {name:10} {shown}", markup=False, highlight=False)
        known_all = list(self.responses.values())
        english = [known for known in known_all if known["sample"]["language"] == _ENGLISH]
        say()
        for name, step, expected in (("topics", "topic", "topic"), ("sentiments", "mood", "sentiment")):
            shares = (self.share_right(english, step, expected), self.share_right(known_all, step, expected))
            say(f"{name} as a person labelled them: {shares[0]:.0%} in English, {shares[1]:.0%} in all languages")
        say("\n[bold]An email as received[/bold]")
        say(self.stack.smtp.messages[0].message.as_string(), markup=False, highlight=False)
        for part in self.stack.smtp.messages[0].message.walk():
            if part.get_content_type() == "text/plain":
                say(textwrap.indent(str(part.get_content()), "  | "), markup=False, highlight=False)
        say("[bold]A webhook as received[/bold]")
        request = self.stack.receiver.requests[0]
        for name, value in request.headers.items():
            say(f"{name}: {value}", markup=False, highlight=False, overflow="fold")
        say(textwrap.shorten(request.body.decode(), 700), markup=False, highlight=False)
        say(f"[green]{len(self.verified)} webhooks came with a valid signature; a forged body was refused[/green]")

    def invite(self, environment: Path) -> None:
        """How to go on by hand."""
        form, url = self.form, self.stack.url
        body = '{"answers": {"sector": "health", "rating": 2, "comment": "I waited two hours.", "consent": true}}'
        self.console.print(
            textwrap.dedent(f"""
            URL              {url}        (try the API at {url}/api/docs)
            secret key       {self.key}
            publishable key  {self.publishable_key}
            form             {form}
            webhook secret   {self.secret}
            All of it is in {environment}: . {environment}

            curl -sS {url}/api/v1/forms/{form}/responses \\
              -H 'Authorization: Bearer {self.publishable_key}' -H 'Content-Type: application/json' \\
              -d '{body}'
            curl -sS {url}/api/v1/forms/{form}/responses?limit=1 -H 'Authorization: Bearer {self.key}'

            python3 -c '
            import json, urllib.request as u
            headers = {{"Authorization": "Bearer {self.key}", "Content-Type": "application/json"}}
            ask = lambda path, body=None: json.load(u.urlopen(u.Request("{url}" + path, body, headers)))
            made = ask("/api/v1/forms/{form}/responses", json.dumps({body.replace("true", "True")}).encode())
            print(made["id"], "follow it:", made["jobs"][0]["events"])'
            """),
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--check", action="store_true", help="do not stay up; exit 0 only if every result is right")
    parser.add_argument("--environment", type=Path, default=Path(".demo/env"), help="default: %(default)s")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    console = Console(soft_wrap=False, width=None if sys.stdout.isatty() else 120)
    directory = Path(tempfile.mkdtemp(prefix="quern-"))
    stack = Stack(directory, announce=lambda text: console.print(f"  {text}", style="dim"))
    try:
        console.print("[bold]Starting Quern[/bold]")
        stack.start()
        return _run(Demo(stack, console), console, arguments)
    except KeyboardInterrupt:
        console.print("stopping")
        return 0 if not arguments.check else 130
    except (ServiceError, RuntimeError, TimeoutError) as error:
        console.print(f"The demo failed: {error}", style="red", markup=False)
        return 1
    finally:
        # A second interrupt must not leave anything running.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        stack.stop()
        shutil.rmtree(directory, ignore_errors=True)
        arguments.environment.unlink(missing_ok=True)


def _run(demo: Demo, console: Console, arguments: argparse.Namespace) -> int:
    demo.prepare()
    demo.write_environment(arguments.environment)
    console.print("[bold]Submitting[/bold]")
    demo.submit()
    console.print(f"  {len(demo.samples)} responses acknowledged")
    demo.follow()
    demo.collect()
    demo.show()
    faults = demo.check()
    for fault in faults:
        console.print(f"WRONG: {fault}", style="red", markup=False)
    if not faults:
        console.print(f"\n[green]All right: {len(demo.responses)} responses enriched, mailed and delivered.[/green]")
    if arguments.check:
        return 1 if faults else 0
    demo.invite(arguments.environment)
    console.print("[bold]Quern stays up until you press Ctrl-C.[/bold]")
    while True:
        signal.pause()


if __name__ == "__main__":
    sys.exit(main())
