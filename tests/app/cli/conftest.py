"""The operator's command, run as an operator runs it: in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from tests.app.api.client import House


@dataclass(frozen=True)
class Outcome:
    """What a command printed and how it ended."""

    code: int
    out: str
    err: str

    def json(self) -> Any:
        assert self.code == 0, self.err
        return orjson.loads(self.out)


@dataclass
class Quern:
    """`quern` with the settings of a stack."""

    environment: Mapping[str, str]
    directory: str

    def __call__(self, *words: str, **settings: str) -> Outcome:
        found = subprocess.run(
            [sys.executable, "-m", "quern.cli.main", *words],
            env={**self.environment, **settings},
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return Outcome(found.returncode, found.stdout, found.stderr)


@pytest.fixture(scope="session")
def quern(house: House) -> Quern:
    """The command against the session's stack."""
    return Quern({**os.environ, **house.stack.environment}, str(house.stack.directory))
