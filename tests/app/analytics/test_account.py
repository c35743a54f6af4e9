"""The ETL's own account of MongoDB: what roles/mongodb gives it is enough for every command, and for no write."""

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from pymongo import MongoClient
from pymongo.errors import OperationFailure

from quern.analytics import integrity
from quern.analytics.etl import Etl
from quern.embedded.mongod import Mongod
from quern.migrations import migrate
from quern.store.connection import Document
from tests.app.analytics.desk import RESULTS, Desk, moment

_OWNER, _READER = "owner", "quern-etl"
_ROLE = Path(__file__).parents[3] / "roles" / "mongodb" / "vars" / "main.yml"


def _granted() -> list[dict[str, Any]]:
    """What the appliance gives the account."""
    accounts = yaml.safe_load(_ROLE.read_text())["mongodb_accounts"]
    (found,) = [account["roles"] for account in accounts if account["name"] == _READER]
    return list(found)


class _Guarded(Mongod):
    """A mongod that asks every client who it is."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        key = directory / "key"
        key.write_text(secrets.token_hex(60))
        key.chmod(0o600)
        self._command += ["--keyFile", str(key)]

    def _join_set(self, client: MongoClient[Document]) -> None:
        """It is in one, whose configuration it is still reading."""

    def uri_of(self, user: str) -> str:
        return f"mongodb://{user}:secret@{quote(str(self.socket), safe='')}/?directConnection=true&authSource=admin"


@pytest.fixture
def guarded(run_directory: Path) -> Iterator[_Guarded]:
    with Mongod(run_directory / "m") as open_to_all, MongoClient[Document](open_to_all.uri) as client:
        admin = client.admin
        admin.command("createUser", _OWNER, pwd="secret", roles=["root"])
        admin.command("createUser", _READER, pwd="secret", roles=_granted())
    with _Guarded(run_directory / "m") as server:
        yield server


def test_the_account_of_the_etl_reads_and_cannot_write(guarded: _Guarded, tmp_path: Path) -> None:
    with (
        MongoClient[Document](guarded.uri_of(_OWNER), tz_aware=True, w="majority") as writing,
        MongoClient[Document](guarded.uri_of(_READER), tz_aware=True) as reading,
    ):
        migrate(writing["quern"])
        desk = Desk(writing["quern"], tmp_path)
        desk.publish()
        desk.finish(desk.submit(moment("2026-03-07"), {"sector": "health"}), RESULTS)
        etl, db = Etl(reading["quern"], desk.settings), reading["quern"]
        assert etl.run().outcome == "published"
        desk.submit(moment("2026-03-08"), {"sector": "retail"})
        # By the change stream, then all anew, and compared.
        assert etl.run().events > 0
        assert etl.run(everything=True).documents > 0
        assert integrity.verify(db, desk.manifest).holds
        for write in (lambda: db.responses.insert_one({"_id": "x"}), lambda: db.responses.drop(), lambda: db.x.drop()):
            with pytest.raises(OperationFailure, match="not authorized"):
                write()
        with pytest.raises(OperationFailure, match="not authorized"):
            reading["other"].things.find_one()
