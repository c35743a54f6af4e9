"""The suite of Great Expectations says "met" only when the comparison itself found nothing, field by field included."""

import os
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from quern.analytics.handler import MISMATCH
from quern.analytics.partition import measured
from quern.config import Settings
from tests.app.analytics.desk import Desk, moment
from tests.app.analytics.test_nightly import configured

__all__ = ["configured"]

ROOT = Path(__file__).parents[3]
_LOCKED = sha256((ROOT / "requirements-expectations.txt").read_bytes()).hexdigest()[:16]
_ENVIRONMENT = ROOT / ".venv-expectations"


def _alter(desk: Desk, column: str, instead: dict[str, str]) -> None:
    """Other values in a column of the published answers, with a manifest that vouches for the file."""
    (partition,) = desk.manifest.partitions("fact_answer", desk.tenant)
    path = desk.root / "warehouse" / partition.path
    rows = pq.read_table(path)
    assert rows.num_rows == 2
    former = rows.column(column).to_pylist()
    altered = [instead.get(value, value) for value in former]
    assert altered != former
    pq.write_table(rows.set_column(rows.column_names.index(column), column, pa.array(altered)), path)
    size, digest = measured(path)
    changed = replace(partition, bytes=size, hash=digest)
    desk.manifest.with_partitions("fact_answer", desk.tenant, [changed])._write()


def _unmet(said: str) -> list[str]:
    return [line.removeprefix("not met: ") for line in said.splitlines() if line.startswith("not met: ")]


@pytest.mark.skipif(
    not (_ENVIRONMENT / f"requirements-{_LOCKED}").exists(),
    reason="needs .venv-expectations, which scripts/expectations makes",
)
def test_it_judges_as_the_comparison_does(desk: Desk, configured: Settings, tmp_path: Path) -> None:
    desk.submit(moment("2026-10-31"), {"code": "a", "comment": "b"})
    desk.run()
    folder, script = tmp_path / "report", ROOT / "scripts/expectations"
    met = subprocess.run([script, folder], capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert (met.returncode, "every expectation is met" in met.stdout) == (0, True), met.stderr
    # Two answers change places: every count, sum and hash stays as it was.
    _alter(desk, "path", {"code": "comment", "comment": "code"})
    differs = subprocess.run([script, folder], capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert differs.returncode == MISMATCH
    assert "not every expectation is met" in differs.stdout
    assert _unmet(differs.stdout) == ["expect_column_values_to_be_between problems"]
    (day,) = orjson.loads((folder / "figures.json").read_bytes())["days"]
    assert day["problems"] > 0
    sides = [(day[name], day[name.replace("_mongodb", "_warehouse")]) for name in day if name.endswith("_mongodb")]
    assert all(one == other for one, other in sides)
    _alter(desk, "path", {"code": "comment", "comment": "code"})
    # A character too many.
    _alter(desk, "value_text", {"b": "bb"})
    differs = subprocess.run([script, folder], capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert differs.returncode == MISMATCH
    wanted = "expect_column_pair_values_to_be_equal answers_characters_mongodb answers_characters_warehouse"
    assert wanted in _unmet(differs.stdout), differs.stdout
