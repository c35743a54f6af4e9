"""`quern engine`: the process that owns the models. It loads nothing of the databases."""

import os
from pathlib import Path

import click
from pydantic import ValidationError

from quern.inference.client import EngineClient
from quern.inference.settings import EngineSettings
from quern.observe import metrics


@click.command()
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Default: QUERN_ENGINE_SOCKET.")
@click.option("--models", type=click.Path(path_type=Path), help="Default: QUERN_ENGINE_MODELS.")
def engine(socket_path: Path | None, models: Path | None) -> None:
    """Own the models and answer on a UNIX socket. No network, no database."""
    from quern.inference.engine import main

    given = {"socket": socket_path, "models": models}
    try:
        settings = EngineSettings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        faults = [f"QUERN_ENGINE_{'__'.join(map(str, item['loc'])).upper()}: {item['msg']}" for item in error.errors()]
        raise click.ClickException("the engine's configuration is not usable:\n" + "\n".join(faults)) from None
    metrics.serve_stats(os.environ.get("QUERN_METRICS_BIND"), EngineClient(settings.socket, timeout=5).stats)
    main(settings)
