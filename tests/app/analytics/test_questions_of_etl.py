"""From MongoDB through the real ETL: every question equals plain Python over the documents that are there."""

import hypothesis
from hypothesis import strategies as st

from quern.analytics.answer import Warehouse
from quern.analytics.duckdb_engine import DuckDbEngine
from tests.app.analytics import plainly
from tests.app.analytics.desk import Desk
from tests.app.analytics.questions import questions
from tests.app.analytics.test_questions import same
from tests.app.analytics.world import FORMS, TENANTS, TIMES, World, world


def keep(desk: Desk, made: World) -> None:
    """Put a random house into MongoDB."""
    desk.db.forms.delete_many({})
    desk.db.form_versions.delete_many({})
    desk.db.tenants.insert_many([{"_id": tenant, "name": tenant, "created": TIMES[0]} for tenant in TENANTS])
    for form in FORMS:
        desk.db.forms.insert_one(
            {"_id": form, "tenant": made.owner(form), "name": "x", "status": "open", "version": 1, "created": TIMES[0]}
        )
    for (form, number), (definition, workflow) in made.versions.items():
        desk.db.form_versions.insert_one(
            {
                "_id": f"{form}:{number}",
                "tenant": made.owner(form),
                "form": form,
                "version": number,
                "name": "x",
                "definition": definition,
                "workflow": workflow,
                "published": TIMES[0],
            }
        )
    desk.db.responses.insert_many(made.responses)
    desk.db.jobs.insert_many(made.jobs)
    desk.db.audit.insert_many(made.audit)


def test_every_question_equals_plain_python_over_mongodb(desk: Desk) -> None:
    made = world(11)
    keep(desk, made)
    desk.run(everything=True)
    stored = World(
        made.versions,
        *(list(desk.db[name].find({"tenant": {"$in": TENANTS}})) for name in ("responses", "jobs", "audit")),
    )
    root = desk.root / "warehouse"
    engine = DuckDbEngine(root, threads=1, memory_megabytes=500)
    warehouse = Warehouse(root, engine, seconds=60)

    @hypothesis.given(data=st.data())
    @hypothesis.settings(max_examples=80, suppress_health_check=list(hypothesis.HealthCheck), database=None)
    def ask(data: st.DataObject) -> None:
        tenant = data.draw(st.sampled_from(TENANTS))
        question = data.draw(questions(made, tenant))
        same(warehouse.answer(question, tenant).table, plainly.answer(question, stored, tenant), question)

    ask()
    engine.close()
