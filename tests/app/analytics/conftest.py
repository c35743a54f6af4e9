"""A desk on the session's own mongod."""

from pathlib import Path

import pytest

from quern.store.connection import Store
from tests.app.analytics.desk import Desk


@pytest.fixture
def desk(store: Store, tmp_path: Path) -> Desk:
    """An empty database with one tenant, whose form is published, and a folder for its warehouse."""
    made = Desk(store.db, tmp_path)
    made.publish()
    return made
