"""llama.cpp through llama-cpp-python's low-level binding: a model, its vocabulary, a context and the batches fed to it.

Only what the step loop needs, and nothing that waits or decides. Everything here runs in the model's own process: a
fault in native code ends that process. Interfaces: llama.cpp's `include/llama.h` and ggml's `ggml-cpu.h`.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from numpy.typing import NDArray

from quern.inference.llama_options import BackendOptions

Floats = NDArray[np.float32]

_MAX_THREADS = 512  # GGML_MAX_N_THREADS
_INT32_POINTER = ctypes.POINTER(ctypes.c_int32)
#: ggml's and llama.cpp's own log goes nowhere: it tells of every tensor. What matters is raised.
_SILENT = api.llama_log_callback(lambda _level, _text, _data: None)


class LlamaError(Exception):
    """llama.cpp said no; the text says to what."""


class NoRoomError(LlamaError):
    """The context memory has no room for the batch."""


class _ThreadPoolParameters(ctypes.Structure):
    """`ggml_threadpool_params` of ggml.h."""

    _fields_ = [
        ("cpumask", ctypes.c_bool * _MAX_THREADS),
        ("n_threads", ctypes.c_int),
        ("prio", ctypes.c_int),
        ("poll", ctypes.c_uint32),
        ("strict_cpu", ctypes.c_bool),
        ("paused", ctypes.c_bool),
    ]


def _libraries() -> Path:
    return Path(api.__file__).parent / "lib"


def _library(name: str) -> ctypes.CDLL:
    # By the name that libllama itself asks for: a wheel holds copies instead of links, and `libggml.so` by its path
    # would be a second ggml with a registry of its own, where nothing that is changed has any effect on libllama.
    return ctypes.CDLL(f"lib{name}.so.0")


def start_backend(blas: bool) -> None:
    """Bring up ggml once in this process, with or without its OpenBLAS backend.

    A build with several CPU variants is loaded here too: ggml picks the best one for this CPU.
    """
    api.llama_log_set(_SILENT, ctypes.c_void_p())
    ggml = _library("ggml")
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    if not ggml.ggml_backend_reg_by_name(b"CPU"):
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(_libraries()).encode())
    registered = ggml.ggml_backend_reg_by_name(b"BLAS")
    if registered and not blas:
        ggml.ggml_backend_unload.argtypes = [ctypes.c_void_p]
        ggml.ggml_backend_unload(registered)
    api.llama_backend_init()


def blas_is_available() -> bool:
    """Whether ggml has its OpenBLAS backend at hand in this process."""
    ggml = _library("ggml")
    ggml.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    ggml.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
    return bool(ggml.ggml_backend_reg_by_name(b"BLAS"))


class Vocabulary:
    """A model's tokens: text to tokens and back."""

    def __init__(self, handle: Any) -> None:
        self.handle = handle
        self.size = int(api.llama_vocab_n_tokens(handle))
        self.ends = frozenset(token for token in range(self.size) if api.llama_vocab_is_eog(handle, token))
        self.adds_bos = bool(api.llama_vocab_get_add_bos(handle))
        self.bos = int(api.llama_vocab_bos(handle))
        self.eos = int(api.llama_vocab_eos(handle))
        self._pieces: dict[int, bytes] = {}
        control = [token for token in range(self.size) if api.llama_vocab_is_control(handle, token)]
        self._control_texts = [text for token in control if (text := self.text(token))]

    def tokenize(self, text: str, *, control: bool, bos: bool = False) -> list[int]:
        """The tokens of a text.

        Args:
            control: whether the text of a control token stands for that token. Never True for text from outside.
            bos: whether to begin with the model's own first token, if it has one.
        """
        data = text.encode("utf-8", "replace")
        if not data and not bos:
            return []
        room = len(data) + 8
        tokens = (api.llama_token * room)()
        count = api.llama_tokenize(self.handle, data, len(data), tokens, room, bos, control)
        if count < 0:
            raise LlamaError(f"expected at most {room} tokens for {len(data)} bytes, found {-count}")
        return list(tokens[:count])

    def piece(self, token: int, *, control: bool = False) -> bytes:
        """The bytes that a token stands for; a control token stands for none unless asked for."""
        if not control and (known := self._pieces.get(token)) is not None:
            return known
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            count = api.llama_token_to_piece(self.handle, token, buffer, size, 0, control)
            if count >= 0:
                break
            size = -count
        found = buffer.raw[:count]
        if not control:
            self._pieces[token] = found
        return found

    def has_control_text(self, text: str) -> bool:
        """Whether a text contains what a control token is written as."""
        return any(control in text for control in self._control_texts)

    def text(self, token: int) -> str:
        """A token's own text, control tokens included."""
        return self.piece(token, control=True).decode("utf-8", "replace")


class Model:
    """The weights of one GGUF file. Free it with `close` when no context uses it.

    Args:
        packed: whether ggml lays the weights out as its own kernels read them best. OpenBLAS cannot read such weights,
            so without a word they are packed where it is not up in this process.
    """

    def __init__(self, path: Path, *, packed: bool | None = None) -> None:
        packed = not blas_is_available() if packed is None else packed
        parameters = api.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = packed
        # What is packed is a copy: the file's pages would be held beside it for nothing.
        parameters.load_mode = api.LLAMA_LOAD_MODE_NONE if packed else api.LLAMA_LOAD_MODE_MMAP
        handle = api.llama_model_load_from_file(str(path).encode(), parameters)
        if not handle:
            raise LlamaError(f"{path.name}: llama.cpp cannot load this file")
        self.handle = handle
        self.vocabulary = Vocabulary(api.llama_model_get_vocab(handle))
        self.trained_context = int(api.llama_model_n_ctx_train(handle))
        self.bytes = int(api.llama_model_size(handle))
        template = api.llama_model_chat_template(handle, None)
        self.chat_template = template.decode("utf-8", "replace") if template else None

    def close(self) -> None:
        """Give the memory back."""
        api.llama_model_free(self.handle)


def _pointer_type(field: Any) -> Any:
    return type(field)


def _address(values: NDArray[Any], field: Any) -> Any:
    """A pointer to numpy memory, of the type that a field of a structure has."""
    return ctypes.cast(values.ctypes.data, _pointer_type(field))


class Batch:
    """A `llama_batch` over numpy memory: filling it costs no ctypes call for each token."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._tokens, self._positions, self._counts, self._sequences = (np.zeros(capacity, np.int32) for _ in range(4))
        self._counts[:] = 1
        self._wanted = np.zeros(capacity, np.int8)
        base = self._sequences.ctypes.data
        self._pointers = (_INT32_POINTER * capacity)(
            *(ctypes.cast(base + 4 * i, _INT32_POINTER) for i in range(capacity))
        )
        self.raw = api.llama_batch()
        self.raw.token = _address(self._tokens, self.raw.token)
        self.raw.pos = _address(self._positions, self.raw.pos)
        self.raw.n_seq_id = _address(self._counts, self.raw.n_seq_id)
        self.raw.seq_id = ctypes.cast(self._pointers, _pointer_type(self.raw.seq_id))
        self.raw.logits = _address(self._wanted, self.raw.logits)

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.size

    def clear(self) -> None:
        """Empty it."""
        self.size = 0

    def add(
        self,
        tokens: Sequence[int] | NDArray[np.int32],
        position: int,
        sequence: int,
        *,
        wants_logits: bool,
        of_every_token: bool = False,
    ) -> int:
        """Append tokens of one sequence, the first at `position`; returns the row of the last one.

        Args:
            wants_logits: of the last token, or of all with `of_every_token`.
        """
        start, end = self.size, self.size + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._sequences[start:end] = sequence
        self._wanted[start:end] = wants_logits and of_every_token
        self._wanted[end - 1] = wants_logits
        self.size = self.raw.n_tokens = end
        return end - 1


class Context:
    """The context memory of a model, shared by up to `sequences` sequences, and the threads that compute on it."""

    def __init__(self, model: Model, size: int, sequences: int, batch: int, options: BackendOptions) -> None:
        parameters = api.llama_context_default_params()
        parameters.n_ctx = size
        parameters.n_batch = parameters.n_ubatch = batch
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = options.threads
        # One memory for all sequences, so that a prefix is shared by marking its cells instead of copying them.
        parameters.kv_unified = True
        parameters.swa_full = True
        handle = api.llama_init_from_model(model.handle, parameters)
        if not handle:
            raise LlamaError(f"llama.cpp cannot make a context of {size} tokens")
        self.handle = handle
        self.size = int(api.llama_n_ctx(handle))
        self._memory = api.llama_get_memory(handle)
        self._row_pointer = ctypes.POINTER(ctypes.c_float * model.vocabulary.size)
        self._pool = self._attach_threads(options)

    def _attach_threads(self, options: BackendOptions) -> Any:
        """Threads that sleep between steps (`poll` 0) do not take the cores from OpenBLAS's own threads."""
        base, cpu, llama = _library("ggml-base"), _library("ggml"), _library("llama")
        parameters = _ThreadPoolParameters()
        base.ggml_threadpool_params_init(ctypes.byref(parameters), ctypes.c_int(options.threads))
        parameters.poll = options.poll
        cpu.ggml_backend_reg_by_name.restype = ctypes.c_void_p
        cpu.ggml_backend_reg_by_name.argtypes = [ctypes.c_char_p]
        cpu.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
        cpu.ggml_backend_reg_get_proc_address.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        # By address and not by name: in a build with several CPU variants each one brings its own.
        address = cpu.ggml_backend_reg_get_proc_address(cpu.ggml_backend_reg_by_name(b"CPU"), b"ggml_threadpool_new")
        pool = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(parameters))
        if not pool:
            raise LlamaError(f"ggml cannot start {options.threads} threads")
        llama.llama_attach_threadpool.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
        llama.llama_attach_threadpool.restype = None
        llama.llama_attach_threadpool(self.handle, pool, pool)
        return pool

    def decode(self, batch: Batch) -> None:
        """Compute a batch.

        Raises:
            NoRoomError: the context memory is full; nothing was computed.
            LlamaError: anything else.
        """
        code = api.llama_decode(self.handle, batch.raw)
        if code == 1:
            raise NoRoomError(f"no room for {batch.size} tokens in a context of {self.size}")
        if code:
            raise LlamaError(f"llama_decode failed with {code}")

    def logits(self, row: int) -> Floats:
        """A view of one row's logits, good until the next `decode`."""
        pointer = api.llama_get_logits_ith(self.handle, row)
        if not pointer:
            raise LlamaError(f"row {row} has no logits")
        values: Floats = np.ctypeslib.as_array(ctypes.cast(pointer, self._row_pointer).contents)
        return values

    def use_threads(self, threads: int) -> None:
        """Compute the next batches with this many threads."""
        api.llama_set_n_threads(self.handle, threads, threads)

    def share(self, source: int, target: int, length: int) -> None:
        """Let `target` begin with the first `length` tokens of `source`, without copying them."""
        api.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def cut(self, sequence: int, start: int) -> None:
        """Forget a sequence's tokens from position `start` on."""
        if not api.llama_memory_seq_rm(self._memory, sequence, start, -1):
            raise LlamaError(f"the memory of this model cannot be cut at {start}")

    def forget(self, sequence: int) -> None:
        """Forget a whole sequence."""
        api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def length(self, sequence: int) -> int:
        """How many tokens of a sequence are in memory."""
        return int(api.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    def clear(self) -> None:
        """Forget every sequence and overwrite what was kept of them."""
        api.llama_memory_clear(self._memory, True)

    def close(self) -> None:
        """Give the memory back; the threads end with the process."""
        api.llama_free(self.handle)


_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@contextmanager
def _without_standard_error() -> Iterator[None]:
    """llama.cpp prints a grammar that it cannot read, and a tenant's schema has no place in a log."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


class Grammar:
    """A GBNF grammar's state along one answer."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        with _without_standard_error():
            self._handle = api.llama_sampler_init_grammar(vocabulary.handle, text.encode(), b"root")
        if not self._handle:
            raise LlamaError("llama.cpp cannot read this grammar")

    def allowed(self, tokens: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these tokens may come next."""
        records = np.zeros(len(tokens), _CANDIDATE)
        records["id"] = tokens
        data = ctypes.cast(records.ctypes.data, ctypes.POINTER(api.llama_token_data))
        array = api.llama_token_data_array(data, len(tokens), -1, False)
        api.llama_sampler_apply(self._handle, ctypes.byref(array))
        return np.asarray(records["logit"] != -np.inf)

    def accept(self, token: int) -> None:
        """Go on past a token that was allowed."""
        api.llama_sampler_accept(self._handle, token)

    def close(self) -> None:
        """Give the memory back."""
        if self._handle:
            api.llama_sampler_free(self._handle)
            self._handle = None


_SYSTEM_INFO = re.compile(r"(\w+) = 1")


def system_features() -> list[str]:
    """CPU features that this build of llama.cpp uses."""
    return _SYSTEM_INFO.findall(api.llama_print_system_info().decode())
