"""Write down what a run of site.yml changed, or said that it would, for tests/host/test_check_mode.py to compare.

Each run adds one JSON file to the folder `$QUERN_CHANGES`: whether it was a dry run, and the tasks that reported a
change, each with the item of its loop.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: changes
type: notification
short_description: keeps what a run changed
description: Writes one JSON file for each run into the folder that QUERN_CHANGES names, and nothing without it.
"""


class CallbackModule(CallbackBase):  # type: ignore[misc]  # ansible has no types
    """Collects the changed tasks of every host but the one that Ansible runs on."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "notification"
    CALLBACK_NAME = "changes"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self) -> None:
        super().__init__()
        self._playbook = ""
        self._check = False
        self._changed: list[list[str]] = []

    def v2_playbook_on_start(self, playbook: Any) -> None:
        """Note which playbook it is."""
        self._playbook = Path(playbook._file_name).name

    def v2_playbook_on_play_start(self, play: Any) -> None:
        """Note whether it is a dry run."""
        self._check = bool(play.check_mode)

    def v2_runner_on_ok(self, result: Any) -> None:
        """Note a task that changed something; one with a loop is noted by its items."""
        if result._result.get("changed") and "results" not in result._result:
            self._note(result, "")

    def v2_runner_item_on_ok(self, result: Any) -> None:
        """Note an item that changed something."""
        if result._result.get("changed"):
            self._note(result, str(self._get_item_label(result._result)))

    def _note(self, result: Any, item: str) -> None:
        if result._host.get_name() != "localhost":
            self._changed.append([result._task.get_name(), item])

    def v2_playbook_on_stats(self, stats: Any) -> None:
        """Write the file."""
        place = os.environ.get("QUERN_CHANGES")
        if not place or not [name for name in stats.processed if name != "localhost"]:
            return
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "playbook": self._playbook,
            "check": self._check,
            "changed": self._changed,
            "failed": sum(stats.failures.values()) + sum(stats.dark.values()),
        }
        number = len(list(folder.glob("*.json")))
        (folder / f"{number:03}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False))
