"""What embeddings promise: meaning, whatever the neighbours in the batch, and equal texts computed once a tenant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from quern.inference import embedder as embedder_module
from quern.inference.classifier import label_texts, shares
from quern.inference.embedder import Embedder
from quern.inference.protocol import Label


@pytest.fixture(scope="module")
def folder(models_dir: Path) -> Path:
    return models_dir / "all-minilm-l6-v2-int8"


@pytest.fixture
def embedder(folder: Path) -> Embedder:
    return Embedder(folder / "model.onnx", folder / "tokenizer.json", context=256, threads=1)


TEXTS = [
    "The delivery was late.",
    "My parcel arrived after the promised date.",
    "I love the taste of this coffee.",
    "",
    "word " * 400,
    "Grüße aus Köln 👋",
]


def test_vectors_have_length_one(embedder: Embedder) -> None:
    vectors = np.stack(embedder.embed([("t", text) for text in TEXTS]).vectors)
    assert vectors.shape == (len(TEXTS), 384)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-4)


def test_like_meanings_lie_nearer_than_unlike_ones(embedder: Embedder) -> None:
    late, parcel, coffee, *_ = embedder.embed([("t", text) for text in TEXTS]).vectors
    assert late @ parcel > late @ coffee + 0.2


def test_products_are_computed_in_integers(folder: Path) -> None:
    # A model that stores int8 and multiplies floats is small but not fast: what runs after optimisation is what counts.
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = "/tmp/quern-embedder"  # noqa: S108 - removed below
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    ids = np.array([[101, 2023, 102]], np.int64)
    session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    profile = Path(session.end_profiling())
    events = json.loads(profile.read_text(encoding="utf-8"))
    profile.unlink()
    ran = [event["args"]["op_name"] for event in events if event.get("cat") == "Node" and "op_name" in event["args"]]
    assert ran.count("QAttention") == 6
    assert ran.count("DynamicQuantizeMatMul") == 18
    assert not {"MatMul", "Gemm", "Attention", "FusedMatMul"} & set(ran)


def test_a_neighbour_does_not_change_a_vector_at_all(folder: Path) -> None:
    texts = [("t", f"{'long ' * (index % 40)} text number {index}") for index in range(24)]

    def fresh() -> Embedder:
        return Embedder(folder / "model.onnx", folder / "tokenizer.json", 256, threads=2)

    together = fresh().embed(texts).vectors
    alone = [fresh().embed([text]).vectors[0] for text in texts[::6]]
    assert all((one == other).all() for one, other in zip(together[::6], alone, strict=True))


@pytest.mark.parametrize("free", [0, 2])
def test_a_busy_machine_changes_no_vector(folder: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ("t", "as many words as it takes for two threads to share the work " * 4)
    (expected,) = Embedder(folder / "model.onnx", folder / "tokenizer.json", 256, threads=1).embed([text]).vectors
    monkeypatch.setattr(embedder_module, "free_cores", lambda: free)
    (found,) = Embedder(folder / "model.onnx", folder / "tokenizer.json", 256, threads=2).embed([text]).vectors
    assert (found == expected).all()


def test_equal_texts_are_computed_once_for_a_tenant(embedder: Embedder) -> None:
    first = embedder.embed([("a", "hello"), ("a", "hello"), ("a", "bye")])
    assert (embedder.misses, embedder.hits) == (2, 1)
    again = embedder.embed([("a", "bye"), ("a", "hello")])
    assert (embedder.misses, embedder.hits) == (2, 3)
    assert again.tokens == [first.tokens[2], first.tokens[0]]
    assert np.array_equal(again.vectors[1], first.vectors[0])


def test_tenants_share_no_vectors_and_a_purge_forgets_one_tenants(embedder: Embedder) -> None:
    embedder.embed([("a", "hello")])
    embedder.embed([("b", "hello")])
    assert embedder.misses == 2
    embedder.purge("a")
    embedder.embed([("b", "hello")])
    assert embedder.misses == 2
    embedder.embed([("a", "hello")])
    assert embedder.misses == 3


def test_the_cache_is_bounded(folder: Path) -> None:
    embedder = Embedder(folder / "model.onnx", folder / "tokenizer.json", 256, 1, cached=4)
    embedder.embed([("a", str(number)) for number in range(10)])
    assert len(embedder) == 4


def test_shares_add_up_to_one_and_favour_the_nearest_label(embedder: Embedder) -> None:
    labels = [
        Label(name="delivery", description="a parcel is late or lost", examples=["Where is my package?"]),
        Label(name="food", description="taste of food and drinks"),
    ]
    groups = [np.stack(embedder.embed([("t", text) for text in label_texts(label)]).vectors) for label in labels]
    text = embedder.embed([("t", TEXTS[1])]).vectors[0]
    found = shares(text, groups)
    assert found.sum() == pytest.approx(1.0)
    assert found[0] > 0.9


def test_onnx_runtime_reports_nothing_to_its_makers(folder: Path, tmp_path: Path) -> None:
    """Where it reports it keeps a device identifier and a queue of events in the home folder, but not within CI."""
    program = (
        "import sys; from pathlib import Path; from quern.inference.embedder import Embedder; "
        "folder = Path(sys.argv[1]); "
        "Embedder(folder / 'model.onnx', folder / 'tokenizer.json', context=256, threads=1).embed([('t', 'A text.')])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    environment |= {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, check=True, timeout=300)
    assert [path for path in tmp_path.rglob("*") if "onnxruntime" in path.name] == []
