"""What a stranger's audit finds: the promised index, and no finding but those that docs/security.md explains."""

import re
from collections.abc import Iterator

import pytest
from testinfra.host import Host

from tests.host.conftest import ROOT

pytestmark = pytest.mark.full

_LEAST = 85


def explained() -> set[str]:
    """Identifiers in the table of docs/security.md; `HTTP-6710/6714` names two."""
    page = (ROOT / "docs/security.md").read_text().split("## Lynis")[1].split("\n## ")[0]
    found = set()
    for group, numbers in re.findall(r"\b([A-Z]{3,4})-(\d{4}(?:/\d{4})*)", page):
        found |= {f"{group}-{number}" for number in numbers.split("/")}
    return found | {"LYNIS"}


@pytest.fixture(scope="module")
def report(host: Host) -> Iterator[str]:
    """What Debian's Lynis writes down, one finding a line."""
    here = host.package("lynis").is_installed
    host.check_output("DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends lynis </dev/null")
    host.check_output("lynis audit system --quick --no-colors </dev/null")
    yield host.file("/var/log/lynis-report.dat").content_string
    host.check_output("rm -f /var/log/lynis-report.dat /var/log/lynis.log")
    if not here:
        host.check_output("DEBIAN_FRONTEND=noninteractive apt-get purge -y -q lynis </dev/null")


def test_the_index_is_as_promised(report: str) -> None:
    (index,) = re.findall(r"^hardening_index=(\d+)$", report, re.M)
    assert int(index) >= _LEAST


def test_every_finding_is_explained(report: str) -> None:
    found = set(re.findall(r"^(?:warning|suggestion)\[\]=([A-Z]+(?:-\d{4})?)\|", report, re.M))
    assert found, report[-2000:]
    assert found - explained() == set()
