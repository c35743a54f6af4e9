"""`quern`: the operator's command, and the way every process is started."""

from typing import Any

import click
from pymongo.errors import PyMongoError
from redis.exceptions import RedisError

from quern import __version__
from quern.cli import analytics, doctor, etl, jobs, logs, models, operate, services, tenants
from quern.config import SettingsError
from quern.store.connection import is_away


class _Commands(click.Group):
    """Says in one line what is out of reach, instead of showing where the code was."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except SettingsError as error:
            raise click.ClickException(f"the configuration is not usable:\n{error}") from None
        except PyMongoError as error:
            if not is_away(error):
                raise
            # Its text can quote the connection string.
            raise click.ClickException(f"expected MongoDB to answer, found {type(error).__name__}; {_RUN}") from None
        except RedisError as error:
            raise click.ClickException(f"expected Redis to answer, found {type(error).__name__}; {_RUN}") from None


_RUN = "run `quern doctor`"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="quern")
def main() -> None:
    """A self-hosted, multi-tenant form backend with its own AI.

    Settings come from QUERN_… variables, a credential directory or an .env file. Start with `quern doctor`.
    """


for command in (
    services.api,
    services.events,
    services.relay,
    services.scheduler,
    services.worker,
    services.engine,
    tenants.tenant,
    tenants.key,
    models.models_group,
    operate.form_group,
    jobs.job_group,
    jobs.queue_group,
    jobs.dead_group,
    jobs.outbox_group,
    operate.audit_group,
    logs.logs_group,
    operate.status,
    doctor.doctor,
    operate.migrate_command,
    operate.secret_key,
    analytics.analytics,
    analytics.sql,
    analytics.report,
    etl.etl_group,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
