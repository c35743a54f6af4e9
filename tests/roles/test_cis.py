"""docs/security.md says of each control of tests/host/cis.yml what is asserted, or why it does not apply."""

import re

import yaml

from tests.roles.rendering import ROOT


def test_the_guide_and_the_tests_name_the_same_controls() -> None:
    controls = yaml.safe_load((ROOT / "tests/host/cis.yml").read_text())["controls"]
    guide = (ROOT / "docs/security.md").read_text()
    rows = dict(re.findall(r"^\| ([0-9][0-9.]*(?:-[0-9]+)?) \| .* \| (asserted|no|partly)\b", guide, re.MULTILINE))
    asserted = {number for number, control in controls.items() if "run" in control or "elsewhere" in control}
    expected = {
        number: "no" if number not in asserted else "partly" if "why" in control else "asserted"
        for number, control in controls.items()
    }
    assert rows == expected


def test_what_is_asserted_elsewhere_is_a_test() -> None:
    controls = yaml.safe_load((ROOT / "tests/host/cis.yml").read_text())["controls"]
    named = [control["elsewhere"].split("::") for control in controls.values() if "elsewhere" in control]
    for file, function in named:
        assert f"\ndef {function}(" in (ROOT / file).read_text()
