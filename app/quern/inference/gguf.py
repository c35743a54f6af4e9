"""What a GGUF file says of itself, read in Python so that no native code meets a damaged or foreign file.

Reads the header alone (metadata and the list of tensors) and compares it with the file's size: a file that was cut
short, or whose counts and offsets were tampered with, is found here. Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
HEADER_BYTES = 24
VERSIONS = (2, 3)
#: Far above what any model has; a damaged count must not make this program ask for all memory.
MOST_TENSORS, MOST_KEYS, MOST_DIMENSIONS, MOST_NAME_BYTES = 65_536, 65_536, 4, 1024
#: Longest list that is kept; longer ones (the vocabulary) are only counted.
LONGEST_KEPT_LIST = 256
#: Weights in one block and bytes of it, by ggml's number of the type (ggml.h; a test compares with the library).
BLOCKS: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    29: ("IQ1_M", 256, 56),
    30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
}
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ALIGNMENT = 32


class GgufError(Exception):
    """The file is not a whole GGUF file; the text says what was expected and what was found."""


@dataclass(frozen=True)
class Tensor:
    """A tensor's place: `offset` in bytes from where the weights begin."""

    name: str
    kind: str
    elements: int
    offset: int
    bytes: int


@dataclass(frozen=True)
class Gguf:
    """A file's metadata (long lists are replaced by their length) and its tensors."""

    metadata: dict[str, Any]
    tensors: tuple[Tensor, ...]
    data_start: int
    size: int

    def of_architecture(self, key: str) -> Any:
        """A value of the model's architecture: `context_length` stands for `llama.context_length`, say."""
        return self.metadata.get(f"{self.architecture}.{key}")

    @property
    def architecture(self) -> str:
        """llama, qwen2, gemma3, …"""
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        """How many weights there are."""
        return sum(tensor.elements for tensor in self.tensors)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(tensor.bytes for tensor in self.tensors)

    @property
    def main_type(self) -> str:
        """The type that most of the weights have."""
        bytes_by_type: dict[str, int] = {}
        for tensor in self.tensors:
            bytes_by_type[tensor.kind] = bytes_by_type.get(tensor.kind, 0) + tensor.elements
        return max(bytes_by_type, key=lambda kind: bytes_by_type[kind], default="none")

    @property
    def context_kib(self) -> float:
        """KiB of context memory for one token: keys and values of every layer, 16 bits each."""
        layers = int(self.of_architecture("block_count") or 0)
        heads = int(self.of_architecture("attention.head_count") or 1)
        kv_heads = self.of_architecture("attention.head_count_kv") or heads
        per_layer = kv_heads if isinstance(kv_heads, list) else [int(kv_heads)] * layers
        width = int(self.of_architecture("embedding_length") or 0) // heads
        key = int(self.of_architecture("attention.key_length") or width)
        value = int(self.of_architecture("attention.value_length") or width)
        return sum(int(count) for count in per_layer) * (key + value) * 2 / 1024


class _Reader:
    """Values one after another out of a file's bytes; never beyond their end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data, self._size, self.place = data, size, 0

    def number(self, form: str) -> Any:
        length = struct.calcsize("<" + form)
        self._need(length)
        (value,) = struct.unpack_from("<" + form, self._data, self.place)
        self.place += length
        return value

    def text(self, limit: int | None = None) -> str:
        length = self.number("Q")
        if limit is not None and length > limit:
            raise GgufError(f"expected a name of at most {limit} bytes at byte {self.place}, found {length}")
        self._need(length)
        value = self._data[self.place : self.place + length]
        self.place += length
        return value.decode("utf-8", "replace")

    def skip_texts(self, count: int) -> None:
        for _ in range(count):
            length = self.number("Q")
            self._need(length)
            self.place += length

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise GgufError(f"expected a known type of value before byte {self.place}, found {kind}")
            return self.number(_SCALARS[kind])
        of, count = self.number("I"), self.number("Q")
        if of != _STRING and of not in _SCALARS:
            raise GgufError(f"expected a list of numbers or texts before byte {self.place}, found type {of}")
        if count <= LONGEST_KEPT_LIST:
            return [self.value(of) for _ in range(count)]
        if of == _STRING:
            self.skip_texts(count)
        else:
            length = count * struct.calcsize("<" + _SCALARS[of])
            self._need(length)
            self.place += length
        return count

    def _need(self, length: int) -> None:
        if self.place + length > self._size:
            raise GgufError(
                f"expected {length} more bytes of header at byte {self.place}, found the end of the file "
                f"at {self._size}: it was cut short or is damaged"
            )


def read(path: Path) -> Gguf:
    """Read and check a file's header; the weights themselves are not looked at.

    Raises:
        GgufError: foreign, cut short, or tampered with.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(HEADER_BYTES)
        size = file.seek(0, 2)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise GgufError(f"expected a GGUF file, found {head[:4]!r} and {size} bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(data, size), size)


def _read(reader: _Reader, size: int) -> Gguf:
    reader.place = len(MAGIC)
    version = reader.number("I")
    if version not in VERSIONS:
        raise GgufError(f"expected version {' or '.join(map(str, VERSIONS))} of GGUF, found {version}")
    tensor_count, key_count = reader.number("Q"), reader.number("Q")
    if not 0 < tensor_count <= MOST_TENSORS or key_count > MOST_KEYS:
        raise GgufError(
            f"expected 1 to {MOST_TENSORS} tensors and at most {MOST_KEYS} keys, found {tensor_count} and {key_count}"
        )
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = reader.text(MOST_NAME_BYTES * 64)
        metadata[key] = reader.value(reader.number("I"))
    tensors = tuple(_tensor(reader) for _ in range(tensor_count))
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"expected a power of two as general.alignment, found {alignment!r}")
    start = (reader.place + alignment - 1) // alignment * alignment
    for tensor in tensors:
        if tensor.offset % alignment:
            raise GgufError(f"tensor {tensor.name}: expected an offset divisible by {alignment}, found {tensor.offset}")
        if (end := start + tensor.offset + tensor.bytes) > size:
            raise GgufError(
                f"tensor {tensor.name}: expected weights up to byte {end}, found a file of {size}: cut short"
            )
    return Gguf(metadata, tensors, start, size)


def _tensor(reader: _Reader) -> Tensor:
    name = reader.text(MOST_NAME_BYTES)
    dimensions = reader.number("I")
    if dimensions > MOST_DIMENSIONS:
        raise GgufError(f"tensor {name}: expected at most {MOST_DIMENSIONS} dimensions, found {dimensions}")
    shape = [reader.number("Q") for _ in range(dimensions)]
    number, offset = reader.number("I"), reader.number("Q")
    if number not in BLOCKS:
        raise GgufError(f"tensor {name}: expected a known type of weights, found number {number}")
    kind, block, block_bytes = BLOCKS[number]
    elements = math.prod(shape)
    if shape and shape[0] % block:
        raise GgufError(f"tensor {name}: expected rows divisible by {block} for {kind}, found {shape[0]}")
    return Tensor(name, kind, elements, offset, elements // block * block_bytes)
