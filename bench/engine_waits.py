"""Whether the threads' waits for one another bound the generation of one sequence, or the bytes of the weights do.

ggml's threads meet after each operation of the graph, and once more within each product of matrices. This program
measures one such meeting (a graph of additions of one number, with one thread and with all), counts a step's meetings,
and sets a step's time beside bytes / read rate + meetings x time of one. `--large` adds a model of random weights in
the shape of SmolLM2-1.7B in Q8_0 (1.8 GB, made once in `$QUERN_CACHE/bench-models`): its speed is true, its words not.

    .venv/bin/python bench/engine_waits.py [--type q8_0 …] [--model FILE …] [--large]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import time
from collections import Counter
from pathlib import Path
from typing import Any

import llama_cpp as api
import numpy as np
from engine_latency import read_rate
from engine_models import bench_model, machine

from quern.inference import gguf, llama, registry
from quern.inference.llama_options import BackendOptions

STEPS = 80
EMPTY = {"NONE", "VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}


def step_seconds(model: llama.Model, threads: int, poll: int) -> float:
    """The quickest tenth's mean of single-token steps."""
    context = llama.Context(model, 512, 1, 64, BackendOptions(threads, poll, blas=False))
    batch = llama.Batch(64)
    batch.add(list(range(500, 540)), 0, 0, wants_logits=True)
    context.decode(batch)
    taken = []
    for position in range(40, 40 + STEPS):
        batch.clear()
        batch.add([500 + position], position, 0, wants_logits=True)
        started = time.perf_counter()
        context.decode(batch)
        taken.append(time.perf_counter() - started)
    context.close()
    return float(np.mean(sorted(taken)[: STEPS // 10]))


def operations(model: llama.Model) -> Counter[str]:
    """The operations of a single-token step that compute something, by name."""
    base, found = llama._library("ggml-base"), Counter[str]()
    base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [ctypes.c_void_p]

    def look(tensor: int, ask: bool, _: int) -> bool:
        if ask and (name := base.ggml_op_desc(tensor).decode()) not in EMPTY:
            found[name] += 1
        return not ask

    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_batch, parameters.n_threads, parameters.n_threads_batch = 512, 64, 1, 1
    watch = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)(look)
    parameters.cb_eval = ctypes.cast(watch, type(parameters.cb_eval))
    handle = api.llama_init_from_model(model.handle, parameters)
    batch = llama.Batch(8)
    for position in range(2):
        batch.clear()
        batch.add([500 + position], position, 0, wants_logits=True)
        found.clear()
        api.llama_decode(handle, batch.raw)
    api.llama_free(handle)
    return found


def meeting_seconds(threads: int) -> float:
    """One meeting of this many threads: what a graph of many additions takes beyond one of few, for each of them."""
    base, ggml = llama._library("ggml-base"), llama._library("ggml")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t

    def call(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
        function = getattr(library, name)
        function.restype = result
        return function(*arguments)

    class Parameters(ctypes.Structure):
        _fields_ = (("mem_size", size), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool))

    backend = pointer(call(ggml, "ggml_backend_init_by_name", pointer, b"CPU", None))
    registry_ = pointer(call(ggml, "ggml_backend_reg_by_name", pointer, b"CPU"))
    address = call(ggml, "ggml_backend_reg_get_proc_address", pointer, registry_, b"ggml_backend_set_n_threads")
    ctypes.CFUNCTYPE(None, pointer, ctypes.c_int)(address)(backend, threads)
    seconds = {}
    for count in (1000, 5000):
        context = pointer(call(base, "ggml_init", pointer, Parameters(16 << 20, None, True)))
        one = pointer(call(base, "ggml_new_tensor_1d", pointer, context, 0, ctypes.c_int64(1)))
        total = one
        for _ in range(count):
            total = pointer(call(base, "ggml_add", pointer, context, total, one))
        graph = pointer(call(base, "ggml_new_graph_custom", pointer, context, size(count + 8), ctypes.c_bool(False)))
        call(base, "ggml_build_forward_expand", None, graph, total)
        call(base, "ggml_backend_alloc_ctx_tensors", pointer, context, backend)
        call(base, "ggml_backend_tensor_set", None, one, (ctypes.c_float * 1)(1.0), size(0), size(4))
        taken = []
        for _ in range(40):
            started = time.perf_counter()
            call(base, "ggml_backend_graph_compute", ctypes.c_int, backend, graph)
            taken.append(time.perf_counter() - started)
        seconds[count] = min(taken)
    return (seconds[5000] - seconds[1000]) / 4000


def large_model() -> Path:
    """Random Q8_0 weights in the shape of SmolLM2-1.7B, with the small model's vocabulary."""
    models = registry.default_models_dir()
    target = models.parent / "bench-models" / "random-1.7b-q8_0.gguf"
    if target.exists():
        return target
    source = bench_model("q4_1").path
    layers, width, inner, words = 24, 2048, 8192, 49152
    shape = {
        "block_count": layers,
        "embedding_length": width,
        "feed_forward_length": inner,
        "attention.head_count": 32,
        "attention.head_count_kv": 32,
        "rope.dimension_count": 64,
    }
    data = source.read_bytes()
    header = bytearray(data[: gguf.read(source).data_start])
    for name, value in shape.items():
        key = f"llama.{name}".encode()
        at = header.index(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4
        struct.pack_into("<I", header, at, value)
    first = b"token_embd.weight"
    metadata = header[
        : min(header.index(struct.pack("<Q", len(name)) + name) for name in (first, b"output_norm.weight"))
    ]
    tensors = [("token_embd.weight", (width, words)), ("output_norm.weight", (width,))]
    for layer in range(layers):
        parts = {"attn_norm": (width,), "ffn_norm": (width,), "ffn_down": (inner, width)}
        parts |= {f"attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
        parts |= {f"ffn_{part}": (width, inner) for part in ("gate", "up")}
        tensors += [(f"blk.{layer}.{name}.weight", sizes) for name, sizes in parts.items()]
    struct.pack_into("<Q", metadata, 8, len(tensors))
    listed, offset, sizes_of = bytearray(), 0, []
    for name, sizes in tensors:
        elements, plain = int(np.prod(sizes)), len(sizes) == 1
        listed += struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(sizes))
        listed += struct.pack(f"<{len(sizes)}Q", *sizes) + struct.pack("<IQ", 0 if plain else 8, offset)
        sizes_of.append((plain, elements))
        offset += elements * 4 if plain else elements // 32 * 34
    blocks = np.zeros(1 << 18, np.dtype([("scale", np.float16), ("weights", np.int8, 32)]))
    blocks["scale"] = 0.0005
    blocks["weights"] = np.random.default_rng(1).integers(-127, 128, (1 << 18, 32))
    with target.with_suffix(".part").open("wb") as file:
        file.write(metadata + listed)
        file.write(b"\0" * (-file.tell() % 32))
        for plain, elements in sizes_of:
            if plain:
                file.write(np.ones(elements, np.float32).tobytes())
            for start in range(0, 0 if plain else elements // 32, len(blocks)):
                file.write(blocks[: min(len(blocks), elements // 32 - start)].tobytes())
    target.with_suffix(".part").rename(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--type", nargs="*", default=["q4_0", "q8_0"])
    parser.add_argument("--model", nargs="*", type=Path, default=[])
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    llama.start_backend(blas=False)
    threads = len(os.sched_getaffinity(0))
    print(machine())
    meeting = min(meeting_seconds(threads) for _ in range(3)) - min(meeting_seconds(1) for _ in range(3))
    print(f"a meeting of {threads} threads: {meeting * 1e6:.2f} µs", flush=True)
    paths = [bench_model(kind).path for kind in arguments.type] + arguments.model
    for path in [*paths, *([large_model()] if arguments.large else [])]:
        model = llama.Model(path)
        found = operations(model)
        meetings = found.total() + sum(count for name, count in found.items() if name.startswith("MUL_MAT"))
        weights = gguf.read(path).weight_bytes
        rates: list[float] = []
        steps: dict[tuple[int, int], float] = {}
        for _ in range(arguments.rounds):
            rates.append(read_rate(threads))
            for way in [(1, 0), (threads, 0), (threads, 50), (threads, 100)]:
                steps[way] = min(step_seconds(model, *way), steps.get(way, 1e9))
        best, limit = min(steps.values()), weights / max(rates)
        print(
            f"{path.name}: {weights / 1e6:.0f} MB, reads {max(rates) / 1e9:.1f} GB/s: {limit * 1000:.2f} ms;"
            f" {found.total()} operations, {meetings} meetings: {meetings * meeting * 1000:.2f} ms;"
            f" a step {best * 1000:.2f} ms = {1 / best:.0f} tokens/s, {limit / best:.2f} of the read rate; "
            + ", ".join(
                f"{count} threads poll {poll}: {value * 1000:.2f} ms" for (count, poll), value in steps.items()
            ),
            flush=True,
        )


if __name__ == "__main__":
    main()
