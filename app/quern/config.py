"""Every setting, typed, validated and in one place.

A value comes from, strongest first: the environment (`QUERN_...`), a credential file (systemd's
`$CREDENTIALS_DIRECTORY`, one file a setting, named as the variable in lower case), or an `.env` file.
"""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from quern.events.settings import EventSettings
from quern.mail.settings import MailSettings
from quern.webhooks.settings import WebhookSettings

PREFIX = "QUERN_"


class JobSettings(BaseModel):
    """How durable jobs behave. Every duration is in seconds."""

    lease: float = Field(60.0, gt=0.2, le=3600, description="how long a claim holds without a heartbeat", examples=[60])
    reconcile_every: float = Field(0.5, gt=0.05, le=60, description="pause between two reconciler passes")
    max_failures: int = Field(8, ge=1, le=100, description="charged failures before a job is dead")
    max_lost_leases: int = Field(
        20, ge=1, le=1000, description="claims that may end without a word before a job is dead"
    )
    backoff_base: float = Field(2.0, gt=0, le=600, description="first retry delay; doubles with each failure")
    backoff_cap: float = Field(300.0, gt=0, le=86400, description="longest retry delay")
    drain_timeout: float = Field(25.0, gt=0, le=600, description="how long a stopping worker may finish its jobs")
    keep_ended_days: int = Field(30, ge=1, le=3650, description="days until an ended job is forgotten")


class Settings(BaseSettings):
    """The whole configuration of every Quern process."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="ignore", hide_input_in_errors=True, frozen=True
    )

    mongodb_uri: SecretStr = Field(
        description="MongoDB, a replica set; a UNIX socket is percent-encoded",
        examples=["mongodb://%2Frun%2Fmongodb%2Fmongod.sock/?directConnection=true"],
    )
    mongodb_database: str = Field("quern", pattern=r"^[A-Za-z0-9_-]{1,38}$", examples=["quern"])
    redis_queue_url: SecretStr = Field(
        description="Redis for wake-ups and rate limits (noeviction, AOF)",
        examples=["unix:///run/redis-queue/redis.sock"],
    )
    secret_keys: SecretStr = Field(
        description="Fernet keys, comma-separated; the first encrypts, all decrypt",
        examples=["output of `quern secret-key`"],
    )
    audit_key: SecretStr = Field(
        description="seals the audit chain; at least 32 characters", examples=["output of `quern secret-key`"]
    )
    public_url: str = Field(
        "http://127.0.0.1:8080", pattern=r"^https?://[^/\s]+$", examples=["https://forms.example.org"]
    )

    api_bind: str = Field(
        "127.0.0.1:8080", description="`unix:/path` or host:port", examples=["unix:/run/quern/api.sock"]
    )
    api_workers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="default: 2 × cores + 1, bounded by memory", examples=[5]
    )
    api_threads: int = Field(8, ge=1, le=256, examples=[8])
    max_body_bytes: int = Field(1_048_576, ge=1024, le=64 * 1_048_576, examples=[1_048_576])
    events_bind: str = Field(
        "127.0.0.1:8081", description="`unix:/path` or host:port", examples=["unix:/run/quern/events.sock"]
    )
    engine_socket: Path = Field(Path("/run/quern/engine.sock"), examples=["/run/quern/engine.sock"])
    engine_parallel: int = Field(8, ge=1, le=64, description="AI jobs in flight at once")
    requests_per_minute: int = Field(
        100, ge=0, le=1_000_000, description="per key, unless the key says otherwise; 0: no limit"
    )

    mail: MailSettings | None = Field(
        None, description="the SMTP relay; without it email steps fail with a clear error"
    )
    mail_password: SecretStr | None = Field(
        None, description="the relay's password; kept apart so that it can be a credential"
    )
    webhook: WebhookSettings = WebhookSettings()
    job: JobSettings = JobSettings()
    event: EventSettings = EventSettings()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_file: Path | None = Field(None, description="default: standard error")
    metrics_bind: str | None = Field(
        None, description="`unix:/path` or host:port of this process's metrics", examples=["127.0.0.1:9464"]
    )
    metrics_dir: Path | None = Field(None, description="where the API's processes share their counters")
    otlp_endpoint: str | None = Field(None, pattern=r"^https?://", examples=["http://127.0.0.1:4318/v1/traces"])

    @model_validator(mode="before")
    @classmethod
    def _give_mail_its_password(cls, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("mail_password") and isinstance(values.get("mail"), dict):
            return {**values, "mail": {**values["mail"], "password": values["mail_password"]}}
        return values

    @field_validator("secret_keys")
    @classmethod
    def _are_fernet_keys(cls, value: SecretStr) -> SecretStr:
        from cryptography.fernet import Fernet

        for key in value.get_secret_value().split(","):
            try:
                Fernet(key.strip())
            except ValueError:
                raise ValueError(
                    "each key must be 32 url-safe base64-encoded bytes; make one with `quern secret-key`"
                ) from None
        return value

    @field_validator("audit_key")
    @classmethod
    def _is_long(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value().strip()) < 32:
            raise ValueError("must have at least 32 characters; make one with `quern secret-key`")
        return SecretStr(value.get_secret_value().strip())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, EnvSettingsSource(settings_cls)]
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if directory:
            sources.append(SecretsSettingsSource(settings_cls, secrets_dir=directory))
        env_file = os.environ.get(f"{PREFIX}ENV_FILE", ".env")
        sources.append(DotEnvSettingsSource(settings_cls, env_file=env_file))
        return tuple(sources)


class SettingsError(Exception):
    """A setting is missing or wrong; the text names each one, what is wrong and an example."""


def load() -> Settings:
    """Read and validate the configuration.

    Raises:
        SettingsError: with one line a wrong setting; no value is ever shown.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item) for item in error.errors(include_input=False))) from None


def _explain(item: Any) -> str:
    path = [str(part) for part in item["loc"]]
    name = PREFIX + "__".join(path).upper()
    found = "it is not set" if item["type"] == "missing" else item["msg"]
    field = Settings.model_fields.get(path[0]) if path else None
    example = f" Example: {name}={field.examples[0]}" if field and field.examples and len(path) == 1 else ""
    return f"{name}: {found}.{example}"


class LiveSettings:
    """The settings, read again when a credential file changes, so that rotation needs no restart.

    Looks at the credential directory's modification times at most once a second. A broken new file keeps the last
    good settings and is logged by the caller through `on_error`.
    """

    def __init__(self, settings: Settings | None = None, on_error: Callable[[str], None] | None = None) -> None:
        self._fixed = settings is not None
        self._current = settings if settings is not None else load()
        self._on_error = on_error
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self._stamp = self._fingerprint()

    def get(self) -> Settings:
        """The settings as of the last second."""
        if self._fixed or time.monotonic() - self._looked < 1.0:
            return self._current
        with self._lock:
            if time.monotonic() - self._looked < 1.0:
                return self._current
            self._looked = time.monotonic()
            stamp = self._fingerprint()
            if stamp != self._stamp:
                try:
                    self._current = load()
                except SettingsError as error:
                    if self._on_error:
                        self._on_error(str(error))
                self._stamp = stamp
        return self._current

    @staticmethod
    def _fingerprint() -> tuple[tuple[str, int, int], ...]:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory or not Path(directory).is_dir():
            return ()
        stats = [(entry.name, entry.stat()) for entry in Path(directory).iterdir() if entry.is_file()]
        return tuple(sorted((name, stat.st_mtime_ns, stat.st_ino) for name, stat in stats))
