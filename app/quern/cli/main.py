"""`quern`: the operator's command, and the way every process is started."""

from importlib import import_module
from typing import Any, Final

import click

from quern import __version__

#: Command to the module of this package that has it, and its name there. Only the one that is run is loaded: every
#: process begins here, and what it does not need it would keep in memory for as long as it lives.
_COMMANDS: Final = {
    "api": "services.api",
    "events": "services.events",
    "relay": "services.relay",
    "scheduler": "services.scheduler",
    "worker": "services.worker",
    "engine": "engine.engine",
    "tenant": "tenants.tenant",
    "key": "tenants.key",
    "models": "models.models_group",
    "form": "operate.form_group",
    "job": "jobs.job_group",
    "queue": "jobs.queue_group",
    "dead": "jobs.dead_group",
    "outbox": "jobs.outbox_group",
    "audit": "operate.audit_group",
    "logs": "logs.logs_group",
    "status": "operate.status",
    "doctor": "doctor.doctor",
    "migrate": "operate.migrate_command",
    "config": "configuration.config_group",
    "secret-key": "operate.secret_key",
    "analytics": "analytics.analytics",
    "ask": "analytics.ask",
    "sql": "analytics.sql",
    "report": "analytics.report",
    "etl": "etl.etl_group",
}
_RUN: Final = "run `quern doctor`"


class _Commands(click.Group):
    """Loads a command when it is asked for, and says in one line what is out of reach instead of where the code was."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name = _COMMANDS[cmd_name].split(".")
        found: click.Command = getattr(import_module(f"quern.cli.{module}"), name)
        return found

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.Abort, click.ClickException):
            raise
        except Exception as error:
            reason = _out_of_reach(error)
            if reason is None:
                raise
            raise click.ClickException(reason) from None


def _out_of_reach(error: Exception) -> str | None:
    """What is wrong outside of this program, in one line; None when the fault is its own."""
    from pymongo.errors import PyMongoError
    from redis.exceptions import RedisError

    from quern.config import SettingsError
    from quern.store.connection import is_away

    if isinstance(error, SettingsError):
        return f"the configuration is not usable:\n{error}"
    if isinstance(error, PyMongoError) and is_away(error):
        # Its text can quote the connection string.
        return f"expected MongoDB to answer, found {type(error).__name__}; {_RUN}"
    if isinstance(error, RedisError):
        return f"expected Redis to answer, found {type(error).__name__}; {_RUN}"
    return None


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quern")
def main() -> None:
    """A self-hosted, multi-tenant form backend with its own AI.

    Settings come from QUERN_… variables, a credential directory or an .env file. Start with `quern doctor`.
    """


if __name__ == "__main__":
    main()
