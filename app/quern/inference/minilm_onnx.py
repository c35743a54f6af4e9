"""Turns the safetensors weights of a MiniLM sentence encoder into an ONNX graph with truly integer matrix products.

Needs only numpy and onnx, and runs as a program in the throw-away environment of scripts/fetch-models:
`python minilm_onnx.py model.safetensors model.onnx [--float]`.

Weights: symmetric int8, one scale for each output column, 7 bits wide so that the AVX2 kernels (which add two products
in 16 bits) cannot saturate. Activations: uint8, one scale for each call, found at run time. Quantisation scheme: Jacob
et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018. The
network is BERT (Devlin et al., 2018) with mean pooling and unit length (Reimers and Gurevych, 2019); fused operators
are ONNX Runtime's `com.microsoft` domain.
"""

from __future__ import annotations

import argparse
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS = 12
EPSILON = 1e-12
INT7 = 63


def read_safetensors(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Every float32 tensor of a safetensors file, by name."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(data[8 : 8 + length])
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__" and entry["dtype"] == "F32":
            start, end = entry["data_offsets"]
            raw = data[8 + length + start : 8 + length + end]
            tensors[name] = np.frombuffer(raw, np.float32).reshape(entry["shape"])
    return tensors


def quantise_columns(matrix: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """int8 values and one float32 scale for each column of an (inputs, outputs) matrix."""
    scale = np.maximum(np.abs(matrix).max(axis=0), 1e-12).astype(np.float32) / INT7
    return np.clip(np.rint(matrix / scale), -INT7, INT7).astype(np.int8), scale


class Graph:
    """Nodes and constants in the making; every value is named by the node that makes it."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray[Any, Any]) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(
        self, operator: str, inputs: list[str], name: str, outputs: int = 1, domain: str = "", **fields: Any
    ) -> str:
        names = [name, *(f"{name}/{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, domain=domain, **fields))
        return name

    def dense(
        self, value: str, weight: np.ndarray[Any, Any], bias: np.ndarray[Any, Any], name: str, integer: bool
    ) -> str:
        """`value @ weight.T + bias`, with `weight` as PyTorch keeps it: (outputs, inputs)."""
        offset = self.constant(f"{name}/bias", bias)
        if not integer:
            product = self.node("MatMul", [value, self.constant(f"{name}/weight", weight.T)], f"{name}/product")
            return self.node("Add", [product, offset], name)
        values, scale = quantise_columns(weight.T)
        inputs = [value, self.constant(f"{name}/weight", values), self.constant(f"{name}/scale", scale), "", offset]
        return self.node("DynamicQuantizeMatMul", inputs, name, domain="com.microsoft")


def build(weights: dict[str, np.ndarray[Any, Any]], integer: bool = True) -> onnx.ModelProto:
    """The encoder: `input_ids` and `attention_mask` to `embedding`.

    Both inputs are int64, batch × tokens; the output is float32, batch × hidden size, each row of length 1.

    Args:
        weights: BERT's tensors by their usual names, without a prefix.
        integer: False keeps float32 everywhere, for comparison.
    """
    graph = Graph()
    embeddings = "embeddings."
    words = weights[f"{embeddings}word_embeddings.weight"]
    # One row, one scale: a lookup is not a product, so all 8 bits may be used.
    row_scale = np.maximum(np.abs(words).max(axis=1, keepdims=True), 1e-12) / 127
    if integer:
        rows = graph.constant("words/rows", np.rint(words / row_scale).astype(np.int8))
        scales = graph.constant("words/scales", row_scale.astype(np.float32))
        looked_up = graph.node(
            "Cast", [graph.node("Gather", [rows, "input_ids"], "words/int8")], "words/cast", to=TensorProto.FLOAT
        )
        word = graph.node("Mul", [looked_up, graph.node("Gather", [scales, "input_ids"], "words/scale")], "words")
    else:
        word = graph.node("Gather", [graph.constant("words/rows", words), "input_ids"], "words")
    # Only one segment is ever used, so its embedding is part of every position's.
    places = (
        weights[f"{embeddings}position_embeddings.weight"] + weights[f"{embeddings}token_type_embeddings.weight"][0]
    )
    length = graph.node(
        "Gather", [graph.node("Shape", ["input_ids"], "shape"), graph.constant("one", np.array([1]))], "length"
    )
    places_used = graph.node(
        "Slice",
        [
            graph.constant("places/all", places),
            graph.constant("places/start", np.array([0])),
            length,
            graph.constant("places/axis", np.array([0])),
        ],
        "places",
    )
    hidden = graph.node(
        "LayerNormalization",
        [
            graph.node("Add", [word, places_used], "embedded"),
            graph.constant("embedded/gamma", weights[f"{embeddings}LayerNorm.weight"]),
            graph.constant("embedded/beta", weights[f"{embeddings}LayerNorm.bias"]),
        ],
        "embedded/norm",
        epsilon=EPSILON,
    )
    mask = graph.node("Cast", ["attention_mask"], "mask/int32", to=TensorProto.INT32)
    layers = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer."))
    for index in range(layers):
        hidden = _layer(graph, weights, f"encoder.layer.{index}.", hidden, mask, f"layer{index}", integer)
    weight = graph.node(
        "Unsqueeze",
        [
            graph.node("Cast", ["attention_mask"], "mask/float", to=TensorProto.FLOAT),
            graph.constant("axis2", np.array([2])),
        ],
        "mask/column",
    )
    axis = graph.constant("axis1", np.array([1]))
    total = graph.node("ReduceSum", [graph.node("Mul", [hidden, weight], "kept"), axis], "total", keepdims=0)
    count = graph.node("ReduceSum", [weight, axis], "count", keepdims=0)
    graph.node("LpNormalization", [graph.node("Div", [total, count], "mean")], "embedding", axis=1, p=2)
    size = words.shape[1]
    proto = helper.make_graph(
        graph.nodes,
        "minilm",
        [
            helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
            helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "tokens"]),
        ],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["batch", size])],
        graph.constants,
    )
    domains = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(proto, opset_imports=domains, ir_version=8, producer_name="quern")


def _layer(
    graph: Graph,
    weights: dict[str, np.ndarray[Any, Any]],
    prefix: str,
    hidden: str,
    mask: str,
    name: str,
    integer: bool,
) -> str:
    parts = [f"{prefix}attention.self.{part}" for part in ("query", "key", "value")]
    packed = np.concatenate([weights[f"{part}.weight"].T for part in parts], axis=1)
    bias = graph.constant(f"{name}/qkv/bias", np.concatenate([weights[f"{part}.bias"] for part in parts]))
    if integer:
        values, scale = quantise_columns(packed)
        graph.node("DynamicQuantizeLinear", [hidden], f"{name}/input", outputs=3)
        inputs = [f"{name}/input", graph.constant(f"{name}/qkv/weight", values), bias, f"{name}/input/1"]
        inputs += [graph.constant(f"{name}/qkv/scale", scale), mask, f"{name}/input/2"]
        inputs += [graph.constant(f"{name}/qkv/zero", np.zeros(scale.shape, np.int8))]
        attended = graph.node("QAttention", inputs, f"{name}/attention", domain="com.microsoft", num_heads=HEADS)
    else:
        inputs = [hidden, graph.constant(f"{name}/qkv/weight", packed), bias, mask]
        attended = graph.node("Attention", inputs, f"{name}/attention", domain="com.microsoft", num_heads=HEADS)

    def dense(value: str, part: str) -> str:
        return graph.dense(
            value, weights[f"{prefix}{part}.weight"], weights[f"{prefix}{part}.bias"], f"{name}/{part}", integer
        )

    def add_and_normalise(value: str, skip: str, part: str) -> str:
        gamma = graph.constant(f"{name}/{part}/gamma", weights[f"{prefix}{part}.weight"])
        beta = graph.constant(f"{name}/{part}/beta", weights[f"{prefix}{part}.bias"])
        inputs = [value, skip, gamma, beta]
        return graph.node("SkipLayerNormalization", inputs, f"{name}/{part}", domain="com.microsoft", epsilon=EPSILON)

    hidden = add_and_normalise(dense(attended, "attention.output.dense"), hidden, "attention.output.LayerNorm")
    wide = graph.node("Gelu", [dense(hidden, "intermediate.dense")], f"{name}/gelu", domain="com.microsoft")
    return add_and_normalise(dense(wide, "output.dense"), hidden, "output.LayerNorm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="model.safetensors")
    parser.add_argument("output", type=Path, help="model.onnx")
    parser.add_argument("--float", action="store_true", help="keep float32, for comparison")
    arguments = parser.parse_args()
    model = build(read_safetensors(arguments.weights), integer=not arguments.float)
    onnx.checker.check_model(model)
    arguments.output.write_bytes(model.SerializeToString(deterministic=True))


if __name__ == "__main__":
    main()
