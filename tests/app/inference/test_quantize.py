"""What making and measuring a model in another type of weights promises: a whole file that computes, or none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quern.cli.models import models_group
from quern.inference import gguf, modelbench, quantize, registry
from quern.inference.llama_options import Way
from quern.inference.modelbench import Figures
from tests.app.inference.lending import lend

CHAT = "smollm2-135m-instruct-q4_1"


@pytest.fixture
def folder(models_dir: Path, tmp_path: Path) -> Path:
    """A models folder of its own, with the chat model in it."""
    (tmp_path / "models" / CHAT).mkdir(parents=True)
    model = registry.find(CHAT, "chat", models_dir)
    source = registry.file_path(model, model.files[0], models_dir)
    lend(source, tmp_path / "models" / CHAT / source.name)
    return tmp_path / "models"


def _run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(models_group, arguments)
    return result.exit_code, result.output


def test_a_model_is_quantised_entered_verified_and_removed(folder: Path) -> None:
    code, output = _run("quantize", CHAT, "q4_0", "--as", "small", "--models", str(folder), "--json")
    assert code == 0, output
    made = json.loads(output)
    assert made["name"] == "small"
    assert any("quality is lost twice" in note for note in made["notes"])
    path = folder / "small" / "small.gguf"
    assert gguf.read(path).main_type == "Q4_0"
    assert _run("verify", "small", "--models", str(folder))[0] == 0
    code, output = _run("list", "--models", str(folder), "--json")
    assert {row["name"]: row["files"] for row in json.loads(output)}["small"] == "here"
    path.write_bytes(path.read_bytes()[:-100_000])
    code, output = _run("verify", "--models", str(folder))
    assert code == 1
    assert "cut short" in output
    assert _run("remove", "small", "--models", str(folder))[0] == 0
    assert not path.exists()
    assert "small" not in registry.known_models(folder)
    assert not [left for left in folder.iterdir() if left.name.startswith((".quantize", ".add"))]


def test_a_source_that_is_cut_short_leaves_no_file_behind(chat_path: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "made" / "target.gguf"
    source.write_bytes(chat_path.read_bytes()[:50_000_000])
    with pytest.raises(quantize.QuantizeError, match="cut short"):
        quantize.quantize(source, target, "q4_0")
    assert not target.parent.exists() or not list(target.parent.iterdir())


def test_a_file_that_llama_cpp_refuses_is_named_and_leaves_nothing_behind(chat_path: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "source.gguf", tmp_path / "target.gguf"
    # A whole file, as far as sizes go, of a kind of model that there is not.
    source.write_bytes(chat_path.read_bytes().replace(b"llama", b"xyzzy", 1))
    with pytest.raises(quantize.QuantizeError):
        quantize.quantize(source, target, "q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_foreign_and_damaged_files_are_not_added(folder: Path, chat_path: Path, tmp_path: Path) -> None:
    foreign, cut, unknown = (tmp_path / name for name in ("foreign.gguf", "cut.gguf", "unknown.gguf"))
    whole = chat_path.read_bytes()
    foreign.write_bytes(b"\x7fELF" + whole[4:1000])
    cut.write_bytes(whole[:-4096])
    unknown.write_bytes(whole.replace(b"llama", b"xyzzy", 1))
    for path, complaint in ((foreign, "expected a GGUF file"), (cut, "cut short"), (unknown, "cannot load")):
        code, output = _run("add", str(path), "--models", str(folder))
        assert code != 0
        assert complaint in output
    assert not (folder / "models.yml").exists()


def test_an_added_model_states_what_its_file_does(folder: Path, chat_path: Path) -> None:
    code, output = _run("add", str(chat_path), "--name", "again", "--models", str(folder), "--json")
    assert code == 0, output
    entry = registry.known_models(folder)["again"]
    assert (entry.licence, entry.context, entry.context_kib) == ("apache-2.0", 8192, 22.5)
    assert entry.files[0].sha256 == registry.find(CHAT, "chat", folder).files[0].sha256
    code, output = _run("add", str(chat_path), "--name", "again", "--models", str(folder))
    assert code != 0
    assert "expected a new name" in output


def test_the_model_that_the_engine_starts_with_is_not_removed(folder: Path) -> None:
    code, output = _run("remove", CHAT, "--models", str(folder))
    assert code != 0
    assert "does not start with" in output
    assert (folder / CHAT).exists()


def _figures(seconds: float, perplexity: float, accuracy: float) -> Figures:
    return Figures(200 / (seconds / 2), 64 / (seconds / 2), 100.0, perplexity, accuracy)


def test_the_fastest_of_the_good_types_is_recommended() -> None:
    found = {
        "q8_0": _figures(4.0, 20.0, 0.90),
        "q5_k_m": _figures(3.0, 20.5, 0.90),
        "q4_k_m": _figures(2.0, 20.9, 0.70),
        "q4_0": _figures(1.0, 25.0, 0.90),
    }
    assert modelbench.recommend(found) == "q5_k_m"
    # The least perplexed and the most accurate may be two types.
    assert modelbench.recommend({"a": _figures(1.0, 20.0, 0.5), "b": _figures(2.0, 40.0, 0.9)}) == "a"


def test_a_model_is_measured_in_a_process_of_its_own(chat_path: Path) -> None:
    found = modelbench.measure(chat_path, Way(blas=False), threads=1)
    assert found.prompt_speed > found.generation_speed > 0
    assert 90 < found.memory_mib < 2000
    assert 10 < found.perplexity < 60
    assert found.accuracy > 0.6
