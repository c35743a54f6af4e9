"""docs/security.md says of each service where it writes as its AppArmor profile does."""

import re
from itertools import product

import jinja2
import yaml

from tests.roles.rendering import ROOT


def _written() -> dict[str, set[str]]:
    """The places that each profile lets be written, but those in /run and /proc."""
    values = yaml.safe_load((ROOT / "roles/apparmor/vars/main.yml").read_text())
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=True)
    environment.tests["match"] = lambda text, pattern: re.match(pattern, text) is not None
    texts = {name: environment.from_string(text).render() for name, text in values.items() if isinstance(text, str)}
    found: dict[str, set[str]] = {}
    for profile in values["apparmor_profiles"]:
        rules = environment.from_string(profile["rules"]).render(texts)
        patterns = re.findall(r"(?m)^\s*(?:owner )?(/\S+) [rkm]*w[rwkm]*,$", rules)
        places = {place for pattern in patterns for place in _each(re.sub(r"/(?:\{,\*+\}|\*\*)$", "", pattern))}
        found[profile["name"]] = {place for place in places if not place.startswith("/run/")}
    return found


def _each(pattern: str) -> list[str]:
    """`/var/{lib,cache}/x` in full."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(words) for words in product(*parts)]


def _table() -> list[tuple[set[str], set[str]]]:
    """The profiles of each row and the places that it says are written."""
    page = (ROOT / "docs/security.md").read_text().partition("## ")[0]
    rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("| ")][1:]
    return [(set(re.findall(r"`(quern-[a-z-]+)`", row[2])), set(re.findall(r"`(/[^`]+)`", row[5]))) for row in rows]


def test_the_page_names_each_profile_once_and_where_it_may_write() -> None:
    written = _written()
    assert written["quern-worker-low"] == {"/var/lib/quern-warehouse", "/var/lib/quern-extract"}
    rows = [(profiles, said) for profiles, said in _table() if profiles]
    assert sorted(name for profiles, _ in rows for name in profiles) == sorted(written)
    for profiles, said in rows:
        assert said == set().union(*(written[name] for name in profiles)), profiles
