"""What the choice of OpenBLAS promises: the faster way, never a wrong one, measured once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from quern.inference import tuning
from quern.inference.tuning import Measurement, decide

LOGITS = [float(value % 7) for value in range(50)]


def test_the_faster_way_is_taken() -> None:
    assert decide(native=Measurement(2.0, LOGITS), blas=Measurement(1.0, LOGITS))
    assert not decide(native=Measurement(1.0, LOGITS), blas=Measurement(2.0, LOGITS))


def test_a_fast_openblas_that_computes_something_else_is_not_used() -> None:
    assert not decide(native=Measurement(2.0, LOGITS), blas=Measurement(1.0, LOGITS[::-1]))
    assert not decide(native=Measurement(2.0, LOGITS), blas=Measurement(1.0, [float("nan")] * 50))


def test_an_openblas_that_crashes_is_not_used() -> None:
    assert not decide(native=Measurement(2.0, LOGITS), blas=None)


def test_both_ways_agree_on_this_machine_and_the_choice_is_remembered(
    chat_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = asyncio.run(tuning.blas_pays(chat_path, "0" * 64, tmp_path / "tuning"))
    (remembered,) = (tmp_path / "tuning").iterdir()
    found = json.loads(remembered.read_text())
    assert found["blas"] is choice
    assert found["native"] > 0
    assert found["openblas"] > 0
    # Measuring again is made impossible: what is remembered is enough.
    monkeypatch.setattr(tuning, "_measure_apart", None)
    assert asyncio.run(tuning.blas_pays(chat_path, "0" * 64, tmp_path / "tuning")) is choice


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert asyncio.run(tuning.blas_pays(tmp_path / "missing.gguf", "0" * 64, tmp_path / "file" / "x")) is False
