"""What all stores rest on: identifiers, time, cursors, secrets at rest, and the connection."""

import os
from datetime import UTC, datetime

import pytest
from cryptography.fernet import Fernet
from hypothesis import given
from hypothesis import strategies as st
from pymongo.errors import AutoReconnect, DuplicateKeyError, OperationFailure, ServerSelectionTimeoutError

from quern.config import LiveSettings, Settings
from quern.store import clock, cursor, identifier
from quern.store.connection import Store, is_away
from quern.store.vault import Vault, VaultError, from_client_secret

PARTS = st.lists(st.text(max_size=20), min_size=1, max_size=4)


@given(one=PARTS, two=PARTS)
def test_a_derived_identifier_names_its_cause_and_no_other(one: list[str], two: list[str]) -> None:
    assert identifier.is_valid(identifier.derived("job", *one), "job")
    assert (identifier.derived("job", *one) == identifier.derived("job", *two)) is (one == two)


def test_the_borders_of_a_cause_count() -> None:
    assert identifier.derived("job", "a", "bc") != identifier.derived("job", "ab", "c")


def test_new_identifiers_differ_and_have_their_shape() -> None:
    made = {identifier.new("rsp") for _ in range(1000)}
    assert len(made) == 1000
    assert all(identifier.is_valid(one, "rsp") for one in made)


@pytest.mark.parametrize(
    "wrong", ["", "rsp_", "rsp_" + "u" * 26, "rsp_" + "a" * 25, "job_" + "a" * 26, "rsp_" + "A" * 26]
)
def test_another_shape_is_no_identifier(wrong: str) -> None:
    assert not identifier.is_valid(wrong, "rsp")


@given(position=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=3))
def test_a_cursor_comes_back_as_it_was(position: list[str]) -> None:
    assert cursor.decode(cursor.encode(*position), len(position)) == position


@given(garbage=st.text(max_size=60))
def test_what_is_no_cursor_is_refused(garbage: str) -> None:
    try:
        assert all(isinstance(part, str) for part in cursor.decode(garbage, 2))
    except cursor.BadCursorError:
        pass


def test_a_cursor_of_another_list_is_refused() -> None:
    with pytest.raises(cursor.BadCursorError):
        cursor.decode(cursor.encode("a", "b"), 1)


def test_what_is_written_is_what_is_read(store: Store) -> None:
    now = clock.now()
    store.db.scratch.replace_one({"_id": 1}, {"at": now}, upsert=True)
    found = store.db.scratch.find_one({"_id": 1})
    assert found is not None
    assert found["at"] == now
    assert found["at"].tzinfo is not None


def test_time_is_shown_in_utc_with_milliseconds() -> None:
    assert clock.rfc3339(datetime(2026, 11, 22, 1, 2, 3, 4567, tzinfo=UTC)) == "2026-11-22T01:02:03.004Z"


def test_a_rotated_vault_opens_what_the_old_key_sealed() -> None:
    old, new = Fernet.generate_key().decode(), Fernet.generate_key().decode()
    sealed = Vault(old).encrypt(b"whsec_1")
    rotated = Vault(new, old)
    assert rotated.decrypt(sealed) == b"whsec_1"
    with pytest.raises(VaultError, match="QUERN_SECRET_KEYS"):
        Vault(new).decrypt(sealed)
    with pytest.raises(VaultError):
        Vault(old).decrypt(rotated.encrypt(b"x"))


def test_only_the_client_can_open_what_was_sealed_with_its_secret() -> None:
    sealed = from_client_secret("token", "key").encrypt(b"answer")
    assert b"answer" not in sealed
    assert from_client_secret("token", "key").decrypt(sealed) == b"answer"
    with pytest.raises(VaultError):
        from_client_secret("token", "another").decrypt(sealed)


@pytest.mark.parametrize(
    ("error", "away"),
    [
        (ServerSelectionTimeoutError("x"), True),
        (AutoReconnect("x"), True),
        (OperationFailure("shutting down", 91), True),
        (OperationFailure("not primary", 10107), True),
        (OperationFailure("bad query", 2), False),
        (DuplicateKeyError("x", 11000), False),
        (ValueError("x"), False),
    ],
)
def test_only_what_may_pass_counts_as_away(error: Exception, away: bool) -> None:
    assert is_away(error) is away


def test_a_forked_process_makes_its_own_connection(store: Store) -> None:
    parent = store.client
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            own = store.client is not parent and store.db.command("ping")["ok"] == 1
            os.write(writer, b"own" if own else b"shared")
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"own"
    assert store.client is parent


def test_a_changed_address_is_connected_to(settings: Settings) -> None:
    """What a rotation of the password looks like to a running process."""

    class Rotating(LiveSettings):
        current = settings

        def get(self) -> Settings:
            return self.current

    live = Rotating(settings)
    store = Store(live)
    before = store.client
    assert store.client is before
    uri = settings.mongodb_uri.get_secret_value() + "&appName=rotated"
    live.current = settings.model_copy(update={"mongodb_uri": type(settings.mongodb_uri)(uri)})
    assert store.client is not before
    assert store.db.command("ping")["ok"] == 1


def test_a_database_that_is_away_is_noticed_within_seconds(settings: Settings) -> None:
    nobody = "mongodb://%2Ftmp%2Fnobody.sock/?directConnection=true"
    changed = settings.model_copy(update={"mongodb_uri": type(settings.mongodb_uri)(nobody)})
    with pytest.raises(ServerSelectionTimeoutError) as caught:
        Store(LiveSettings(changed)).db.command("ping")
    assert is_away(caught.value)
