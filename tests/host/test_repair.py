"""What somebody spoiled is mended by the next run, and nothing else is touched."""

from collections.abc import Callable
from typing import Any

from testinfra.host import Host

from tests.host.conftest import Played

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
