"""What the operator decides about the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from quern.inference.registry import default_models_dir


class EngineSettings(BaseSettings):
    """The engine's settings, from `QUERN_ENGINE_…`. Durations are in seconds, sizes in tokens unless said otherwise."""

    model_config = SettingsConfigDict(env_prefix="QUERN_ENGINE_", extra="ignore", frozen=True)

    socket: Path = Field(Path("/run/quern/engine.sock"), description="the UNIX socket to listen on")
    socket_mode: int = Field(0o660, ge=0o600, le=0o777, description="who may connect, as the socket's file mode")
    models: Path = Field(default_factory=default_models_dir, description="the models folder")
    tuning: Path = Field(
        default_factory=lambda: default_models_dir().parent / "tuning", description="where measurements are remembered"
    )
    chat_model: str = "smollm2-135m-instruct-q4_1"
    embedding_model: str = "all-minilm-l6-v2-int8"
    pinned: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="further chat models that are loaded at the start and stay, by name, separated by commas"
    )
    memory_mib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="MiB for all models together; default: four fifths of what this process may use"
    )
    residence: float = Field(
        20.0, ge=0, le=3600, description="how long a model that is used stays before it makes room for another"
    )
    threads: Annotated[int, Field(ge=1, le=512)] | None = Field(
        None, description="default: every core this process may use"
    )
    adapt_threads: bool = Field(True, description="use fewer threads while the machine is busy with other work")
    context: int = Field(8192, ge=256, le=1 << 20, description="context memory, shared by all sequences")
    max_sequences: int = Field(8, ge=1, le=64, description="batch sequences decoded together")
    reserved_sequences: int = Field(
        2, ge=1, le=64, description="places beyond them that only user-waiting requests take"
    )
    batch_size: Annotated[int, Field(ge=32, le=4096)] | None = Field(
        None, description="most tokens in one step; default: measured at the first start"
    )
    max_waiting: int = Field(1000, ge=1, le=100_000, description="requests in the engine; more are told to come again")
    default_deadline: float = Field(600.0, gt=0, le=86_400, description="for requests that bring none")
    step_timeout: float = Field(
        120.0,
        gt=1,
        le=3600,
        description="a step that takes longer, without its waiting for processors, is taken for hung and killed",
    )
    poll: Annotated[int, Field(ge=0, le=100)] | None = Field(
        None, description="how eagerly ggml's threads poll (they fight OpenBLAS's); default: measured"
    )
    blas: bool | None = Field(None, description="OpenBLAS for prompts; default: measured at the first start")
    prefix_cache: bool = Field(True, description="compute what prompts of one tenant begin with in common only once")
    allow_fault_injection: bool = Field(False, description="for tests only: lets a client crash the model's process")
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    @field_validator("pinned", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(name.strip() for name in value.split(",") if name.strip()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _steps_hold_every_sequence(self) -> EngineSettings:
        if self.batch_size is not None and self.batch_size < self.max_sequences + self.reserved_sequences:
            raise ValueError("batch_size: expected at least max_sequences + reserved_sequences")
        return self
