"""Many short requests through one engine, by hand: answers right to the last, and memory that stays flat.

Requests are mixed as life mixes them: chat, plain text, schemas, streams, several tenants, some dropped by their
client. With `--tiny` they are prompts of about eight tokens and answers of one or two, so that thousands take minutes.
Prints the model process's resident set along the way; ends with status 1 if it grew by more than
`--slack-mib` between the first tenth (when every cache has filled) and the end, or if anything is left waiting.

    .venv/bin/python tests/load/short_requests.py --requests 20000
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from quern.inference.client import EngineCancelled, EngineClient, EngineUnavailable
from quern.inference.protocol import GenerateRequest, Message, TokenEvent

SCHEMA = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}


def one(client: EngineClient, number: int) -> None:
    """One short request; which kind depends on its number."""
    tenant = f"t{number % 7}"
    match number % 5:
        case 0:
            asked = [Message(role="user", content=f"Say {number}.")]
            client.generate(GenerateRequest(tenant=tenant, messages=asked, max_tokens=4))
        case 1:
            client.generate(GenerateRequest(tenant=tenant, prompt=f"Number {number}", max_tokens=2, temperature=0.8))
        case 2:
            request = GenerateRequest(tenant=tenant, prompt="Is it? ", max_tokens=16, json_schema=SCHEMA)
            assert isinstance(client.generate(request).parsed["ok"], bool)
        case 3:
            request = GenerateRequest(tenant=tenant, prompt=f"{number} and so on and so on", max_tokens=3)
            *tokens, _ = client.stream(request)
            assert all(isinstance(token, TokenEvent) for token in tokens)
        case _:
            request = GenerateRequest(tenant=tenant, prompt="one two three four " * 4, max_tokens=64, priority="batch")
            try:
                client.generate(request, should_stop=lambda: True)
            except EngineCancelled:
                pass


def tiny(client: EngineClient, number: int) -> None:
    """One very short request: streamed, whole, or dropped by its client."""
    request = GenerateRequest(tenant=f"t{number % 7}", prompt=f"Number {number} is", max_tokens=1 + number % 2)
    match number % 5:
        case 0:
            assert 1 <= len(list(client.stream(request))) <= 3
        case 1:
            try:
                client.generate(request.model_copy(update={"max_tokens": 64}), should_stop=lambda: True)
            except EngineCancelled:
                pass
        case _:
            assert client.generate(request).completion_tokens <= 2


def resident_mib(pid: int) -> float:
    """The resident set of the engine's model process."""
    child = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()[0]
    pages = int(Path(f"/proc/{child}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--tiny", action="store_true", help="prompts of eight tokens, answers of one or two")
    parser.add_argument("--at-once", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3600.0, help="stop after this long, and say how many it were")
    parser.add_argument("--slack-mib", type=float, default=24.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        path = Path(folder) / "e.sock"
        values = {"EMBEDDING_MODEL": "", "CONTEXT": "4096", "BLAS": "false", "POLL": "0", "BATCH_SIZE": "256"}
        values |= {"MAX_SEQUENCES": str(max(8, arguments.at_once - 2)), "BLAS": str(arguments.tiny).lower()}
        environment = {**os.environ, **{f"QUERN_ENGINE_{name}": value for name, value in values.items()}}
        command = [sys.executable, "-m", "quern.inference.engine", "--socket", str(path)]
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        client = EngineClient(path)
        try:
            failures, seen = _run(client, process.pid, arguments)
        finally:
            process.terminate()
            process.wait(60)
    grown = seen[-1][1] - next(mib for count, mib in seen if count >= seen[-1][0] // 10)
    print(f"{seen[-1][0]} requests, {len(failures)} failed, resident set {grown:+.1f} MiB since the first tenth")
    if failures:
        print(failures[:5])
    sys.exit(bool(failures) or grown > arguments.slack_mib)


def _run(client: EngineClient, pid: int, arguments: argparse.Namespace) -> tuple[list[str], list[tuple[int, float]]]:
    for _ in range(1800):
        try:
            if client.health().status == "ready":
                break
        except EngineUnavailable:
            pass
        time.sleep(0.1)
    numbers, failures, seen = itertools.count(), [], []
    end = time.monotonic() + arguments.seconds
    done = [0]
    ask = tiny if arguments.tiny else one
    lock = threading.Lock()

    def work() -> None:
        while (number := next(numbers)) < arguments.requests and time.monotonic() < end:
            try:
                ask(client, number)
            except Exception as error:
                failures.append(f"{number}: {type(error).__name__}: {error}")
            with lock:
                done[0] += 1
                if done[0] % max(1, arguments.requests // 40) == 0 or done[0] == arguments.requests:
                    seen.append((done[0], resident_mib(pid)))
                    print(f"{done[0]} requests: {seen[-1][1]:.1f} MiB resident", flush=True)

    threads = [threading.Thread(target=work) for _ in range(arguments.at_once)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seen.append((done[0], resident_mib(pid)))
    # Dropped requests leave at the next step.
    for _ in range(100):
        left = client.stats()["quern_engine_live_sequences"]
        if not left:
            break
        time.sleep(0.1)
    if left:
        failures.append(f"{left:.0f} sequences are still there")
    return failures, seen


if __name__ == "__main__":
    main()
