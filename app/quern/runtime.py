"""What a process is made of: settings, stores, the wake-ups and the handlers, put together in one place."""

from dataclasses import dataclass
from functools import cached_property

from quern.config import LiveSettings, Settings
from quern.forms.form import Versions
from quern.inference.client import EngineClient
from quern.jobs.handler import Registry, Tick
from quern.jobs.wake import Waker
from quern.store.connection import Store
from quern.store.redis_connection import connect
from quern.store.vault import Vault
from quern.tenants.keys import Authenticator
from quern.tenants.limit import Limiter
from quern.webhooks.deliver import client_tls
from quern.workflows.handlers import Steps


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
        return Waker(self.settings.redis_queue_url.get_secret_value())

    @cached_property
    def limiter(self) -> Limiter:
        return Limiter(connect(self.settings.redis_queue_url.get_secret_value(), timeout=1.0))

    @cached_property
    def authenticate(self) -> Authenticator:
        return Authenticator(self.settings.requests_per_minute)

    @cached_property
    def engine(self) -> EngineClient:
        return EngineClient(self.settings.engine_socket)

    @property
    def vault(self) -> Vault:
        return Vault(self.settings.secret_keys.get_secret_value())

    @cached_property
    def registry(self) -> Registry:
        steps = Steps(self.engine, self.versions, client_tls(self.settings.webhook))
        return Registry([*steps.handlers(self.settings.webhook)])

    @property
    def ticks(self) -> list[Tick]:
        """Periodic jobs."""
        return []
