"""Every setting, typed, validated and in one place.

A value comes from, strongest first: the environment (`QUERN_...`), a credential file (systemd's
`$CREDENTIALS_DIRECTORY`, one file a setting, named as the variable in lower case), or an `.env` file.
"""

import logging
import os
import re
import threading
import time
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, SecretStr, StringConstraints, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_json
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

from quern.analytics.settings import AnalyticsSettings
from quern.events.settings import EventSettings
from quern.mail.settings import MailSettings
from quern.openai.settings import OpenAISettings
from quern.webhooks.settings import WebhookSettings

PREFIX = "QUERN_"

_log = logging.getLogger(__name__)

#: Where a process listens: a UNIX socket, or an address and a port.
Bind = Annotated[
    str, StringConstraints(pattern=r"^(unix:/.+|fd://[0-9]+|[^\s:]+:[0-9]{1,5}|\[[0-9a-f:]+\]:[0-9]{1,5})$")
]


#: Settings that only the processes which need them are given.
Secret = Literal["secret_keys", "audit_key"]


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
    etl_mongodb_uri: SecretStr | None = Field(
        None, description="MongoDB for the ETL, where it has an account of its own that can only read"
    )
    mongodb_database: str = Field("quern", pattern=r"^[A-Za-z0-9_-]{1,38}$", examples=["quern"])
    redis_queue_url: SecretStr = Field(
        description="Redis for wake-ups and rate limits (noeviction, AOF)",
        examples=["unix:///run/redis-queue/redis.sock"],
    )
    secret_keys: SecretStr | None = Field(
        None,
        description="Fernet keys, comma-separated; the first encrypts, all decrypt; for api and worker webhooks only",
        examples=["output of `quern secret-key`"],
    )
    audit_key: SecretStr | None = Field(
        None,
        description="keys of at least 32 characters, comma-separated; the first seals the audit chain, all verify it; "
        "for the scheduler and `quern audit verify` only",
        examples=["output of `quern secret-key`"],
    )
    public_url: str = Field(
        "http://127.0.0.1:8080",
        description="the origin that clients use, without a path",
        pattern=r"^https?://[^/\s]+$",
        examples=["https://forms.example.org"],
    )

    api_bind: Bind = Field(
        "127.0.0.1:8080", description="`unix:/path` or host:port", examples=["unix:/run/quern/api.sock"]
    )
    api_workers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None, description="default: 2 × cores + 1, bounded by memory", examples=[5]
    )
    api_threads: int = Field(8, ge=1, le=256, examples=[8])
    api_receive_seconds: float = Field(20.0, gt=0, le=300, description="how long a client may take to send a request")
    max_body_bytes: int = Field(1_048_576, ge=1024, le=64 * 1_048_576, examples=[1_048_576])
    events_bind: Bind = Field(
        "127.0.0.1:8081", description="`unix:/path` or host:port", examples=["unix:/run/quern/events.sock"]
    )
    engine_socket: Path = Field(Path("/run/quern/engine.sock"), examples=["/run/quern/engine.sock"])
    engine_parallel: int = Field(8, ge=1, le=64, description="AI jobs in flight at once")
    requests_per_minute: int = Field(
        100,
        ge=0,
        le=1_000_000,
        description="of all keys of a tenant together, unless the tenant or the key says otherwise; 0: no limit",
    )

    mail: MailSettings | None = Field(
        None, description="the SMTP relay; without it email steps fail with a clear error"
    )
    mail_password: SecretStr | None = Field(
        None,
        description="the relay's password, where it wants a username; kept apart so that it can be a credential; "
        "for worker default and `quern doctor` only",
    )
    webhook: WebhookSettings = WebhookSettings()
    job: JobSettings = JobSettings()
    event: EventSettings = EventSettings()
    analytics: AnalyticsSettings = AnalyticsSettings()
    openai: OpenAISettings = OpenAISettings()

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_file: Path | None = Field(None, description="default: standard error")
    metrics_bind: Bind | None = Field(
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

    @field_validator("mongodb_uri", "etl_mongodb_uri")
    @classmethod
    def _is_mongodb_uri(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
        return _fits(
            value, r"mongodb(\+srv)?://[^/\s]+(/\S*)?", "mongodb://…, with a UNIX socket's path percent-encoded"
        )

    @field_validator("redis_queue_url")
    @classmethod
    def _is_redis_url(cls, value: SecretStr) -> SecretStr:
        return _fits(value, r"(rediss?://[^/\s]+(/\S*)?|unix://\S*/\S+)", "redis://…, rediss://… or unix://…")

    @field_validator("secret_keys")
    @classmethod
    def _are_fernet_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None:
            return None
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
    def _are_long(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and any(len(key) < 32 for key in _each(value)):
            raise ValueError("each key must have at least 32 characters; make one with `quern secret-key`")
        return value

    def required(self, name: Secret) -> list[str]:
        """The keys of a setting that only some processes are given; the first is the one to use, all are valid.

        Raises:
            SettingsError: this process was not given it.
        """
        value: SecretStr | None = getattr(self, name)
        if value is None:
            raise SettingsError(_explain({"loc": (name,), "type": "missing", "msg": ""}))
        return _each(value)

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


def _each(value: SecretStr) -> list[str]:
    return [key.strip() for key in value.get_secret_value().split(",")]


def _fits(value: SecretStr, pattern: str, expected: str) -> SecretStr:
    text = value.get_secret_value().strip()
    if not re.fullmatch(pattern, text):
        raise ValueError(f"expected {expected}")
    return SecretStr(text)


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
    except SourceError as error:
        # Its text names the setting; the cause, which quotes the value, stays behind.
        found = re.search(r'field "(\w+)"', str(error))
        name = f"{PREFIX}{found[1].upper()}" if found else "a setting"
        raise SettingsError(f"{name}: expected JSON, for example [] or {{}}.") from None
    except (OSError, UnicodeDecodeError) as error:
        place = getattr(error, "filename", None) or "a credential or .env file"
        raise SettingsError(f"{place}: expected a readable text file in UTF-8, found {type(error).__name__}.") from None


def _explain(item: Any) -> str:
    path = [part for part in item["loc"] if isinstance(part, str)]
    name = PREFIX + "__".join(path).upper()
    field = _field(path)
    # Some validators end with what they found; a value may be a secret in the wrong place.
    found = item["msg"].removeprefix("Value error, ").split(", found ")[0]
    if item["type"] == "missing":
        found = "it is not set"
    elif item["type"] == "string_pattern_mismatch" and field and field.description:
        found = f"expected {field.description}"
    example = _example(field) if field else ""
    return f"{name}: {found}." + (f" Example: {name}={example}" if example else "")


def _field(path: list[str]) -> FieldInfo | None:
    """The setting at the end of a path of names; None where that is a group of settings, or nothing."""
    model: type[BaseModel] | None = Settings
    field = None
    for part in path:
        field = model.model_fields.get(part) if model else None
        if field is None:
            return None
        kinds = [field.annotation, *get_args(field.annotation)]
        model = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
    return field if model is None else None


def _example(field: FieldInfo) -> str:
    """An example of a setting, or its default; empty when it has neither."""
    if field.examples:
        return str(field.examples[0])
    default = field.get_default()
    if default is None or default is PydanticUndefined:
        return ""
    return default if isinstance(default, str) else to_json(default).decode()


class LiveSettings:
    """The settings, read again when a credential file changes, so that rotation needs no restart.

    Looks at the credential directory's modification times at most once a second. A broken new file keeps the last
    good settings and is logged.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._fixed = settings is not None
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        # Before the values: what changes between the two is then seen at the next look.
        self._stamp = self._fingerprint()
        self._current = settings if settings is not None else load()

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
                    _log.info("the credentials were read again")
                except SettingsError as error:
                    _log.error("the changed credentials are not usable; the old ones stay: %s", error)
                self._stamp = stamp
        return self._current

    @staticmethod
    def _fingerprint() -> tuple[tuple[str, int, int], ...]:
        directory = os.environ.get("CREDENTIALS_DIRECTORY")
        if not directory or not Path(directory).is_dir():
            return ()
        found = []
        for entry in Path(directory).iterdir():
            try:
                stat = entry.stat()
            except FileNotFoundError:
                # It is being replaced at this moment; the next look sees the new one.
                continue
            found.append((entry.name, stat.st_mtime_ns, stat.st_ino))
        return tuple(sorted(found))
