"""What the model registry promises: no file reaches native code that is not the one that was listed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from quern.inference import registry

CHAT = "smollm2-135m-instruct-q4_1"


@pytest.fixture
def copied(models_dir: Path, tmp_path: Path) -> Path:
    """A models folder of its own, with the chat model in it."""
    shutil.copytree(models_dir / CHAT, tmp_path / CHAT)
    return tmp_path


def _model(folder: Path) -> registry.Model:
    return registry.find(CHAT, "chat", folder)


def test_a_right_file_is_let_through(copied: Path) -> None:
    model = _model(copied)
    path = registry.file_path(model, model.files[0], copied)
    assert registry.verify(model, copied) == {path.name: registry.identity(path)}


def test_a_file_cut_short_is_refused(copied: Path) -> None:
    path = registry.file_path(_model(copied), _model(copied).files[0], copied)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4096)
    with pytest.raises(registry.ModelFileError, match=r"cut short; run scripts/fetch-models"):
        registry.verify(_model(copied), copied)


def test_one_flipped_bit_is_refused(copied: Path) -> None:
    path = registry.file_path(_model(copied), _model(copied).files[0], copied)
    with path.open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(registry.ModelFileError, match="expected SHA-256"):
        registry.verify(_model(copied), copied)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\x7fELF" + bytes(100), b"PK\x03\x04" + bytes(100)])
def test_foreign_and_empty_files_are_refused_by_their_first_bytes(copied: Path, content: bytes) -> None:
    registry.file_path(_model(copied), _model(copied).files[0], copied).write_bytes(content)
    with pytest.raises(registry.ModelFileError, match="expected a GGUF file"):
        registry.verify(_model(copied), copied)


def test_a_missing_file_is_named_with_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(registry.ModelFileError, match=r"SmolLM2.*No such file.*scripts/fetch-models"):
        registry.verify(_model(tmp_path), tmp_path)


def test_an_unknown_model_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(registry.UnknownModelError, match=CHAT):
        registry.find("gpt-5", "chat", tmp_path)


def test_a_model_of_the_wrong_kind_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(registry.UnknownModelError, match="expected a known embedding model"):
        registry.find(CHAT, "embedding", tmp_path)


def test_the_operators_own_list_adds_models(tmp_path: Path) -> None:
    (tmp_path / "models.yml").write_text(
        f"""
- name: mine
  kind: chat
  licence: MIT
  files: [{{path: mine.gguf, sha256: {"a" * 64}}}]
  context: 2048
  memory_mib: 10
  context_kib: 1
""",
        encoding="utf-8",
    )
    assert registry.find("mine", "chat", tmp_path).context == 2048
    assert registry.find(CHAT, "chat", tmp_path).licence == "Apache-2.0"


@pytest.mark.parametrize("text", ["a: b", "- name: ../escape\n", "- [", "7"])
def test_a_broken_list_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "models.yml").write_text(text, encoding="utf-8")
    with pytest.raises(registry.ModelFileError, match=r"models\.yml"):
        registry.known_models(tmp_path)


def test_a_path_cannot_leave_the_models_folder() -> None:
    with pytest.raises(ValueError, match="path"):
        registry.ModelFile(path="../secret.gguf", sha256="0" * 64)
