from pathlib import Path

import pytest

from quern.embedded.cache import cached


@pytest.fixture(autouse=True)
def own_cache(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUERN_CACHE", str(run_directory))
    return run_directory


def test_the_same_inputs_are_built_once_and_other_inputs_anew() -> None:
    built: list[Path] = []
    places = [cached("thing", inputs, built.append) for inputs in (["a", "b"], ["a", "b"], ["ab"])]
    assert places[0] == places[1] != places[2]
    assert len(built) == 2


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(own_cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        cached("thing", ["a"], fail)
    assert [path.name for path in (own_cache / "thing").iterdir()] == [".lock"]
    place = cached("thing", ["a"], lambda folder: (folder / "whole").touch())
    assert [path.name for path in place.iterdir()] == ["whole"]
