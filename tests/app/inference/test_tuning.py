"""What the choice of how to compute promises: the faster way, never a wrong one, measured once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from quern.inference import tuning
from quern.inference.llama_options import BackendOptions, Way, ways
from quern.inference.tuning import Measurement, choose_batch, choose_way, decide

NATIVE, BLAS, WIDE = Way(blas=False), Way(blas=True), Way(blas=True, kernels="SkylakeX")
LOGITS = [float(value % 7) for value in range(50)]
USUAL, POLLING, HALF = (0, 8), (50, 8), (0, 4)


def test_the_faster_way_is_taken() -> None:
    assert decide({NATIVE: Measurement(2.0, LOGITS), BLAS: Measurement(1.0, LOGITS)}) == BLAS
    assert decide({NATIVE: Measurement(1.0, LOGITS), BLAS: Measurement(2.0, LOGITS)}) == NATIVE
    wide = Measurement(0.5, LOGITS)
    assert decide({NATIVE: Measurement(2.0, LOGITS), BLAS: Measurement(1.0, LOGITS), WIDE: wide}) == WIDE


def test_a_fast_openblas_that_computes_something_else_is_not_used() -> None:
    assert decide({NATIVE: Measurement(2.0, LOGITS), BLAS: Measurement(1.0, LOGITS[::-1])}) == NATIVE
    assert decide({NATIVE: Measurement(2.0, LOGITS), BLAS: Measurement(1.0, [float("nan")] * 50)}) == NATIVE


def test_an_openblas_that_crashes_is_not_used() -> None:
    assert decide({NATIVE: Measurement(2.0, LOGITS), BLAS: None}) == NATIVE


def test_wide_kernels_are_tried_only_where_the_cpu_has_them() -> None:
    wide = {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}
    assert ways({"avx2", *wide}) == [NATIVE, BLAS, WIDE]
    assert ways({"avx2", *wide} - {"avx512vl"}) == [NATIVE, BLAS]


def test_the_kernels_reach_the_process_that_computes_with_them(chat_path: Path) -> None:
    old, new = (asyncio.run(tuning._compute(chat_path, Way(True, name))) for name in ("Nehalem", "Haswell"))
    assert old is not None
    assert new is not None
    # Sums of another width round differently: the same numbers would be the same kernels.
    assert old.logits != new.logits


def test_the_usual_way_is_left_only_for_a_clearly_faster_one() -> None:
    assert choose_way({USUAL: (1.0, 1.0), POLLING: (0.99, 0.99), HALF: (0.95, 0.95)}, 8) == USUAL
    assert choose_way({USUAL: (1.0, 1.0), POLLING: (0.9, 0.9), HALF: (0.95, 0.95)}, 8) == POLLING
    assert choose_way({USUAL: (1.0, 1.0), POLLING: (1.0, 1.0), HALF: (0.7, 0.7)}, 8) == HALF
    # Faster prompts that cost slower answers are weighed by a whole job.
    assert choose_way({USUAL: (1.0, 1.0), POLLING: (0.9, 2.0)}, 8) == USUAL


def test_the_smallest_batch_that_is_about_as_fast_is_taken() -> None:
    assert choose_batch({256: 1.0, 512: 0.99}) == 256
    assert choose_batch({256: 1.0, 512: 0.8, 1024: 0.79}) == 512


def test_openblas_is_really_left_out_and_both_ways_agree(chat_path: Path) -> None:
    # Rounded alike to the last bit, they would be one and the same way.
    native, blas = (asyncio.run(tuning._compute(chat_path, way)) for way in (NATIVE, BLAS))
    assert native is not None
    assert blas is not None
    assert native.logits != blas.logits
    assert tuning.likeness(native.logits, blas.logits) > tuning.LEAST_LIKENESS


def test_the_choice_is_remembered_and_threads_are_measured_only_when_cores_are_free(
    chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "free_cores", lambda: 0)
    busy = asyncio.run(tuning.choose(chat_path, "0" * 64, tmp_path / "tuning", 1))
    (place,) = (tmp_path / "tuning").iterdir()
    found = json.loads(place.read_text())
    assert found["options"]["blas"] is busy.blas
    assert all(speed > 0 for speed in found["prompt_tokens_per_cpu_second"].values())
    assert (busy.threads, busy.poll, found["complete"]) == (1, 0, False)
    # The next start on a free machine measures the rest, and only that.
    monkeypatch.setattr(tuning, "free_cores", lambda: 99)
    monkeypatch.setattr(tuning, "DRIVE_TIMEOUT", 900.0)
    free = asyncio.run(tuning.choose(chat_path, "0" * 64, tmp_path / "tuning", 1))
    found = json.loads(place.read_text())
    assert found["complete"]
    assert free.blas is busy.blas
    assert free.batch in tuning.BATCHES
    # Measuring again is made impossible: what is remembered is enough.
    monkeypatch.setattr(tuning, "_apart", None)
    assert asyncio.run(tuning.choose(chat_path, "0" * 64, tmp_path / "tuning", 1)) == free


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "free_cores", lambda: 0)
    (tmp_path / "file").write_text("")
    options = asyncio.run(tuning.choose(tmp_path / "missing.gguf", "0" * 64, tmp_path / "file" / "x", 2))
    assert options == BackendOptions(2, 0, blas=False)
