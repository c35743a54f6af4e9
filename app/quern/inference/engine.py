"""The engine: a UNIX socket in front of a supervised model process.

`main(settings)` runs it until SIGTERM or SIGINT; `python -m quern.inference.engine --socket PATH --models DIR` does the
same with settings from the command line on top of `QUERN_ENGINE_…`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import stat
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from quern.inference.modelpool import ModelPool
from quern.inference.protocol import (
    MAX_REQUEST_BYTES,
    REQUEST,
    ErrorEvent,
    FaultRequest,
    HealthRequest,
    ModelsRequest,
    ResultEvent,
    ServedModels,
    StatsRequest,
)
from quern.inference.settings import EngineSettings
from quern.inference.supervisor import Pending, Supervisor

log = logging.getLogger(__name__)

#: How long a client may take to send its request, in seconds.
REQUEST_TIMEOUT = 30.0
#: An event that a client does not take for this long cancels its request, in seconds.
SEND_TIMEOUT = 60.0


class Engine:
    """The socket's side of the engine."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._pool = ModelPool(settings)

    async def serve(self) -> None:
        """Serve until cancelled."""
        path = self._settings.socket
        listener = _listen(path, self._settings.socket_mode)
        server = await asyncio.start_unix_server(self._handle, sock=listener, limit=MAX_REQUEST_BYTES)
        supervision = asyncio.create_task(self._pool.run())
        log.info("the engine listens", extra={"socket": str(path)})
        try:
            await supervision
        finally:
            server.close()
            supervision.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await supervision
            path.unlink(missing_ok=True)

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while line := await asyncio.wait_for(reader.readline(), REQUEST_TIMEOUT):
                await self._answer(line, reader, writer)
        except ValueError:  # a line beyond the limit
            message = f"expected a request of at most {MAX_REQUEST_BYTES} bytes in one line, found more"
            with contextlib.suppress(ConnectionError):
                await _send(writer, ErrorEvent(kind="refused", message=message))
        except (ConnectionError, TimeoutError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def _answer(self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            body = REQUEST.validate_json(line)
        except ValidationError as error:
            await _send(writer, ErrorEvent(kind="refused", message=_explain(error)))
            return
        match body:
            case HealthRequest():
                await _send(writer, ResultEvent(data=self._pool.health.model_dump()))
            case ModelsRequest():
                await _send(writer, ResultEvent(data=ServedModels(models=self._pool.served()).model_dump()))
            case FaultRequest() if not self._settings.allow_fault_injection:
                await _send(writer, ErrorEvent(kind="refused", message="this engine takes no orders to fail"))
            case StatsRequest():
                await self._answer_stats(body, writer)
            case _:
                if isinstance(body, FaultRequest):
                    self._pool.remember_fault(body.model_dump())
                await self._relay(self._pool.submit(body), reader, writer)

    async def _answer_stats(self, body: StatsRequest, writer: asyncio.StreamWriter) -> None:
        values = self._pool.counters()
        ready = [one for one in self._pool.supervisors if one.health.status == "ready"]
        for found in await asyncio.gather(*(self._stats_of(one, body) for one in ready)):
            for name, value in found.items():
                values[name] = values.get(name, 0.0) + value
        named = {f"quern_engine_{name}": value for name, value in values.items()}
        named["quern_engine_up"] = float(self._pool.health.status == "ready")
        await _send(writer, ResultEvent(data={"values": named}))

    @staticmethod
    async def _stats_of(supervisor: Supervisor, body: StatsRequest) -> dict[str, float]:
        submitted = supervisor.submit(body)
        if not isinstance(submitted, Pending):
            return {}
        try:
            event = await asyncio.wait_for(submitted.events.get(), 2.0)
        except TimeoutError:
            return {}  # busy dying: what this side knows is better than nothing
        finally:
            submitted.drop()
        return dict(event.data["values"]) if isinstance(event, ResultEvent) else {}

    async def _relay(
        self, submitted: Pending | ErrorEvent, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Pass a request's events on, until it ends or the client goes away."""
        if isinstance(submitted, ErrorEvent):
            await _send(writer, submitted)
            return
        # A client sends nothing while it waits: whatever arrives, its end above all, says that it does not.
        gone = asyncio.create_task(reader.read(1))
        try:
            while True:
                event = asyncio.create_task(submitted.events.get())
                await asyncio.wait({event, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    raise ConnectionResetError
                found = event.result()
                await asyncio.wait_for(_send(writer, found), SEND_TIMEOUT)
                if isinstance(found, ResultEvent | ErrorEvent):
                    break
            if gone.done():
                raise ConnectionResetError
        finally:
            submitted.drop()
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError, ConnectionError):
                await gone


async def _send(writer: asyncio.StreamWriter, event: BaseModel) -> None:
    writer.write(event.model_dump_json().encode() + b"\n")
    await writer.drain()


def _explain(error: ValidationError) -> str:
    """What is wrong with a request, without quoting it: it holds people's words."""
    parts = []
    for item in error.errors(include_input=False, include_url=False, include_context=False)[:5]:
        parts.append(f"{'/'.join(str(part) for part in item['loc']) or 'request'}: {item['msg']}")
    return "; ".join(parts)


def _listen(path: Path, mode: int) -> socket.socket:
    """A listening UNIX socket; a dead one in its place is removed, a live one is not."""
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        with socket.socket(socket.AF_UNIX) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise SystemExit(f"expected no engine on {path}, found one that answers. Stop it first.")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~mode)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def main(settings: EngineSettings | None = None) -> None:
    """Run the engine until SIGTERM or SIGINT."""

    async def run() -> None:
        task = asyncio.create_task(Engine(settings or EngineSettings()).serve())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())


def _parse_arguments() -> EngineSettings:
    parser = argparse.ArgumentParser(description="Serve the models on a UNIX socket; further settings: QUERN_ENGINE_…")
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--chat-model")
    parser.add_argument("--embedding-model")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--context", type=int)
    given: dict[str, Any] = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    return EngineSettings(**given)


if __name__ == "__main__":
    from quern.observe import logs

    chosen = _parse_arguments()
    logs.configure("engine", chosen.log_level)
    main(chosen)
