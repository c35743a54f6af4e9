"""A registry entry out of what a GGUF file says of itself and what loading it takes."""

from __future__ import annotations

import re
from pathlib import Path

from quern.inference import gguf
from quern.inference.modelbench import Probe
from quern.inference.registry import Model, ModelFile, ModelFileError

#: MiB on top of what loading took: the batch's working memory, vocabulary, a Python process.
WORKING_MIB = 120.0


def proposed_name(path: Path) -> str:
    """A registry name made of a file's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._")[:80] or "model"


def entry_for(
    header: gguf.Gguf, probed: Probe, file: ModelFile, name: str, licence: str | None, context: int | None
) -> Model:
    """The entry of a chat model.

    Args:
        licence: as the operator states it; default: as the file does.
        context: longest prompt and answer together, in tokens; default: what the model was trained on.

    Raises:
        ModelFileError: nobody says what the licence is.
    """
    stated = licence or header.metadata.get("general.license")
    if not stated:
        raise ModelFileError("expected a licence, found none in the file; state it with --licence")
    trained = probed.trained_context or int(header.of_architecture("context_length") or 0)
    return Model(
        name=name,
        kind="chat",
        licence=str(stated),
        files=(file,),
        context=min(context or trained, trained) if trained else context or 2048,
        memory_mib=round(probed.memory_mib + WORKING_MIB),
        context_kib=header.context_kib,
        template="file" if probed.has_template else "chatml",
    )
