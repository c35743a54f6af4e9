"""What a process is made of: settings, stores, the wake-ups and the handlers, put together in one place.

A part is imported when it is first used: every process passes here, and none needs them all.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import pymongo
from pymongo.errors import PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from quern.jobs.handler import Family, Handler, Registry
from quern.jobs.model import Queue
from quern.jobs.wake import Nudger, Waker
from quern.store.connection import Store
from quern.store.redis_connection import connect

if TYPE_CHECKING:
    import ssl

    from quern.analytics.client import AnalyticsClient
    from quern.config import LiveSettings, Settings
    from quern.forms.form import OpenForms, Versions
    from quern.inference.client import EngineClient
    from quern.jobs.handler import Tick
    from quern.jobs.scheduler import Chore
    from quern.store.vault import Vault
    from quern.tenants.keys import Authenticator
    from quern.tenants.limit import Limiter

_log = logging.getLogger(__name__)

#: How long an erasure waits for an engine that hangs.
PURGE_SECONDS = 5.0

_AI_STEPS: Final = ("summarize", "classify", "extract", "sentiment", "translate", "embed")
_STEPS: Final = {
    **dict.fromkeys(_AI_STEPS, Queue.BATCHED),
    "email": Queue.DEFAULT,
    "webhook": Queue.WEBHOOKS,
    "webhook_resend": Queue.WEBHOOKS,
}
_ANSWERS: Final = dict.fromkeys(("openai_chat", "openai_completion", "openai_response", "openai_embedding"), Queue.HIGH)
_BATCHES: Final = {f"openai_batch_{part}": Queue.LOW for part in ("expand", "cancel", "collect", "clear")}


@dataclass
class Runtime:
    """The parts of one process, made when first used."""

    live: LiveSettings

    @property
    def settings(self) -> Settings:
        return self.live.get()

    @cached_property
    def store(self) -> Store:
        return Store(self.live)

    @cached_property
    def versions(self) -> Versions:
        from quern.forms.form import Versions

        return Versions()

    @cached_property
    def waker(self) -> Waker:
        return Waker(self.store.redis_queue_url)

    @cached_property
    def limiter(self) -> Limiter:
        from quern.tenants.limit import Limiter

        return Limiter(connect(self.store.redis_queue_url, timeout=1.0))

    @cached_property
    def authenticate(self) -> Authenticator:
        from quern.tenants.keys import Authenticator

        return Authenticator(self.settings.requests_per_minute)

    @cached_property
    def engine(self) -> EngineClient:
        from quern.inference.client import EngineClient

        return EngineClient(self.settings.engine_socket)

    @property
    def vault(self) -> Vault:
        from quern.store.vault import Vault

        return Vault(*self.settings.required("secret_keys"))

    @cached_property
    def registry(self) -> Registry:
        return Registry(
            families=[
                Family(_STEPS, self._steps),
                Family({"forget": Queue.LOW}, self._forgetting),
                Family({"webhook_test": Queue.WEBHOOKS, "openai_webhook": Queue.WEBHOOKS}, self._notices),
                Family(_ANSWERS, self._answers),
                Family(_BATCHES, self._batches),
                Family({"analytics.run": Queue.LOW, "analytics.prune": Queue.LOW}, self._analytics),
            ]
        )

    def _steps(self) -> Iterable[Handler]:
        from quern.workflows.handlers import Steps

        return Steps(self.engine, self.versions, lambda: self._tls).handlers(self.settings.webhook)

    def _forgetting(self) -> Iterable[Handler]:
        from quern.workflows import forget

        return [forget.handler(self.engine)]

    def _notices(self) -> Iterable[Handler]:
        from quern.openai import notice
        from quern.webhooks.handler import handler_of_test_events

        return [handler_of_test_events(self._tls), notice.handler(self.settings.webhook, self._tls)]

    def _answers(self) -> Iterable[Handler]:
        from quern.openai.answering import Answering

        return Answering(self.engine, lambda: self._redis, self.settings.openai).handlers()

    def _batches(self) -> Iterable[Handler]:
        from quern.openai.batches import BatchJobs

        return BatchJobs(self.settings.openai, lambda: self.registry).handlers()

    def _analytics(self) -> Iterable[Handler]:
        from quern.analytics import handler

        return handler.handlers()

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        """Of webhooks. A context holds every authority that the host trusts: some megabytes."""
        from quern.webhooks.deliver import client_tls

        return client_tls(self.settings.webhook)

    @cached_property
    def _redis(self) -> Redis:
        return connect(self.store.redis_queue_url, timeout=1.0)

    @cached_property
    def questions(self) -> AnalyticsClient:
        from quern.analytics.client import AnalyticsClient

        return AnalyticsClient(self.settings.analytics.service)

    @cached_property
    def open_forms(self) -> OpenForms:
        from quern.forms.form import OpenForms

        return OpenForms()

    @cached_property
    def _nudger(self) -> Nudger:
        return Nudger(self.waker)

    def nudge(self, queue: str) -> None:
        """Wake a queue soon, without making the caller wait."""
        self._nudger.nudge(queue)

    def forget(self, tenant: str) -> None:
        """After an erasure: have the engine drop what its caches hold of a tenant's texts."""
        from quern.inference.client import EngineClient, EngineError

        try:
            EngineClient(self.settings.engine_socket, timeout=PURGE_SECONDS).purge(tenant)
        except EngineError:
            # An engine that is away holds nothing; it keeps its caches in memory only.
            _log.info("the engine could not be asked to forget", extra={"tenant": tenant})

    def unready(self) -> list[str]:
        """What keeps this process from serving; empty when nothing does."""
        problems = []
        try:
            with pymongo.timeout(3.0):
                self.store.client.admin.command("ping")
        except PyMongoError as error:
            problems.append(f"MongoDB: {type(error).__name__}")
        try:
            connect(self.store.redis_queue_url, timeout=1.0).ping()
        except RedisError as error:
            problems.append(f"Redis: {type(error).__name__}")
        return problems

    @property
    def ticks(self) -> list[Tick]:
        """Periodic jobs."""
        from quern.analytics import handler

        return handler.ticks(self.settings.analytics)

    @property
    def chores(self) -> list[Chore]:
        """What one scheduler does now and then."""
        from quern.audit import chain
        from quern.audit.patrol import Patrol
        from quern.jobs import reconciler
        from quern.jobs.scheduler import Chore
        from quern.observe import metrics, mongodb
        from quern.workflows import outbox

        def server_status() -> dict[str, Any]:
            return dict(self.store.client.admin.command({"serverStatus": 1, **mongodb.LEFT_OUT}))

        patrol = Patrol()

        def keys() -> chain.KeyRing:
            return chain.KeyRing(self.settings.required("audit_key"))

        def seal() -> None:
            while chain.seal_pending(self.store.db, keys()):
                pass
            metrics.UNSEALED.set(self.store.db.audit.count_documents({"pending": True}))

        return [
            Chore("seal the audit log", 1.0, seal),
            Chore("verify the audit log", 60.0, lambda: patrol.step(self.store.db, keys())),
            Chore("restore turns", 15.0, lambda: reconciler.restore_turns(self.store)),
            Chore("observe MongoDB", 15.0, lambda: mongodb.record(server_status())),
            Chore("observe the queues", 5.0, lambda: reconciler.observe(self.store)),
            Chore("observe the outboxes", 5.0, lambda: metrics.UNRELAYED.set(outbox.count_unrelayed(self.store.db))),
        ]
