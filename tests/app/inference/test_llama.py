"""What packed weights promise: the products of the file's own, whoever else is in the step."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from quern.inference import llama
from quern.inference.llama_options import BackendOptions

Floats = NDArray[np.float32]
BLOCK = 32
F32 = 0
#: ggml's number of each type whose weights are packed, and how a block of 32 is read: ggml-common.h.
TYPES = {"q4_0": 2, "q4_1": 3, "q8_0": 8}


def _weights(kind: str, packed: bytes, rows: int, width: int) -> NDArray[np.float64]:
    """What the bytes of a file mean."""
    data = np.frombuffer(packed, np.uint8).reshape(rows, width // BLOCK, -1)
    heads = 4 if kind == "q4_1" else 2
    scales = data[..., :heads].copy().view(np.float16).astype(np.float64)
    rest = data[..., heads:]
    if kind == "q8_0":
        values = rest.view(np.int8).astype(np.float64)
    else:
        values = np.concatenate([rest & 15, rest >> 4], axis=-1).astype(np.float64)
    values = (values - 8 if kind == "q4_0" else values) * scales[..., :1]
    values = values + scales[..., 1:] if kind == "q4_1" else values
    return np.asarray(values.reshape(rows, width), np.float64)


def _rounded(columns: Floats) -> NDArray[np.float64]:
    """Columns as ggml rounds them before it multiplies: signed bytes with one scale for each block."""
    blocks = columns.astype(np.float64).reshape(len(columns), -1, BLOCK)
    scales = np.abs(blocks).max(axis=-1, keepdims=True) / 127
    rounded: NDArray[np.float64] = np.rint(blocks / np.where(scales, scales, 1)) * scales
    return rounded.reshape(columns.shape)


class Ggml:
    """As much of ggml's C interface as one product needs (ggml.h, ggml-backend.h)."""

    def __init__(self) -> None:
        llama.start_backend(blas=True)
        self._libraries = [llama._library(name) for name in ("ggml-base", "ggml")]
        registry = self.pointer("ggml_backend_reg_by_name", b"CPU")
        self.device = self.pointer("ggml_backend_reg_dev_get", registry, ctypes.c_size_t(0))
        self._backend = self.pointer("ggml_backend_dev_init", self.device, None)
        address = ctypes.c_void_p
        asked = self.pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_set_n_threads")
        self._set_threads = ctypes.CFUNCTYPE(None, address, ctypes.c_int)(asked.value or 0)
        asked = self.pointer("ggml_backend_reg_get_proc_address", registry, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(address), address)(asked.value or 0)(self.device)
        self._packing: list[ctypes.c_void_p] = []
        while extra and extra[len(self._packing)]:
            self._packing.append(address(extra[len(self._packing)]))

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        function = next(getattr(library, name) for library in self._libraries if hasattr(library, name))
        function.restype = result
        return function(*arguments)

    def pointer(self, name: str, *arguments: Any) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.call(name, ctypes.c_void_p, *arguments))

    @contextmanager
    def _context(self) -> Iterator[ctypes.c_void_p]:
        class Parameters(ctypes.Structure):
            _fields_ = (("size", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))

        context = self.pointer("ggml_init", Parameters(1 << 20, None, True))
        yield context
        self.call("ggml_free", None, context)

    def product(self, kind: str, packed: bytes, rows: int, columns: Floats, threads: int) -> Floats:
        """Weights times columns, the weights laid out as a model's are when it is loaded."""
        usual = self.pointer("ggml_backend_get_default_buffer_type", self._backend)
        found = (self._product_in(place, kind, packed, rows, columns, threads) for place in [*self._packing, usual])
        return next(product for product in found if product is not None)

    def _product_in(
        self, place: ctypes.c_void_p, kind: str, packed: bytes, rows: int, columns: Floats, threads: int
    ) -> Floats | None:
        count, width = columns.shape
        with self._context() as held, self._context() as computed:
            shape = [ctypes.c_int64(width), ctypes.c_int64(rows)]
            weights = self.pointer("ggml_new_tensor_2d", held, TYPES[kind], *shape)
            right = self.pointer("ggml_new_tensor_2d", computed, F32, shape[0], ctypes.c_int64(count))
            product = self.pointer("ggml_mul_mat", computed, weights, right)
            graph = self.pointer("ggml_new_graph", computed)
            self.call("ggml_build_forward_expand", None, graph, product)
            buffers = [self.pointer("ggml_backend_alloc_ctx_tensors_from_buft", held, place)]
            try:
                if not self.call("ggml_backend_dev_supports_op", ctypes.c_bool, self.device, product):
                    return None
                buffers.append(self.pointer("ggml_backend_alloc_ctx_tensors", computed, self._backend))
                start = ctypes.c_size_t(0)
                for tensor, data in ((weights, packed), (right, columns.tobytes())):
                    self.call("ggml_backend_tensor_set", None, tensor, data, start, ctypes.c_size_t(len(data)))
                self._set_threads(self._backend, threads)
                assert self.call("ggml_backend_graph_compute", ctypes.c_int, self._backend, graph) == 0
                result = np.empty((count, rows), np.float32)
                into = result.ctypes.data_as(ctypes.c_void_p)
                self.call("ggml_backend_tensor_get", None, product, into, start, ctypes.c_size_t(result.nbytes))
                return result
            finally:
                for buffer in buffers:
                    self.call("ggml_backend_buffer_free", None, buffer)

    def quantized(self, kind: str, weights: Floats) -> bytes:
        rows, width = weights.shape
        size = self.call("ggml_row_size", ctypes.c_size_t, TYPES[kind], ctypes.c_int64(width)) * rows
        packed = ctypes.create_string_buffer(size)
        source = weights.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        numbers = (ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(width))
        self.call("ggml_quantize_chunk", ctypes.c_size_t, TYPES[kind], source, packed, *numbers, None)
        return packed.raw


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize(("rows", "width"), [(16, 32), (48, 96), (80, 576), (24, 64)])
def test_packed_weights_give_the_products_of_the_file_s(ggml: Ggml, kind: str, rows: int, width: int) -> None:
    chance = np.random.default_rng(rows * width)
    packed = ggml.quantized(kind, chance.normal(size=(rows, width)).astype(np.float32))
    weights = _weights(kind, packed, rows, width)
    for count in (1, 2, 7, 8, 9, 13, 40):
        columns = (chance.normal(size=(count, width)) * 10.0 ** chance.integers(-3, 4, (count, 1))).astype(np.float32)
        columns[0, :BLOCK] = 0
        expected = _rounded(columns) @ weights.T
        for threads in (1, 2):
            found = ggml.product(kind, packed, rows, columns, threads)
            # Scales may be kept in half precision; a lane, block or column taken for another would be off by its size.
            off, allowed = np.abs(found - expected).max(axis=1), 0.01 * np.abs(expected).max(axis=1)
            assert (off <= allowed).all(), (count, threads, off, allowed)


def test_a_column_s_product_is_the_same_whoever_is_in_the_step(ggml: Ggml) -> None:
    if "avx2" not in Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"):
        pytest.skip("ggml's own kernels round a column by how many there are; those of scripts/llama.patch do not")
    chance = np.random.default_rng(7)
    columns = chance.normal(size=(30, 192)).astype(np.float32)
    for kind in TYPES:
        packed = ggml.quantized(kind, chance.normal(size=(64, 192)).astype(np.float32))
        alone = np.concatenate([ggml.product(kind, packed, 64, column[None], 1) for column in columns])
        for count in (2, 8, 11, 30):
            assert np.array_equal(ggml.product(kind, packed, 64, columns[:count], 2), alone[:count])


def test_a_model_with_packed_weights_thinks_as_with_the_file_s_own(chat_path: Path) -> None:
    llama.start_backend(blas=True)
    rows = []
    for packed in (False, True):
        model = llama.Model(chat_path, packed=packed)
        context = llama.Context(model, 512, 1, 512, BackendOptions(threads=1, poll=0, blas=True))
        batch = llama.Batch(512)
        row = batch.add(model.vocabulary.tokenize("The capital of France is", control=False), 0, 0, wants_logits=True)
        context.decode(batch)
        rows.append(np.array(context.logits(row)[: model.vocabulary.size], dtype=np.float64))
        context.close()
        model.close()
    plain, packed_ones = rows
    assert np.corrcoef(plain, packed_ones)[0, 1] > 0.99
    assert not np.array_equal(plain, packed_ones)  # the same to the last bit would be the same weights twice
