"""What somebody spoiled is mended by the next run, and nothing else is touched."""

from collections.abc import Callable
from typing import Any

from testinfra.host import Host

from tests.host.conftest import Played
from tests.host.test_check_mode import SHARE_FORETOLD

#: Of roles/base and roles/firewall; from most of them something follows.
_SPOILED = (
    "/etc/sysctl.d/99-quern.conf",
    "/etc/chrony/conf.d/quern.conf",
    "/etc/systemd/journald.conf.d/quern.conf",
    "/etc/audit/rules.d/quern.rules",
    "/etc/logrotate.conf",
    "/etc/issue.net",
    "/etc/nftables.conf",
    "/etc/quern/nftables.conf",
)
#: Everything that roles manage as files, without what services write there themselves.
_CHECKSUMS = (
    "find /etc /usr/local /opt/quern/current/ -xdev -type f -not -path '*/__pycache__/*' -not -name '*.cache' "
    "-print0 | sort -z | xargs -0 sha256sum"
)


def checksums(host: Host) -> dict[str, str]:
    lines = host.check_output(_CHECKSUMS).splitlines()
    return {path: digest for digest, path in (line.split("  ", 1) for line in lines)}


def test_the_next_run_mends_exactly_the_spoiled_files(
    host: Host, expected: dict[str, Any], play: Callable[..., Played]
) -> None:
    spoiled = expected["spoiled"]
    assert len(spoiled) == 10
    before = checksums(host)
    for path in spoiled:
        host.check_output("echo '# spoiled' >>%s", path)
    assert {path for path, digest in checksums(host).items() if before.get(path) != digest} == set(spoiled)

    done = play("site.yml")

    assert done.code == 0, done.output
    assert checksums(host) == before
    mended = [change for change in done.changed if change[0] not in expected["consequences"]]
    assert len(mended) == len(spoiled), mended


def test_a_dry_run_foretells_how_spoiled_files_are_mended(host: Host, play: Callable[..., Played]) -> None:
    """By the roles that configure the system itself: what follows from a mended file is foretold too."""
    before = checksums(host)
    for path in _SPOILED:
        host.check_output("echo '# spoiled' >>%s", path)

    foretold = play("tests/host/plays/repair.yml", dry=True, **_values(host))
    assert foretold.code == 0, foretold.output
    assert {path for path, digest in checksums(host).items() if before.get(path) != digest} == set(_SPOILED)

    done = play("tests/host/plays/repair.yml", **_values(host))
    assert done.code == 0, done.output
    assert checksums(host) == before
    assert len(done.changed) > len(_SPOILED)
    unforeseen = [change for change in done.changed if change not in foretold.changed]
    assert len(unforeseen) <= (1 - SHARE_FORETOLD) * len(done.changed), unforeseen


def _values(host: Host) -> dict[str, Any]:
    # One role's scenario has no monitoring, so no account for its mail.
    return {} if host.user("quern-alert").exists else {"monitoring_mail_to": ""}
