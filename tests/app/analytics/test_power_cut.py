"""Nothing says that a day is done before its files are on the disk, so a power cut leaves no empty one behind."""

import os
from datetime import date
from pathlib import Path

import pytest

from quern.analytics import etl
from quern.analytics.work import Work
from tests.app.analytics.desk import RESULTS, Desk, moment, yesterday


class _Disk:
    """What fsync(2) was asked for: by inode, since a file is given its name only after it was written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._flushed: set[int] = set()
        fsync = os.fsync

        def flush(handle: int) -> None:
            fsync(handle)
            self._flushed.add(os.fstat(handle).st_ino)

        monkeypatch.setattr(os, "fsync", flush)

    def lacks(self, paths: list[Path]) -> list[Path]:
        return [path for path in paths if path.stat().st_ino not in self._flushed]


def test_files_are_on_the_disk_before_the_work_that_names_them(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(etl, "_SAVE_EVERY", 0)
    disk, said = _Disk(monkeypatch), []
    save = Work.save
    root = desk.root / "warehouse"

    def checked_save(work: Work) -> None:
        for tenant, day in work.built:
            folder = desk.root / "extract" / tenant / day.isoformat()
            if folder.exists():
                assert disk.lacks([folder, folder.parent, *folder.iterdir()]) == []
                said.append(day)
        built = [root / path for path in work.paths]
        assert disk.lacks([*built, *(path.parent for path in built)]) == []
        save(work)

    monkeypatch.setattr(Work, "save", checked_save)
    for day in (date(2026, 3, 1), date(2026, 3, 20), date(2026, 4, 2), yesterday()):
        desk.finish(desk.submit(moment(day), {"comment": "fine"}), RESULTS)
    desk.run()
    desk.submit(moment("2026-03-02"), {"comment": "late"})
    desk.run()
    assert {date(2026, 3, 2), date(2026, 4, 2), yesterday()} <= set(said)
    assert disk.lacks([root / path for path in desk.manifest.paths]) == []
    assert desk.holds()


def test_what_is_taken_away_stays_away(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    response = desk.submit(moment("2026-03-07"), {"comment": "gone"})
    desk.run()
    desk.db.responses.delete_one({"_id": response})
    disk = _Disk(monkeypatch)
    desk.run()
    folder = desk.root / "extract" / desk.tenant / "2026-03-07"
    assert [path.name for path in folder.iterdir() if "responses" in path.name] == []
    assert disk.lacks([folder]) == []
