"""The suite of Great Expectations says "met" only when the comparison itself found nothing, field by field included."""

import os
import subprocess
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.compute as pc
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


def _exchange(desk: Desk) -> None:
    """Two answers change places in the published file: every count, sum and hash stays as it was."""
    (partition,) = desk.manifest.partitions("fact_answer", desk.tenant)
    path = desk.root / "warehouse" / partition.path
    rows = pq.read_table(path)
    names = rows.column("path").to_pylist()
    exchanged = [{"code": "comment", "comment": "code"}.get(name, name) for name in names]
    assert exchanged != names
    pq.write_table(rows.set_column(rows.column_names.index("path"), "path", pa.array(exchanged)), path)
    size, digest = measured(path)
    changed = replace(partition, bytes=size, hash=digest)
    desk.manifest.with_partitions("fact_answer", desk.tenant, [changed])._write()
    assert pc.count(rows.column("path")).as_py() == 2


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
    _exchange(desk)
    differs = subprocess.run([script, folder], capture_output=True, text=True, timeout=600, check=False, env=os.environ)
    assert differs.returncode == MISMATCH
    assert "not every expectation is met" in differs.stdout
    (day,) = orjson.loads((folder / "figures.json").read_bytes())["days"]
    assert day["problems"] > 0
    sides = [(day[name], day[name.replace("_mongodb", "_warehouse")]) for name in day if name.endswith("_mongodb")]
    assert all(one == other for one, other in sides)
