"""`quern`: the operator's command, and the way every process is started."""

import click

from quern import __version__
from quern.cli import operate, services, tenants


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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
    operate.form_group,
    operate.job_group,
    operate.queue_group,
    operate.dead_group,
    operate.audit_group,
    operate.status,
    operate.doctor,
    operate.migrate_command,
    operate.secret_key,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
