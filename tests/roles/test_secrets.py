"""Secrets are made, given and rotated as the module of roles/secrets decides, without a host."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.roles.rendering import ROLES

URL = {"file": "quern-api.quern_redis_queue_url", "kind": "password", "template": "unix://quern-api:{secret}@/r.sock"}
RING = {"file": "quern.quern_secret_keys", "kind": "ring"}
PHASES = ("introduce", "promote", "retire")


@pytest.fixture(scope="module")
def module() -> ModuleType:
    path = ROLES / "secrets/library/encrypted_credentials.py"
    specification = importlib.util.spec_from_file_location("encrypted_credentials", path)
    assert specification and specification.loader
    loaded = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(loaded)
    return loaded


@pytest.mark.parametrize("given", ["short", "a" * 42 + ",", "a" * 20 + "," + "b" * 22, "a" * 42 + "@", "a" * 43 + "\n"])
def test_a_password_that_would_break_an_address_is_refused(module: ModuleType, given: str) -> None:
    assert module.unlike([URL], {URL["file"]: given}) == [URL["file"]]


def test_a_given_password_is_used_and_stays(module: ModuleType) -> None:
    given = {URL["file"]: module.fresh("password")}
    assert module.unlike([URL], given) == []
    made = module.wanted_content(URL, None, given, None)
    assert made == f"unix://quern-api:{given[URL['file']]}@/r.sock"
    assert module.wanted_content(URL, made, given, None) == made


def rotated(module: ModuleType, folder: Path, item: dict[str, Any], content: str, phase: str) -> str:
    """What a run of this phase makes of it."""
    rotation = module.Rotation(folder)
    wanted = module.wanted_content(item, content, {}, phase if rotation.is_to_do(item["file"], phase) else None)
    if rotation.is_to_do(item["file"], phase):
        rotation.done(item["file"], phase)
    return str(wanted)


@pytest.mark.parametrize("item", [URL, RING, {"file": "mongodb.admin", "kind": "handover"}])
@pytest.mark.parametrize("interrupted_after", [1, 2])
def test_an_interrupted_rotation_goes_on_with_what_it_introduced(
    module: ModuleType, tmp_path: Path, item: dict[str, Any], interrupted_after: int
) -> None:
    content = before = module.wanted_content(item, None, {}, None)
    for phase in PHASES[:interrupted_after]:
        content = rotated(module, tmp_path, item, content, phase)
    assert json.loads((tmp_path / ".rotation").read_text()) == {item["file"]: PHASES[interrupted_after - 1]}
    reached = content
    for phase in PHASES[:interrupted_after]:
        content = rotated(module, tmp_path, item, content, phase)
        assert content == reached
    for phase in PHASES[interrupted_after:]:
        content = rotated(module, tmp_path, item, content, phase)
    assert content != before
    assert not (tmp_path / ".rotation").exists()
    # The next one is a new one.
    assert rotated(module, tmp_path, item, content, "introduce") != content
