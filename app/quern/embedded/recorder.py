"""A thread-safe list of what a sink has received, to be waited upon."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Recorder(Generic[Item]):
    """Keeps every item in order of arrival and wakes whoever waits for one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._items: list[Item] = []
        self._arrival = threading.Condition()

    def record(self, item: Item) -> None:
        """Append an item and wake the waiting threads."""
        with self._arrival:
            self._items.append(item)
            self._arrival.notify_all()

    def items(self) -> list[Item]:
        """A copy of all items so far."""
        with self._arrival:
            return list(self._items)

    def clear(self) -> None:
        """Forget all items."""
        with self._arrival:
            self._items.clear()

    def wait_for(self, predicate: Callable[[Item], bool], timeout: float = 60.0) -> Item:
        """The first item, past or to come, for which `predicate` holds. Raises TimeoutError after `timeout` seconds."""
        return self.wait_for_count(1, predicate, timeout)[0]

    def wait_for_count(
        self, count: int, predicate: Callable[[Item], bool] = lambda _: True, timeout: float = 60.0
    ) -> list[Item]:
        """At least `count` items for which `predicate` holds. Raises TimeoutError after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._arrival:
            while len(found := [item for item in self._items if predicate(item)]) < count:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise TimeoutError(
                        f"{self._name}: expected {count} matching in {timeout:g} s, "
                        f"found {len(found)} among {len(self._items)} received"
                    )
                self._arrival.wait(remaining)
            return found
