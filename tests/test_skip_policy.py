import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ALLOWED_SKIPS

SKIPPING = """
import pytest
def test_passes(): pass
@pytest.mark.skip(reason="no such hardware")
def test_skips(): pass
@pytest.mark.xfail(reason="known")
def test_expected_to_fail(): assert False
"""


def run(folder: Path, *, ci: bool, allowed: str = "") -> subprocess.CompletedProcess[str]:
    shutil.copy(ALLOWED_SKIPS.with_name("conftest.py"), folder)
    (folder / "allowed_skips.txt").write_text(allowed)
    (folder / "test_it.py").write_text(SKIPPING)
    (folder / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q"],
        cwd=folder,
        env={**environment, "CI": "true"} if ci else environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_skip_is_printed_with_its_reason(tmp_path: Path) -> None:
    outcome = run(tmp_path, ci=False)
    assert outcome.returncode == 0
    assert "test_it.py::test_skips: Skipped: no such hardware" in outcome.stdout
    assert "test_it.py::test_expected_to_fail: expected to fail: known" in outcome.stdout


def test_in_ci_an_unlisted_skip_fails_the_run(tmp_path: Path) -> None:
    outcome = run(tmp_path, ci=True, allowed="test_it.py::test_expected_to_fail\n")
    assert outcome.returncode == pytest.ExitCode.TESTS_FAILED
    assert "does not list: test_it.py::test_skips" in outcome.stdout


def test_in_ci_listed_skips_pass(tmp_path: Path) -> None:
    outcome = run(tmp_path, ci=True, allowed="test_it.py::test_skips\ntest_it.py::test_expected_to_fail\n")
    assert outcome.returncode == 0, outcome.stdout
