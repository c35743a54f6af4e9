"""What somebody spoiled is mended by the next run as a dry run foretold it, and nothing else is touched."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from testinfra.host import Host

from tests.host.client import Client
from tests.host.conftest import Played
from tests.host.test_check_mode import SHARE_FORETOLD

#: More of roles/base and roles/firewall; from most of them something follows.
_OF_THE_SYSTEM = (
    "/etc/sysctl.d/99-quern.conf",
    "/etc/chrony/conf.d/quern.conf",
    "/etc/systemd/journald.conf.d/quern.conf",
    "/etc/audit/rules.d/quern.rules",
    "/etc/logrotate.conf",
    "/etc/issue.net",
    "/etc/nftables.conf",
    "/etc/quern/nftables.conf",
)
PATIENCE_SECONDS = 300
#: Everything that roles manage as files, without what services write there themselves: apt makes an empty sources.list
#: where it refreshes its lists and finds none.
_CHECKSUMS = (
    "find /etc /usr/local /opt/quern/current/ -xdev -type f -not -path '*/__pycache__/*' -not -name '*.cache' "
    "-not -path /etc/apt/sources.list -print0 | sort -z | xargs -0 sha256sum"
)


def checksums(host: Host) -> dict[str, str]:
    lines = host.check_output(_CHECKSUMS).splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def mended(
    host: Host, play: Callable[..., Played], playbook: str, spoiled: Sequence[str], **variables: Any
) -> list[tuple[str, str]]:
    """Spoil the files, have it foretold what mends them, and mend them; returns what that changed."""
    before = checksums(host)
    for path in spoiled:
        host.check_output("echo '# spoiled' >>%s", path)

    foretold = play(playbook, dry=True, **variables)
    assert foretold.code == 0, foretold.output
    assert {path for path, digest in checksums(host).items() if before.get(path) != digest} == set(spoiled)

    done = play(playbook, **variables)
    assert done.code == 0, done.output
    assert checksums(host) == before
    unforeseen = [change for change in done.changed if change not in foretold.changed]
    print(f"{len(done.changed)} changes; unforeseen: {unforeseen}")
    assert len(unforeseen) <= (1 - SHARE_FORETOLD) * len(done.changed), unforeseen
    return done.changed


def test_the_next_run_mends_exactly_the_spoiled_files_and_the_service_serves(
    host: Host, expected: dict[str, Any], play: Callable[..., Played], client: Client
) -> None:
    spoiled = expected["spoiled"]
    assert len(spoiled) == 10
    changed = mended(host, play, "site.yml", spoiled)
    files = [change for change in changed if change[0] not in expected["consequences"]]
    assert len(files) == len(spoiled), files
    assert set(expected["consequences"]) <= {task for task, _ in changed}
    form = client.form("Mended", workflow={"steps": [{"name": "mood", "type": "sentiment", "fields": ["comment"]}]})
    response = client.call("POST", f"/api/v1/forms/{form}/responses", {"answers": {"comment": "All is well again."}})
    assert client.processed(response["id"], PATIENCE_SECONDS)["results"]["mood"]["label"]


@pytest.mark.full
def test_a_dry_run_foretells_how_the_systems_own_files_are_mended(host: Host, play: Callable[..., Played]) -> None:
    """By the roles that configure the system itself, most of which has a consequence."""
    # One role's scenario has no monitoring, so no account for its mail.
    values = {} if host.user("quern-alert").exists else {"monitoring_mail_to": ""}
    changed = mended(host, play, "tests/host/plays/repair.yml", _OF_THE_SYSTEM, **values)
    assert len(changed) > len(_OF_THE_SYSTEM)
