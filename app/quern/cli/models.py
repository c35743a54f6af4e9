"""`quern models`: which models there are, what they are worth, and their files. Works on the folder alone."""

import os
import tempfile
from pathlib import Path
from typing import Any

import click

from quern.cli.output import emit, emit_json, emit_outcome, fail, json_option
from quern.inference import gguf, llama_options, modelbench, modelentry, quantize, registry
from quern.inference.client import EngineClient, EngineError
from quern.inference.settings import EngineSettings

BENCH_TYPES = ("q4_0", "q4_k_m", "q5_k_m", "q8_0")
folder_option = click.option(
    "--models",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="The models folder. Default: QUERN_ENGINE_MODELS.",
)
threads_option = click.option("--threads", type=click.IntRange(1, 512), help="Default: every core of this process.")


@click.group("models")
def models_group() -> None:
    """The models: list, add, verify, remove, measure and quantise them.

    Models live in one folder (QUERN_ENGINE_MODELS). The engine reads it when it starts and when a request names a
    model that it does not know yet, so a model that was added can be used at once.
    """


def _settings(folder: Path | None) -> EngineSettings:
    return EngineSettings(models=folder) if folder is not None else EngineSettings()


def _chat_model(name: str, folder: Path) -> tuple[registry.Model, Path]:
    """A verified model and its file."""
    try:
        model = registry.find(name, "chat", folder)
        registry.verify(model, folder)
    except (registry.UnknownModelError, registry.ModelFileError) as error:
        fail(str(error))
    return model, registry.file_path(model, model.files[0], folder)


def _served(settings: EngineSettings) -> dict[str, str]:
    """What the engine says of each model; nothing when it does not run."""
    try:
        served = EngineClient(settings.socket, timeout=5).models()
    except EngineError:
        return {}
    return {model.name: "loaded" if model.loaded else "on demand" for model in served}


@models_group.command("list")
@folder_option
@json_option
def list_models(folder: Path | None, as_json: bool) -> None:
    """Every model of the registry: licence, size, memory need, whether its files are here and whether it is loaded."""
    settings = _settings(folder)
    folder = settings.models
    served = _served(settings)
    rows: list[dict[str, Any]] = []
    try:
        known = registry.known_models(folder)
    except registry.ModelFileError as error:
        fail(str(error))
    for model in known.values():
        paths = [registry.file_path(model, file, folder) for file in model.files]
        there = all(path.exists() for path in paths)
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "licence": model.licence,
                "size_mib": round(sum(path.stat().st_size for path in paths) / 2**20) if there else None,
                "context": model.context,
                "memory_mib": round(model.need_mib(min(settings.context, model.context))),
                "template": model.template,
                "files": "here" if there else "missing",
                "engine": served.get(model.name, "-"),
                "sha256": {file.path: file.sha256 for file in model.files},
            }
        )
    columns = ("name", "kind", "licence", "size_mib", "context", "memory_mib", "files", "engine")
    emit(rows, columns, as_json, "There are no models.")


@models_group.command("add")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--name", help="Its name in the registry. Default: made of the file's name.")
@click.option("--licence", help="Its licence. Default: what the file states.")
@click.option("--context", type=click.IntRange(256), help="Longest prompt and answer together, in tokens.")
@click.option("--move", is_flag=True, help="Take the file instead of copying it.")
@folder_option
@json_option
def add(
    file: Path,
    name: str | None,
    licence: str | None,
    context: int | None,
    move: bool,
    folder: Path | None,
    as_json: bool,
) -> None:
    """Check a GGUF FILE, try it in a process of its own, and enter it into the registry.

    A file that is cut short, damaged or of another kind is refused before native code sees it.
    """
    folder = _settings(folder).models
    try:
        header = gguf.read(file)
        probed = modelbench.probe(file)
        model = registry.bring_in(
            file,
            folder,
            lambda found: modelentry.entry_for(
                header, probed, found, name or modelentry.proposed_name(file), licence, context
            ),
            move=move,
        )
    except (gguf.GgufError, modelbench.ProbeError, registry.ModelFileError, OSError, ValueError) as error:
        fail(f"{file} was not added: {error}")
    facts = {"outcome": f"added {model.name} ({header.main_type}, {header.parameters / 1e6:.0f} million weights)"}
    emit_outcome(facts | model.model_dump(mode="json", exclude_none=True), as_json)


@models_group.command("verify")
@click.argument("names", nargs=-1)
@folder_option
@json_option
def verify(names: tuple[str, ...], folder: Path | None, as_json: bool) -> None:
    """Read every byte of the files of NAMES (default: all that are here) and compare with the registry.

    Ends with status 1 if any is not what it should be.
    """
    folder = _settings(folder).models
    try:
        known = registry.known_models(folder)
    except registry.ModelFileError as error:
        fail(str(error))
    if unknown := [name for name in names if name not in known]:
        fail(f"expected names of the registry, found {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    rows = []
    for name in names or [name for name in known if (folder / name).exists()]:
        try:
            registry.verify(known[name], folder)
            rows.append({"name": name, "state": "right"})
        except registry.ModelFileError as error:
            rows.append({"name": name, "state": f"wrong: {error}"})
    emit(rows, ("name", "state"), as_json, "No model's files are here.")
    if any(row["state"] != "right" for row in rows):
        raise SystemExit(1)


@models_group.command("remove")
@click.argument("name")
@folder_option
@json_option
def remove(name: str, folder: Path | None, as_json: bool) -> None:
    """Delete the files of model NAME, and its entry if it is one of your own."""
    settings = _settings(folder)
    if name in (settings.chat_model, settings.embedding_model) or name in settings.pinned:
        fail(f"expected a model that the engine does not start with, found {name}; change the engine's settings first")
    if _served(settings).get(name) == "loaded":
        fail(f"expected a model that is not loaded, found {name} in use; restart the engine first")
    try:
        freed = registry.take_out(name, settings.models)
    except (registry.UnknownModelError, registry.ModelFileError, OSError) as error:
        fail(str(error))
    emit_outcome({"outcome": f"removed {name}: {freed / 2**20:.0f} MiB are free", "bytes": freed}, as_json)


@models_group.command("quantize")
@click.argument("name")
@click.argument("kind", metavar="TYPE", type=click.Choice(sorted(quantize.TYPES)))
@click.option("--as", "new_name", help="The new model's name. Default: NAME-TYPE.")
@threads_option
@folder_option
@json_option
def quantize_model(
    name: str, kind: str, new_name: str | None, threads: int | None, folder: Path | None, as_json: bool
) -> None:
    """Make a model out of NAME with weights of TYPE, by llama.cpp's own quantisation.

    It is written under a temporary name, checked and tried, and only then entered into the registry.
    """
    folder = _settings(folder).models
    model, source = _chat_model(name, folder)
    new_name = new_name or f"{name}-{kind}"
    if new_name in registry.known_models(folder):
        fail(f"expected a new name, found {new_name}, which is in the registry; choose one with --as")
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=folder) as temporary:
        target = Path(temporary) / f"{new_name}.gguf"
        try:
            made = quantize.quantize(source, target, kind, threads)
            header, probed = gguf.read(target), modelbench.probe(target)
            new = registry.bring_in(
                target,
                folder,
                lambda found: modelentry.entry_for(header, probed, found, new_name, model.licence, model.context),
                move=True,
            )
        except (quantize.QuantizeError, modelbench.ProbeError, registry.ModelFileError, OSError) as error:
            fail(f"{new_name} was not made: {error}")
    notes = "".join(f"\n  note: {note}" for note in made.notes)
    facts = {"outcome": f"made {new.name}: {made.bytes / 2**20:.0f} MiB{notes}", "notes": made.notes}
    emit_outcome(facts | new.model_dump(mode="json", exclude_none=True), as_json)


@models_group.command("bench")
@click.argument("name")
@click.option(
    "--type",
    "kinds",
    multiple=True,
    type=click.Choice(sorted(quantize.TYPES)),
    help=f"Types to compare; may be repeated. Default: {', '.join(BENCH_TYPES)}.",
)
@threads_option
@folder_option
@json_option
def bench(name: str, kinds: tuple[str, ...], threads: int | None, folder: Path | None, as_json: bool) -> None:
    """Compare quantisations of model NAME on this machine, and recommend one.

    Each type is made in a temporary folder and measured with and without OpenBLAS: prompt and generation speed
    (tokens a second), resident memory, perplexity over a text, and accuracy on labelled messages. Recommended is
    the fastest job of 200 prompt and 64 new tokens among the types about as good as the best. Takes some minutes;
    run it on a quiet machine.
    """
    folder = _settings(folder).models
    _, source = _chat_model(name, folder)
    threads = threads or len(os.sched_getaffinity(0))
    found: dict[str, modelbench.Figures] = {}
    cpu_flags = llama_options.cpu_flags()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix=".bench-", dir=folder) as temporary:
        for kind in kinds or BENCH_TYPES:
            target = Path(temporary) / f"{kind}.gguf"
            try:
                made = quantize.quantize(source, target, kind, threads)
                ways = {way: modelbench.measure(target, way, threads) for way in llama_options.ways(cpu_flags)}
            except (quantize.QuantizeError, modelbench.ProbeError) as error:
                fail(f"{kind}: {error}")
            target.unlink()
            best = min(ways, key=lambda way: ways[way].job_seconds)
            figures = found[kind] = ways[best]
            rows.append(
                {
                    "type": kind,
                    "size_mib": round(made.bytes / 2**20),
                    "prompt_tokens_s": round(figures.prompt_speed),
                    "generated_tokens_s": round(figures.generation_speed, 1),
                    "prompts_by": best.name,
                    "memory_mib": round(figures.memory_mib),
                    "perplexity": round(figures.perplexity, 2),
                    "accuracy": round(figures.accuracy, 3),
                    "job_seconds": round(figures.job_seconds, 3),
                    "notes": made.notes,
                }
            )
    recommended = modelbench.recommend(found)
    if as_json:
        emit_json({"model": name, "threads": threads, "types": rows, "recommended": recommended})
        return
    emit(rows, [column for column in rows[0] if column != "notes"], False, "")
    for row in rows:
        for note in row["notes"]:
            click.echo(f"{row['type']}: {note}")
    click.echo(f"recommended: {recommended}. Make it: quern models quantize {name} {recommended}")
