"""What a process is made of: settings, stores, the wake-ups and the handlers, put together in one place."""

import logging
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pymongo
from pymongo.errors import PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from quern.analytics import handler as analytics
from quern.analytics.client import AnalyticsClient
from quern.audit import chain
from quern.config import LiveSettings, Settings
from quern.forms.form import OpenForms, Versions
from quern.inference.client import EngineClient, EngineError
from quern.jobs import reconciler
from quern.jobs.handler import Registry, Tick
from quern.jobs.scheduler import Chore
from quern.jobs.wake import Nudger, Waker
from quern.observe import metrics, mongodb
from quern.openai import notice
from quern.openai.answering import Answering
from quern.openai.batches import BatchJobs
from quern.store.connection import Store
from quern.store.redis_connection import connect
from quern.store.vault import Vault
from quern.tenants.keys import Authenticator
from quern.tenants.limit import Limiter
from quern.webhooks.deliver import client_tls
from quern.webhooks.handler import handler_of_test_events
from quern.workflows import outbox
from quern.workflows.handlers import Steps

_log = logging.getLogger(__name__)

#: How long an erasure waits for an engine that hangs.
PURGE_SECONDS = 5.0


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
        return Versions()

    @cached_property
    def waker(self) -> Waker:
        return Waker(self.store.redis_queue_url)

    @cached_property
    def limiter(self) -> Limiter:
        return Limiter(connect(self.store.redis_queue_url, timeout=1.0))

    @cached_property
    def authenticate(self) -> Authenticator:
        return Authenticator(self.settings.requests_per_minute)

    @cached_property
    def engine(self) -> EngineClient:
        return EngineClient(self.settings.engine_socket)

    @property
    def vault(self) -> Vault:
        return Vault(*self.settings.required("secret_keys"))

    @cached_property
    def registry(self) -> Registry:
        tls = client_tls(self.settings.webhook)
        steps = Steps(self.engine, self.versions, tls)
        openai = self.settings.openai
        answering = Answering(self.engine, lambda: self._redis, openai)
        batches = BatchJobs(openai, lambda: self.registry)
        return Registry(
            [
                *steps.handlers(self.settings.webhook),
                handler_of_test_events(tls),
                *answering.handlers(),
                *batches.handlers(),
                notice.handler(self.settings.webhook, tls),
                *analytics.handlers(),
            ]
        )

    @cached_property
    def _redis(self) -> Redis:
        return connect(self.store.redis_queue_url, timeout=1.0)

    @cached_property
    def questions(self) -> AnalyticsClient:
        return AnalyticsClient(self.settings.analytics.service)

    @cached_property
    def open_forms(self) -> OpenForms:
        return OpenForms()

    @cached_property
    def _nudger(self) -> Nudger:
        return Nudger(self.waker)

    def nudge(self, queue: str) -> None:
        """Wake a queue soon, without making the caller wait."""
        self._nudger.nudge(queue)

    def forget(self, tenant: str) -> None:
        """After an erasure: have the engine drop what its caches hold of a tenant's texts."""
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
        return analytics.ticks(self.settings.analytics)

    def _server_status(self) -> dict[str, Any]:
        return dict(self.store.client.admin.command({"serverStatus": 1, **mongodb.LEFT_OUT}))

    @property
    def chores(self) -> list[Chore]:
        """What one scheduler does now and then."""

        def seal() -> None:
            keys = chain.KeyRing(self.settings.required("audit_key"))
            while chain.seal_pending(self.store.db, keys):
                pass
            metrics.UNSEALED.set(self.store.db.audit.count_documents({"pending": True}))

        return [
            Chore("seal the audit log", 1.0, seal),
            Chore("observe MongoDB", 15.0, lambda: mongodb.record(self._server_status())),
            Chore("observe the queues", 5.0, lambda: reconciler.observe(self.store)),
            Chore("observe the outboxes", 5.0, lambda: metrics.UNRELAYED.set(outbox.count_unrelayed(self.store.db))),
        ]
