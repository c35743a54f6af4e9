"""The models of one engine: each further chat model in a process of its own, loaded when it is asked for.

The first chat model and the embedding model stay from start to end, and so do pinned ones. Any other chat model of the
registry is loaded by its first request and stays until its memory is needed: then the one that was used longest ago
goes, never one that is at work. A model that waits for room does not wait for ever behind a busy one: after `residence`
seconds that one gets nothing new, finishes what it has, and makes room; its own requests wait their turn. Ending a
process gives its memory back for sure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

from quern.inference import registry
from quern.inference.protocol import (
    CountTokensRequest,
    ErrorEvent,
    GenerateRequest,
    Health,
    PurgeRequest,
    ServedModel,
)
from quern.inference.settings import EngineSettings
from quern.inference.supervisor import Pending, Supervisor

log = logging.getLogger(__name__)

#: How often deadlines of requests to models that are not loaded are looked at, in seconds.
TICK = 0.5
#: Share of the memory that this process may use, when the operator sets no limit.
MEMORY_SHARE = 0.8
#: How long the list of models on disk may be out of date, in seconds.
LIST_AGE = 2.0


@dataclass(eq=False)
class Resident:
    """A model beyond the first. Times are `time.monotonic()` seconds; `loading`: its supervisor at work."""

    entry: registry.Model
    supervisor: Supervisor
    need_mib: float
    pinned: bool
    loading: asyncio.Task[None] | None = None
    ready_since: float | None = None
    last_used: float = 0.0


class ModelPool:
    """Takes requests for any model, and sees that what is loaded fits."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings
        self._changed = asyncio.Event()
        self._first = Supervisor(settings, self._changed.set)
        self._residents: dict[str, Resident] = {}
        self._limit = settings.memory_mib or usable_memory_mib() * MEMORY_SHARE
        self._listed: tuple[float, dict[str, registry.Model]] = (float("-inf"), {})
        self._counters = {"model_loads_total": 0.0, "model_evictions_total": 0.0}

    # ---- what the socket's side calls

    @property
    def health(self) -> Health:
        """Whether the first models are loaded."""
        return self._first.health

    @property
    def supervisors(self) -> list[Supervisor]:
        """Those with a model process, the first one first."""
        return [
            self._first,
            *(resident.supervisor for resident in self._residents.values() if resident.loading is not None),
        ]

    def counters(self) -> dict[str, float]:
        """Of all models together, since the start."""
        total = dict(self._counters)
        for supervisor in [self._first, *(resident.supervisor for resident in self._residents.values())]:
            for name, value in (supervisor.counters | supervisor.gauges()).items():
                total[name] = total.get(name, 0.0) + value
        return total | {
            "models_loaded": float(sum(one.health.status == "ready" for one in self.supervisors)),
            "models_memory_bytes": self._used() * 2**20,
            "models_memory_limit_bytes": self._limit * 2**20,
        }

    def served(self) -> list[ServedModel]:
        """The models that may be asked for: the first ones, and each chat model whose files are here."""
        further = [
            ServedModel(
                name=model.name,
                kind="chat",
                context=model.context,
                licence=model.licence,
                loaded=self._ready(model.name),
            )
            for model in self._on_disk().values()
            if model.name != self._settings.chat_model
        ]
        return self._first.served() + further

    def submit(self, body: BaseModel) -> Pending | ErrorEvent:
        """Take a request in for the model that it names, or say at once why not."""
        name = body.model if isinstance(body, GenerateRequest | CountTokensRequest) else None
        if isinstance(body, PurgeRequest):
            # Its own process does things in order, so what comes after this is after it there, too.
            for supervisor in self.supervisors[1:]:
                supervisor.submit(body)
        if name is None or name == self._settings.chat_model:
            return self._first.submit(body)
        resident = self._resident(name)
        if resident is None:
            there = ", ".join(sorted({self._settings.chat_model, *self._on_disk()} - {""})) or "none"
            return ErrorEvent(
                kind="refused", message=f"expected a chat model that is here, found {name!r}; here: {there}"
            )
        if resident.need_mib > (room := self._limit - self._fixed(except_for=resident)):
            message = f"{name} needs {resident.need_mib:.0f} MiB; at most {room:.0f} MiB can be made free for it"
            return ErrorEvent(kind="refused", message=message)
        resident.last_used = time.monotonic()
        self._changed.set()
        return resident.supervisor.submit(body)

    def remember_fault(self, fault: dict[str, object]) -> None:
        """Order the same fault of the next process, too (tests only)."""
        self._first.remember_fault(fault)

    # ---- what is loaded

    async def run(self) -> None:
        """Keep the first models, and of the others what is asked for, until cancelled."""
        first = asyncio.create_task(self._first.run())
        for name in self._settings.pinned:
            if (resident := self._resident(name)) is None:
                log.error("a pinned model is not here", extra={"model": name})
            else:
                self._load(resident)
        try:
            while not first.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._changed.wait(), TICK)
                self._changed.clear()
                await self._arrange()
            await first
        finally:
            for resident in self._residents.values():
                await self._unload(resident)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first

    async def _arrange(self) -> None:
        """Load what is waited for, oldest first, and make room for it."""
        now = time.monotonic()
        for resident in list(self._residents.values()):
            if resident.loading is None:
                resident.supervisor.expire()
            else:
                if resident.ready_since is None and resident.supervisor.health.status == "ready":
                    resident.ready_since = now
                if resident.supervisor.wanted_since is not None:
                    resident.last_used = now
            if resident.loading is not None and resident.supervisor.health.status == "failed" and not resident.pinned:
                # Whoever asks again has it tried again; until then nobody needs to.
                await self._unload(resident)
        waiting = [one for one in self._residents.values() if one.loading is None and one.supervisor.wanted_since]
        for resident in sorted(waiting, key=lambda one: one.supervisor.wanted_since or 0.0):
            if not await self._make_room(resident, now):
                return
            self._load(resident)
        for resident in self._residents.values():
            resident.supervisor.release()

    async def _make_room(self, wanted: Resident, now: float) -> bool:
        lacking = self._used() + wanted.need_mib - self._limit
        # One that is still being loaded is left alone: two models that wait would only throw each other out.
        ready = [one for one in self._residents.values() if one.ready_since is not None and not one.pinned]
        stayed = [one for one in ready if now - (one.ready_since or now) >= self._settings.residence]
        idle = sorted((one for one in ready if not one.supervisor.busy), key=lambda one: one.last_used)
        settled = [one for one in idle if one.supervisor.wanted_since is None or one in stayed]
        if lacking > sum(one.need_mib for one in settled):
            for one in stayed:
                one.supervisor.hold()
            return False
        for one in settled:
            if lacking <= 0:
                break
            await self._unload(one)
            self._counters["model_evictions_total"] += 1
            log.info("a model made room", extra={"model": one.entry.name, "for_model": wanted.entry.name})
            lacking -= one.need_mib
        return True

    def _load(self, resident: Resident) -> None:
        resident.last_used, resident.ready_since = time.monotonic(), None
        resident.loading = asyncio.create_task(resident.supervisor.run())
        self._counters["model_loads_total"] += 1

    async def _unload(self, resident: Resident) -> None:
        if resident.loading is None:
            return
        task, resident.loading, resident.ready_since = resident.loading, None, None
        # First: a request that comes while the process ends must wait for the next one, not be given to this one.
        resident.supervisor.park()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    # ---- what there is

    def _resident(self, name: str) -> Resident | None:
        entry = self._on_disk().get(name)
        resident = self._residents.get(name)
        if resident is not None and (entry == resident.entry or resident.loading is not None):
            return resident
        if entry is None:
            return None
        context = min(self._settings.context, entry.context)
        settings = self._settings.model_copy(
            update={"chat_model": name, "embedding_model": "", "context": context, "pinned": ()}
        )
        resident = Resident(
            entry, Supervisor(settings, self._changed.set), entry.need_mib(context), name in self._settings.pinned
        )
        self._residents[name] = resident
        return resident

    def _on_disk(self) -> dict[str, registry.Model]:
        """The chat models of the registry whose files are here."""
        read, models = self._listed
        if time.monotonic() - read > LIST_AGE:
            folder = self._settings.models
            try:
                models = {
                    name: model
                    for name, model in registry.known_models(folder).items()
                    if model.kind == "chat"
                    and all(registry.file_path(model, file, folder).exists() for file in model.files)
                }
            except registry.ModelFileError as error:
                log.error("the list of models is not readable", extra={"detail": str(error)})
            self._listed = (time.monotonic(), models)
        return models

    def _ready(self, name: str) -> bool:
        resident = self._residents.get(name)
        return resident is not None and resident.loading is not None and resident.supervisor.health.status == "ready"

    def _fixed(self, except_for: Resident | None = None) -> float:
        """MiB of what is never let go of."""
        first = sum(
            model.need_mib(self._settings.context if model.kind == "chat" else 0)
            for model in self._first.models.values()
        )
        return first + sum(
            one.need_mib for one in self._residents.values() if one.pinned and one is not except_for and one.loading
        )

    def _used(self) -> float:
        further = (one.need_mib for one in self._residents.values() if one.loading is not None and not one.pinned)
        return self._fixed() + sum(further)


def usable_memory_mib() -> float:
    """MiB that this process may use: the least limit of its control groups, else the machine's memory."""
    total = next(
        float(line.split()[1]) / 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemTotal:")
    )
    limits = [total]
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes") if controllers else ("/sys/fs/cgroup", "memory.max")
        )
        folder = Path(root + group)
        for place in (folder, *folder.parents):
            with contextlib.suppress(OSError, ValueError):
                limits.append(int((place / name).read_text(encoding="ascii")) / 2**20)
            if str(place) == root:
                break
    return min(limit for limit in limits if limit > 0)
