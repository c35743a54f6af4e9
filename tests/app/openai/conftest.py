"""All of Quern with its engine, and the real `openai` client before it: only `base_url` and `api_key` are ours."""

import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from quern.embedded.stack import Stack, temporary_stack
from quern.inference import registry
from quern.openai import deltas
from quern.store.connection import Db
from quern.store.redis_connection import connect
from quern.tenants import keys, tenant
from tests.app.accounts import ApplianceAccounts, refused
from tests.app.api.client import Client
from tests.app.inference.lending import lend
from tests.app.openai.teaching import HERMES, teach

CHAT = "smollm2-135m-instruct-q4_1"
#: The same weights with a chat template that has tools.
TAUGHT = "smollm2-taught"
EMBEDDING = "all-minilm-l6-v2-int8"
#: Small, so that a test can reach it.
MOST_QUEUED = 8


@dataclass
class Lab:
    """The running stack, and its doors."""

    stack: Stack
    taught: Path

    @property
    def db(self) -> Db:
        return self.stack.runtime.store.db

    def tenant(self) -> str:
        """A new tenant without a limit."""
        made = tenant.create(self.db, f"test {secrets.token_hex(4)}", requests_per_minute=0)
        return str(made["_id"])

    def key(self, owner: str | None = None, **options: Any) -> str:
        """A key, by default of a new tenant and with every scope."""
        return keys.create(self.db, owner or self.tenant(), "test", **options)[1]

    def client(self, key: str | None = None, **options: Any) -> openai.OpenAI:
        """OpenAI's client, which tries once unless told otherwise."""
        options = {"max_retries": 0, "timeout": 120.0, **options}
        return openai.OpenAI(base_url=f"{self.stack.url}/v1", api_key=key or self.key(), **options)

    def answered(self, public_id: str) -> list[str]:
        """The texts that are kept as a request's answer: two generations may differ, so one is compared with itself."""
        document = self.db.ai_requests.find_one({"_id": f"air_{re.split('[-_]', public_id, maxsplit=1)[1]}"})
        assert document is not None
        return [choice["text"] for choice in orjson.loads(document["answer"])["choices"]]

    def forget_stream(self, public_id: str) -> bool:
        """Let go of what Redis keeps of a stream, as time does; False when there was nothing."""
        redis = connect(self.stack.runtime.store.redis_queue_url)
        return bool(redis.delete(deltas.key(f"air_{public_id.removeprefix('resp_')}")))

    def plain(self, key: str | None) -> Client:
        """A client that sends what it is told."""
        return Client(self.stack.url, key)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A models folder with Quern's own models and TAUGHT."""
    kept, made = registry.default_models_dir(), tmp_path_factory.mktemp("models")
    for name in (CHAT, EMBEDDING, TAUGHT):
        (made / name).mkdir()
    own = registry.known_models(kept)
    for model in (own[CHAT], own[EMBEDDING]):
        for file in model.files:
            lend(registry.file_path(model, file, kept), registry.file_path(model, file, made))
    source = registry.file_path(own[CHAT], own[CHAT].files[0], kept)
    file = registry.ModelFile(path="w.gguf", sha256=teach(source, made / TAUGHT / "w.gguf", HERMES))
    taught = own[CHAT].model_copy(update={"name": TAUGHT, "files": (file,), "source": None})
    (made / registry.OWN_LIST).write_text(json.dumps([taught.model_dump(mode="json")]), encoding="utf-8")
    return made


@pytest.fixture(scope="session")
def lab(models: Path) -> Iterator[Lab]:
    """One for the session. A test that stops a part starts it again."""
    settings = {
        "QUERN_ENGINE_MODELS": str(models),
        # Given, so that no model is measured first, for which these tests would wait.
        "QUERN_ENGINE_BLAS": "true",
        "QUERN_ENGINE_POLL": "0",
        "QUERN_ENGINE_BATCH_SIZE": "512",
        "QUERN_OPENAI__MAX_QUEUED_PER_TENANT": str(MOST_QUEUED),
        "QUERN_OPENAI__MAX_FILE_BYTES": "200000",
        "QUERN_JOB__LEASE": "3",
    }
    queues = ("high", "webhooks", "low", "batched")
    with temporary_stack(api_workers=1, queues=queues, settings=settings, accounts=ApplianceAccounts()) as stack:
        yield Lab(stack, models / TAUGHT / "w.gguf")
        assert refused(stack) == []


@pytest.fixture
def client(lab: Lab) -> openai.OpenAI:
    """Of a new tenant."""
    return lab.client()
