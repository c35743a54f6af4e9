"""A dry run foretells what the real one changes, and an appliance that is as it should be is left alone."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

SHARE_FORETOLD = 0.9


@pytest.fixture(scope="module")
def runs() -> list[dict[str, Any]]:
    """What each run of site.yml changed, in order (molecule/callback_plugins/changes.py)."""
    folder = os.environ.get("QUERN_CHANGES")
    assert folder, "expected QUERN_CHANGES to name the folder of the runs' changes; run: make test-host"
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    return [run for run in found if run["playbook"] == "site.yml"]


def test_a_dry_run_on_a_blank_host_foretells_what_is_changed(runs: list[dict[str, Any]]) -> None:
    dry, real = runs[:2]
    assert (dry["check"], real["check"]) == (True, False)
    foretold = {tuple(change) for change in dry["changed"]}
    changed = [tuple(change) for change in real["changed"]]
    unforeseen = [change for change in changed if change not in foretold]
    share = 1 - len(unforeseen) / len(changed)
    print(f"{len(changed)} changes, {share:.1%} of them foretold; unforeseen: {unforeseen}")
    assert share >= SHARE_FORETOLD, unforeseen


def test_a_second_run_changes_nothing(runs: list[dict[str, Any]]) -> None:
    second = runs[2]
    assert (second["check"], second["failed"]) == (False, 0)
    assert second["changed"] == []


def test_a_dry_run_on_a_provisioned_host_foretells_nothing(runs: list[dict[str, Any]]) -> None:
    last = runs[3]
    assert (last["check"], last["failed"]) == (True, 0)
    assert last["changed"] == []
