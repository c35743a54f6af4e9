"""A form stands in a page of another origin: its browser may submit, and do nothing else."""

import pytest

from tests.app.api.client import Client

ORIGIN = "https://shop.example"
FIELDS = [{"name": "comment", "type": "long_text", "required": True}]


@pytest.fixture
def form(owner: Client) -> str:
    return owner.form(FIELDS)


def _preflight(client: Client, path: str, method: str) -> tuple[int, dict[str, str]]:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": method}
    answer = client.with_key(None).send("OPTIONS", path, headers=asked)
    return answer.status, dict(answer.headers)


def test_a_page_of_any_origin_may_submit(owner: Client, form: str) -> None:
    status, headers = _preflight(owner, f"/forms/{form}/responses", "POST")
    assert status == 204
    assert headers["access-control-allow-origin"] == "*"
    assert headers["access-control-allow-methods"] == "POST"
    assert "Authorization" in headers["access-control-allow-headers"]
    body = {"answers": {"comment": "from a page"}}
    answer = owner.send("POST", f"/forms/{form}/responses", body, headers={"Origin": ORIGIN})
    assert answer.status == 202
    assert answer.headers["access-control-allow-origin"] == "*"


def test_a_page_can_read_why_it_was_refused(owner: Client, form: str) -> None:
    answer = owner.send("POST", f"/forms/{form}/responses", {"answers": {}}, headers={"Origin": ORIGIN})
    assert answer.status == 422
    assert answer.headers["access-control-allow-origin"] == "*"


@pytest.mark.parametrize("path", ["/forms", "/forms/{form}", "/forms/{form}/export", "/keys", "/audit"])
def test_a_page_of_another_origin_can_do_nothing_else(owner: Client, form: str, path: str) -> None:
    status, headers = _preflight(owner, path.format(form=form), "GET")
    assert status == 405
    assert "access-control-allow-origin" not in headers
    answer = owner.send("GET", path.format(form=form), headers={"Origin": ORIGIN})
    assert "access-control-allow-origin" not in answer.headers


def test_no_answer_ever_asks_for_cookies(owner: Client, form: str) -> None:
    _, headers = _preflight(owner, f"/forms/{form}/responses", "POST")
    assert "access-control-allow-credentials" not in headers
