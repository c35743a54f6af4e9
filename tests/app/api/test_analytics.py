"""Statistics by the API: of one's own responses, and never at the price of the rest."""

from datetime import datetime

from quern.analytics.etl import BusyError, Etl
from tests.app.api.client import Client, House, Json, until

FIELDS: list[Json] = [
    {"name": "sector", "type": "choice", "options": [{"value": "health"}, {"value": "retail"}]},
    {"name": "comment", "type": "long_text"},
]
BY_SECTOR = {"measure": "responses", "dimensions": ["answer.sector"]}


def publish(house: House) -> None:
    """Bring what MongoDB holds into the warehouse."""
    runtime = house.stack.runtime

    def ran() -> bool:
        try:
            Etl(runtime.store.db, runtime.settings.analytics).run(None, everything=True)
        except BusyError:
            # The house's own nightly run has the warehouse.
            return False
        return True

    until(ran)


def submitted(client: Client, house: House) -> str:
    """A form with three responses, published to the warehouse."""
    form = client.form(FIELDS)
    for sector in ("health", "retail", "health"):
        client.submit(form, {"sector": sector, "comment": "parking was hard"})
    client.submit(form, {"comment": "no sector"})
    publish(house)
    return form


def test_a_tenant_asks_about_its_own_responses_and_no_others(house: House, owner: Client) -> None:
    submitted(owner, house)
    stranger = house.client()
    page = owner.call("POST", "/analytics/questions", BY_SECTOR)
    assert page["rows"] == [["health", 2, 2 / 3], ["retail", 1, 1 / 3]]
    assert page["freshness"]["complete_until"].endswith("Z")
    assert page["next_cursor"] is None
    assert stranger.call("POST", "/analytics/questions", {"measure": "responses"})["rows"] == []
    assert stranger.send("POST", "/analytics/questions", BY_SECTOR).status == 422


def test_answers_come_as_files_charts_and_sql_and_say_how_new_they_are(house: House, owner: Client) -> None:
    submitted(owner, house)
    csv = owner.send("POST", "/analytics/files", BY_SECTOR)
    assert csv.headers["content-type"].startswith("text/csv")
    assert csv.content.splitlines()[0] == b'"answer.sector","count","share"'
    chart = owner.send("POST", "/analytics/charts?format=png", BY_SECTOR)
    assert (chart.headers["content-type"], chart.content[:4]) == ("image/png", b"\x89PNG")
    rows = owner.call("POST", "/analytics/sql", {"sql": "SELECT count(*) FROM fact_response"})["rows"]
    assert rows == [[4]]
    refused = owner.send("POST", "/analytics/sql", {"sql": "COPY fact_response TO '/tmp/x.csv'"})
    assert (refused.status, "expected a SELECT" in refused.json()["detail"]) == (422, True)
    for path, body in (
        ("questions", BY_SECTOR),
        *((f"files?format={form}", BY_SECTOR) for form in ("csv", "parquet", "arrow")),
        *((f"charts?format={form}", BY_SECTOR) for form in ("svg", "png")),
        ("sql", {"sql": "SELECT 1"}),
    ):
        stamp = owner.send("POST", f"/analytics/{path}", body).headers["quern-freshness"]
        # The house's own nightly run may publish meanwhile.
        fresh = owner.call("POST", "/analytics/questions", BY_SECTOR)["freshness"]["complete_until"]
        assert datetime.fromisoformat(stamp) <= datetime.fromisoformat(fresh)
    described = owner.call("GET", "//api/openapi.json")["paths"]["/api/v1/analytics/files"]["post"]
    assert "Quern-Freshness" in described["responses"]["200"]["headers"]


def test_pages_follow_each_other(house: House, owner: Client) -> None:
    submitted(owner, house)
    terms = {"measure": "terms"}
    first = owner.call("POST", "/analytics/questions?limit=2", terms)
    rest = owner.call("POST", f"/analytics/questions?limit=1000&cursor={first['next_cursor']}", terms)
    assert len(first["rows"]) == 2
    assert len(first["rows"]) + len(rest["rows"]) == first["total_rows"] > 2
    assert owner.send("POST", f"/analytics/questions?cursor={first['next_cursor']}", BY_SECTOR).pointers == ["?cursor"]


def test_a_wrong_question_is_refused_with_what_was_expected(owner: Client) -> None:
    answer = owner.send("POST", "/analytics/questions", {"measure": "responses", "dimensions": ["colour"]})
    assert answer.status == 422
    assert "no such dimension" in answer.json()["errors"][0]["detail"]


def test_without_the_service_questions_are_refused_and_everything_else_works(house: House, owner: Client) -> None:
    form = owner.form(FIELDS)
    service = house.stack.processes["analytics"]
    service.stop()
    try:
        away = owner.send("POST", "/analytics/questions", {"measure": "responses"})
        assert (away.status, away.json()["type"]) == (503, "urn:quern:problem:away")
        assert int(away.headers["retry-after"]) >= 1
        owner.submit(form, {"sector": "health"})
    finally:
        service.start()
    publish(house)
    until(lambda: owner.send("POST", "/analytics/questions", {"measure": "responses"}).status == 200)
