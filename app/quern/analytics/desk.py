"""The service's work without HTTP: ask, page, keep, and answer beforehand what will be asked."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from quern.analytics import metrics
from quern.analytics.answer import Answer, Warehouse, columns, freshness, stamp
from quern.analytics.engine import EngineError, TimedOutError
from quern.analytics.kept import Kept
from quern.analytics.manifest import Manifest, NoWarehouseError, last_report
from quern.analytics.plan import AskError
from quern.analytics.question import AnswerPage, Filter, Measure, Question
from quern.store import cursor as cursors

_log = logging.getLogger(__name__)

#: How many times as long a question may take of which nobody waits for the answer.
_PATIENCE_BEFOREHAND: Final = 5
#: What a tenant's overview shows: computed for every tenant whose part of the warehouse a publication changed.
STANDARD: Final = [
    Question(measure=Measure.RESPONSES, grain="day"),
    Question(measure=Measure.RESPONSES, grain="month", dimensions=["form"]),
    Question(measure=Measure.RESPONSES, dimensions=["status"]),
    Question(measure=Measure.RESPONSE_TIME, grain="month"),
    Question(measure=Measure.RESPONSE_LENGTH, dimensions=["user"]),
    Question(measure=Measure.COMPLETION, dimensions=["form"]),
    Question(measure=Measure.RATING, grain="month"),
    Question(measure=Measure.RESPONSES, grain="month", dimensions=["sentiment"]),
    Question(measure=Measure.RESPONSES, grain="month", dimensions=["label"]),
    Question(measure=Measure.JOB_RUN, dimensions=["queue"], statistics=["count", "sum", "p95"]),
    Question(measure=Measure.FUNNEL),
]


class GoneError(Exception):
    """The answer that a cursor goes on with is not kept any more; the text says what to do."""


@dataclass(frozen=True)
class Found:
    """An answer, whether it was kept, and the stamp of what was read for it."""

    answer: Answer
    cached: bool
    stamp: str


class Desk:
    """Answers questions from what is kept, else from the warehouse. Safe to share between threads."""

    def __init__(self, warehouse: Warehouse, kept: Kept) -> None:
        self.warehouse, self.kept = warehouse, kept
        self._stamps: tuple[int, dict[str | None, str]] = (-1, {})
        self._retired: dict[str | None, str] = {}

    def stamp(self, manifest: Manifest, tenant: str | None) -> str:
        """The stamp of a tenant's part of a manifest, with None of all of it; kept, since it reads every path."""
        generation, known = self._stamps
        if generation != manifest.generation:
            known = {}
            self._stamps = (manifest.generation, known)
        if tenant not in known:
            known[tenant] = f"{tenant or '-'}:{stamp(manifest, tenant)}"
        return known[tenant]

    def ask(self, question: Question, tenant: str, seconds: float | None = None) -> Found:
        """The whole answer, newest warehouse. Raises as `Warehouse.answer`, whose `seconds` these are."""
        manifest = self.warehouse.current()
        mark = self.stamp(manifest, tenant)
        found = self.kept.get(mark, question)
        if found is not None:
            # The files are the same as then, so the answer is as new as the manifest.
            return Found(Answer(found.table, freshness(manifest)), True, mark)
        made = self.warehouse.answer(question, tenant, parts=self.kept, seconds=seconds)
        self.kept.put(mark, question, made)
        return Found(made, False, mark)

    def page(self, question: Question, tenant: str, limit: int, cursor: str | None) -> AnswerPage:
        """One page of an answer.

        Raises:
            GoneError: the cursor's answer is not kept any more.
            BadCursorError: the cursor is of another question.
            and as `Warehouse.answer`.
        """
        offset = 0
        if cursor is None:
            try:
                found = self.ask(question, tenant)
            except TimedOutError:
                # The more so: beforehand there is more time.
                self._remember(tenant, question)
                raise
            self._remember(tenant, question)
        else:
            mark, fingerprint, place = cursors.decode(cursor, 3)
            if fingerprint != question.fingerprint or not place.isdigit() or not mark.startswith(f"{tenant}:"):
                raise cursors.BadCursorError("not a cursor of this question")
            offset = int(place)
            found = self._again(question, tenant, mark)
        rows = found.answer.table.slice(offset, limit)
        beyond = offset + limit < found.answer.table.num_rows
        after = cursors.encode(found.stamp, question.fingerprint, str(offset + limit)) if beyond else None
        return AnswerPage(
            columns=columns(question, found.answer.table.schema),
            rows=plain_rows(rows),
            total_rows=found.answer.table.num_rows,
            freshness=found.answer.freshness,
            cached=found.cached,
            next_cursor=after,
        )

    def _remember(self, tenant: str, question: Question) -> None:
        # A text to compare answers with may be somebody's name, which must not outlive an erasure.
        if not any(_holds_text(item) for item in [*question.filters, *chain(*(s.filters for s in question.stages))]):
            self.kept.remember(tenant, question)

    def _again(self, question: Question, tenant: str, mark: str) -> Found:
        if mark == self.stamp(self.warehouse.current(), tenant):
            return self.ask(question, tenant)
        kept = self.kept.get(mark, question)
        if kept is None:
            raise GoneError("the warehouse was published anew since the first page; ask again without a cursor")
        return Found(kept, True, mark)

    def retire_former(self) -> None:
        """Let go of what is kept of former publications. Raises NoWarehouseError."""
        manifest = self.warehouse.current()
        mark = self.stamp(manifest, None)
        if self._retired.get(None) != mark:
            self.kept.retire_parts(manifest.paths)
            self._retired[None] = mark
        for tenant in manifest.tenants:
            mark = self.stamp(manifest, tenant)
            if self._retired.get(tenant) != mark:
                self.kept.retire(mark)
                self._retired[tenant] = mark

    def answer_beforehand(self, stop: threading.Event) -> int:
        """Answer each tenant's standard questions and those asked lately; returns how many were not kept yet."""
        made = 0
        try:
            manifest = self.warehouse.current()
        except NoWarehouseError:
            return 0
        for tenant in manifest.tenants:
            for question in [*STANDARD, *self.kept.remembered(tenant)]:
                if stop.is_set():
                    return made
                try:
                    made += not self.ask(question, tenant, self.warehouse.seconds * _PATIENCE_BEFOREHAND).cached
                except (AskError, EngineError, ValueError) as error:
                    # A field that is gone, a question that takes too long: whoever asks it is told.
                    _log.debug("not answered beforehand: %s", error)
        return made

    def follow(
        self, stop: threading.Event, answer: Callable[[threading.Event], int] | None = None, pause: float = 1.0
    ) -> None:
        """Answer beforehand after each publication, until `stop`: by `answer`, or in this process.

        What fails is not tried again before the next publication: whoever asks is answered then.
        """
        answer = answer or self.answer_beforehand
        seen = None
        while not stop.wait(pause):
            try:
                metrics.show_last_run(last_report(self.warehouse.root))
                manifest = self.warehouse.current()
                generation = manifest.generation
                if manifest.freshness is not None:
                    # The ETL's own process may have been restarted since, and then has no figure.
                    metrics.FRESHNESS.set(manifest.freshness.timestamp())
                if generation != seen:
                    seen = generation
                    self.retire_former()
                    count = answer(stop)
                    _log.info("%d questions answered beforehand", count, extra={"generation": generation})
            except NoWarehouseError:
                continue
            except Exception:
                _log.exception("questions could not be answered beforehand")


def _holds_text(item: Filter) -> bool:
    own = item.dimension == "respondent" or item.dimension.startswith(("answer.", "result."))
    return own and any(isinstance(value, str) for value in item.values)


def plain_rows(table: Any) -> list[list[Any]]:
    """A table's rows for JSON: dates and moments become text there."""
    return [list(row) for row in zip(*(column.to_pylist() for column in table.columns), strict=True)]
