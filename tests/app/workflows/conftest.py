"""The course of responses."""

import pytest

from quern.config import Settings
from quern.embedded.receiver import Receiver
from quern.embedded.smtp_sink import SmtpSink
from quern.store.connection import Store
from tests.app.workflows.course import Course


@pytest.fixture
def course(store: Store, settings: Settings, smtp_sink: SmtpSink, receiver: Receiver) -> Course:
    """On an empty database."""
    return Course(settings, smtp_sink, receiver)
