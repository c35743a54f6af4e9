"""docs/security.md says of each control of tests/host/cis.yml what is asserted, or why it does not apply."""

import re

import yaml

from tests.roles.rendering import ROOT


def test_the_guide_and_the_tests_name_the_same_controls() -> None:
    controls = yaml.safe_load((ROOT / "tests/host/cis.yml").read_text())["controls"]
    guide = (ROOT / "docs/security.md").read_text()
    rows = dict(re.findall(r"^\| ([0-9][0-9.]*(?:-[0-9]+)?) \| .* \| (asserted|no|partly)\b", guide, re.MULTILINE))
    expected = {
        number: "partly" if "run" in control and "why" in control else "asserted" if "run" in control else "no"
        for number, control in controls.items()
    }
    assert rows == expected
