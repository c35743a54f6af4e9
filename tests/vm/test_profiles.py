"""The profiles as text: no service is forgotten. Needs no machine."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.vm.guest import ROOT

_PROFILE = re.compile(r"apparmor='([^']+)'")


def _profiles() -> dict[str, list[str]]:
    loaded = yaml.safe_load((ROOT / "roles/apparmor/vars/main.yml").read_text())
    return {entry["name"]: entry["units"] for entry in loaded["apparmor_profiles"]}


def _units() -> list[Path]:
    """Every unit of a service that runs in the common sandbox."""
    return [path for path in (ROOT / "roles").rglob("*.service.j2") if "hardening(" in path.read_text()]


def test_every_unit_names_a_profile_that_names_it_too(expected: dict[str, Any]) -> None:
    profiles, forgotten = _profiles(), []
    for path in _units():
        unit = path.name.removesuffix(".j2")
        found = _PROFILE.search(path.read_text())
        # An instance of a template has a profile of its own where the name holds %i.
        wanted = re.compile(found[1].replace("%i", "[a-z]+") if found else "never^")
        named = [name for name in profiles if wanted.fullmatch(name)]
        instances = re.compile(re.escape(unit).replace("@\\.", "@([a-z]+)?\\."))
        if not named or not all(any(instances.fullmatch(one) for one in profiles[name]) for name in named):
            forgotten.append(f"{unit}: {found and found[1]}")
    assert forgotten == []


def test_every_profile_is_tried_in_the_machine(expected: dict[str, Any]) -> None:
    assert set(_profiles()) == {*expected["profiles"], *expected["jobs"]}
