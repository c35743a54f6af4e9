"""The appliance's accounts of MongoDB and Redis, as its roles define them, for a stack of the tests.

Every test that talks to the stack's processes thereby asks whether what the roles grant is enough.
"""

import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pymongo import MongoClient
from redis import Redis

from quern.embedded.mongod import Mongod
from quern.embedded.redis_server import RedisServer
from quern.embedded.stack import Stack

ROLES = Path(__file__).parents[2] / "roles"
#: The one process that fills the warehouse has a second account for it.
_ETL = "worker-low"
_DENIED = '"msg":"Checking authorization failed"'


def mongodb() -> dict[str, Any]:
    """roles/mongodb/vars: `mongodb_roles` and `mongodb_accounts`."""
    return dict(yaml.safe_load((ROLES / "mongodb/vars/main.yml").read_text()))


def redis(instance: str) -> dict[str, str]:
    """The rules of each account of one instance, from roles/redis/vars."""
    given = yaml.safe_load((ROLES / "redis/vars/main.yml").read_text())
    (found,) = [one for one in given["redis_instances"] if one["name"] == instance]
    return {account["name"]: _rendered(account["rules"], given) for account in found["accounts"]}


def _rendered(text: str, given: Mapping[str, Any]) -> str:
    """What Jinja makes of a text that only names other texts."""
    while "{{" in text:
        text = re.sub(r"\{\{ (\w+) \}\}", lambda match: str(given[match[1]]), text)
    return text


def privileges(account: Mapping[str, Any]) -> dict[str, set[str]]:
    """What an account may do, by collection (`""`: all of them; `server`), with what its roles inherit."""
    roles = {role["name"]: role for role in mongodb()["mongodb_roles"]}
    found: dict[str, set[str]] = {}
    waiting = [one["role"] for one in account["roles"]]
    while waiting:
        role = roles[waiting.pop()]
        waiting += [one["role"] for one in role.get("roles", [])]
        for one in role["privileges"]:
            found.setdefault(one["resource"].get("collection", "server"), set()).update(one["actions"])
    return found


_LETTERS = {"find": "R", "insert": "I", "update": "U", "remove": "D"}


def table() -> list[str]:
    """The rows of docs/security.md about MongoDB: one an account, its collections by what it may do with them."""
    rows = []
    for account in mongodb()["mongodb_accounts"]:
        by_actions: dict[str, list[str]] = {}
        for collection, actions in sorted(privileges(account).items()):
            name = "every collection" if collection == "" else "the server" if collection == "server" else collection
            letters = "".join(letter for action, letter in _LETTERS.items() if action in actions)
            words = " ".join([*([letters] if letters else []), *sorted(actions - _LETTERS.keys())])
            by_actions.setdefault(words, []).append(name)
        granted = "; ".join(f"{words}: {', '.join(names)}" for words, names in sorted(by_actions.items()))
        rows.append(f"| {account['name']} | {granted} |")
    return rows


def create_mongodb(mongod: Mongod, password: str) -> None:
    """Every role and account of the appliance, all with one password."""
    granted = mongodb()
    with MongoClient[dict[str, Any]](mongod.uri) as client:
        for role in granted["mongodb_roles"]:
            command = {"privileges": role["privileges"], "roles": role.get("roles", [])}
            client.admin.command("createRole", role["name"], **command)
        for account in granted["mongodb_accounts"]:
            client.admin.command("createUser", account["name"], pwd=password, roles=account["roles"])


def create_redis(server: RedisServer, instance: str, password: str) -> None:
    """Every account of one instance, as roles/redis/library/redis_accounts.py sets them."""
    with Redis.from_url(server.url) as client:
        for name, rules in redis(instance).items():
            words = ["reset", "on", "resetchannels", "-@all", *rules.split(), f">{password}"]
            client.execute_command("ACL", "SETUSER", name, *words)


def refused(stack: Stack) -> list[str]:
    """What the databases of a stack refused to its processes' accounts: what mongod logged, and what Redis did."""
    log = stack.mongod.log.read_text(errors="replace")
    # The check whether mongod is up says goodbye without an account.
    denied = [line for line in log.splitlines() if _DENIED in line and "endSessions" not in line]
    found = sorted({match[0] for line in denied if (match := re.search(r"on \w+ to execute .{80}", line))})
    for server in (stack.redis, stack.cache):
        with Redis.from_url(server.url, decode_responses=True) as client:
            found += [str(entry) for entry in client.acl_log() if entry["username"] != "default"]
    return found


class ApplianceAccounts:
    """One account a process, as on the appliance."""

    def __init__(self) -> None:
        self._password = secrets.token_hex(16)
        self._servers: tuple[Mongod, RedisServer, RedisServer] | None = None

    def create(self, mongod: Mongod, queue: RedisServer, cache: RedisServer) -> None:
        self._servers = (mongod, queue, cache)
        create_mongodb(mongod, self._password)
        create_redis(queue, "queue", self._password)
        create_redis(cache, "cache", self._password)
        for server in (queue, cache):
            with Redis.from_url(server.url) as client:
                client.acl_save()

    def environment(self, process: str) -> Mapping[str, str]:
        assert self._servers is not None, "expected the accounts to be created first"
        mongod, queue, cache = self._servers
        name = f"quern-{process.removeprefix('worker-')}"
        if process == "engine":
            return {"QUERN_MONGODB_URI": "mongodb://nobody.invalid", "QUERN_REDIS_QUEUE_URL": "redis://nobody.invalid"}
        if process == "analytics":
            return {"QUERN_REDIS_CACHE_URL": self._redis(cache, name)}
        own = {
            "QUERN_MONGODB_URI": mongod.uri_of(name, self._password),
            "QUERN_REDIS_QUEUE_URL": self._redis(queue, name),
        }
        if process == _ETL:
            own["QUERN_ETL_MONGODB_URI"] = mongod.uri_of("quern-etl", self._password)
        return own

    def _redis(self, server: RedisServer, name: str) -> str:
        return server.url.replace("unix://", f"unix://{name}:{self._password}@")
