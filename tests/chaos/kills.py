"""The killer: SIGKILL to a component at a chosen moment, and its restart right after."""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from pymongo.errors import PyMongoError
from redis import Redis
from redis.exceptions import RedisError

from quern.embedded.stack import Stack
from quern.store import clock

#: Component to how often it is chosen.
WEIGHTS = {
    "worker-batched": 6,
    "worker-webhooks": 6,
    "worker-default": 6,
    "api": 4,
    "relay": 4,
    "scheduler": 3,
    "engine": 2,
    "redis": 4,
    "mongod": 3,
}
#: How long the killer waits for a live claim before it strikes without one.
_PATIENCE = 20.0


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: of what, and what was going on at that moment."""

    component: str
    claims: int
    """Live claims: of its own queue for a worker, else of all."""
    requests: int
    """The client's requests without an answer."""
    outboxes: int
    """Acknowledged responses that were not relayed yet."""
    unsealed: int
    """Audit entries that were not chained yet."""


@dataclass
class Killer:
    """Strikes components of `stack` in an order that `seed` fixes; the moments are the machine's."""

    stack: Stack
    seed: int
    kills: list[Kill] = field(default_factory=list)
    flushes: int = 0
    fallen: Counter[str] = field(default_factory=Counter)
    """Components that ended by themselves and were started again, as systemd would."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._bag: list[str] = []

    def strike(self, requests: Callable[[], int]) -> Kill:
        """Wait for a live claim, kill one component, start it again, and empty Redis now and then."""
        self.restart_fallen()
        component = self._choose()
        queue = component.removeprefix("worker-") if component.startswith("worker-") else None
        claims = self._await_claims(queue)
        process = self.stack.processes[component]
        outboxes, unsealed = self._count("responses", "outbox.at"), self._count("audit", "pending")
        kill = Kill(component, claims, requests(), outboxes, unsealed)
        process.kill()
        process.start(wait=False)
        self.kills.append(kill)
        if len(self.kills) % 8 == 0 and self._flush():
            self.flushes += 1
        time.sleep(self._random.uniform(0.05, 1.0))
        return kill

    def restart_fallen(self) -> None:
        """Start again what has ended by itself."""
        for name, process in self.stack.processes.items():
            if process.pid is None:
                self.fallen[name] += 1
                process.start(wait=False)

    def _choose(self) -> str:
        if not self._bag:
            # Each once at first, so that the shortest ordeal leaves out none.
            weights = WEIGHTS if self.kills else dict.fromkeys(WEIGHTS, 1)
            self._bag = [name for name, weight in weights.items() for _ in range(weight)]
            self._random.shuffle(self._bag)
        return self._bag.pop()

    def _await_claims(self, queue: str | None) -> int:
        deadline = time.monotonic() + _PATIENCE
        while True:
            self.restart_fallen()
            claims = self._claims(queue)
            if claims or time.monotonic() > deadline:
                return claims
            time.sleep(0.01)

    def _claims(self, queue: str | None) -> int:
        live = {"state": "running", "lease_until": {"$gt": clock.now()}}
        try:
            return self.stack.runtime.store.db.jobs.count_documents(live | ({"queue": queue} if queue else {}))
        except PyMongoError:
            return 0

    def _count(self, collection: str, field_name: str) -> int:
        try:
            return self.stack.runtime.store.db[collection].count_documents({field_name: {"$exists": True}})
        except PyMongoError:
            return 0

    def _flush(self) -> bool:
        try:
            with Redis.from_url(self.stack.redis.url, socket_timeout=2) as redis:
                redis.flushall()
        except RedisError:
            return False
        return True

    def table(self) -> str:
        """Kills by component, and how many of them found what going on."""
        lines = [
            f"{'component':<16} {'kills':>5} | {'claim':>7} {'request':>9} {'outbox':>8} {'entry':>9}",
            f"{'':<16} {'':>5} | {'live':>7} {'in flight':>9} {'waiting':>8} {'unsealed':>9}",
        ]
        rows = [(name, [kill for kill in self.kills if kill.component == name]) for name in WEIGHTS]
        for name, kills in [*rows, ("all", self.kills)]:
            found = [
                sum(count > 0 for count in counts)
                for counts in (
                    [kill.claims for kill in kills],
                    [kill.requests for kill in kills],
                    [kill.outboxes for kill in kills],
                    [kill.unsealed for kill in kills],
                )
            ]
            lines.append(f"{name:<16} {len(kills):>5} | {found[0]:>7} {found[1]:>9} {found[2]:>8} {found[3]:>9}")
        return "\n".join(lines)
