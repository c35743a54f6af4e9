"""What the header's reader promises: whole files are read, others are refused before native code could see them."""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

import llama_cpp
import pytest

from quern.inference import gguf, llama


@pytest.fixture(scope="session")
def head(chat_path: Path) -> bytes:
    """The model's header and the first of its weights."""
    with chat_path.open("rb") as file:
        return file.read(2_000_000)


def _written(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return path


def test_a_header_says_what_the_library_says(chat_path: Path, model: llama.Model) -> None:
    found = gguf.read(chat_path)
    assert found.architecture == "llama"
    assert found.of_architecture("context_length") == model.trained_context
    assert found.weight_bytes == model.bytes
    assert found.parameters == llama_cpp.llama_model_n_params(model.handle)
    assert found.metadata["tokenizer.ggml.tokens"] == model.vocabulary.size
    assert found.metadata["tokenizer.chat_template"] == model.chat_template
    assert found.main_type == "Q4_1"
    assert found.context_kib == 22.5


def test_the_sizes_of_weights_are_the_librarys_own() -> None:
    base = ctypes.CDLL("libggml-base.so.0")
    base.ggml_type_name.restype = ctypes.c_char_p
    base.ggml_blck_size.restype = ctypes.c_int64
    base.ggml_type_size.restype = ctypes.c_size_t
    for number, (name, block, size) in gguf.BLOCKS.items():
        assert base.ggml_type_name(number).decode().upper() == name
        assert (base.ggml_blck_size(number), base.ggml_type_size(number)) == (block, size)


def test_a_file_that_ends_within_its_header_is_refused_wherever_that_is(tmp_path: Path, head: bytes) -> None:
    for length in (0, 3, 4, 12, 23, 24, 40, 100, 5_000, 900_000):
        with pytest.raises(gguf.GgufError, match="expected"):
            gguf.read(_written(tmp_path, head[:length]))


def test_a_file_that_ends_within_its_weights_is_refused(tmp_path: Path, head: bytes) -> None:
    with pytest.raises(gguf.GgufError, match="cut short"):
        gguf.read(_written(tmp_path, head))


@pytest.mark.parametrize("magic", [b"PK\x03\x04", b"\x7fELF", b"GGML", b"ggjt", b"<htm"])
def test_files_of_other_kinds_are_refused(tmp_path: Path, head: bytes, magic: bytes) -> None:
    with pytest.raises(gguf.GgufError, match="expected a GGUF file"):
        gguf.read(_written(tmp_path, magic + head[4:]))


@pytest.mark.parametrize("version", [0, 1, 4, 0x03000000])
def test_other_versions_are_refused(tmp_path: Path, head: bytes, version: int) -> None:
    with pytest.raises(gguf.GgufError, match="version"):
        gguf.read(_written(tmp_path, head[:4] + struct.pack("<I", version) + head[8:]))


@pytest.mark.parametrize("counts", [(0, 1), (2**40, 1), (1, 2**40), (2**63, 2**63)])
def test_absurd_counts_are_refused_at_once(tmp_path: Path, head: bytes, counts: tuple[int, int]) -> None:
    with pytest.raises(gguf.GgufError, match="expected"):
        gguf.read(_written(tmp_path, head[:8] + struct.pack("<QQ", *counts) + head[24:]))


def test_a_tampered_byte_anywhere_in_the_header_never_does_worse_than_a_refusal(tmp_path: Path, head: bytes) -> None:
    # Whatever the byte becomes, the file (cut short as it is) is refused, in time, without asking for much memory.
    for place in [*range(4, 120, 3), *range(200, 4000, 401), *range(1_700_000, 1_760_000, 19_997)]:
        with pytest.raises(gguf.GgufError):
            gguf.read(_written(tmp_path, head[:place] + bytes([head[place] ^ 0xFF]) + head[place + 1 :]))


def test_lists_within_lists_are_refused(tmp_path: Path) -> None:
    nested = struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 9, 1) + bytes(64)
    with pytest.raises(gguf.GgufError, match="list of numbers or texts"):
        gguf.read(_written(tmp_path, nested))
