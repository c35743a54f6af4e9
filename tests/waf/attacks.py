"""Attacks: our own, and the Core Rule Set's regression cases in the shape of this service's requests."""

import base64
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote

import yaml

RESPONSES = "/api/v1/forms/frm_0123456789ABCDEFGHJKMNPQRS/responses"


@dataclass(frozen=True)
class Case:
    """One request, as bytes on the wire."""

    name: str
    kind: str
    request: bytes


def request(method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """An HTTP/1.1 request for one connection. A body is JSON unless the headers say otherwise."""
    given = {name.lower() for name in headers or {}}
    lines = [f"{method} {target} HTTP/1.1"]
    defaults = {"Host": "quern.test", "User-Agent": "quern-tests/1", "Accept": "*/*", "Connection": "close"}
    if body is not None:
        defaults |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines += [f"{name}: {value}" for name, value in defaults.items() if name.lower() not in given]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("utf-8", "surrogateescape") + (body or b"")


def answer(text: str, **headers: str) -> bytes:
    """A response to a form, with one answer in words."""
    return request("POST", RESPONSES, json.dumps({"answers": {"comment": text}}).encode(), headers)


def own() -> Iterator[Case]:
    """Each payload of corpus/attacks.yml as an answer and as a query parameter; then what needs another shape."""
    corpus = yaml.safe_load((Path(__file__).parent / "corpus" / "attacks.yml").read_text())
    for kind, payloads in corpus.items():
        for number, payload in enumerate(payloads):
            yield Case(f"{kind}-{number}-body", kind, answer(payload))
            yield Case(f"{kind}-{number}-query", kind, request("GET", f"/api/v1/forms?name={quote(payload)}"))
    yield from _structures()
    yield from _paths()
    yield from _malformed()
    yield from _oversized()


def _structures() -> Iterator[Case]:
    """Operators as members of the body and as names of parameters."""
    for operator in ("ne", "gt", "regex", "where", "in", "nin", "exists", "expr", "function", "or", "lookup", "set"):
        body = json.dumps({"answers": {"comment": {f"${operator}": "x"}}}).encode()
        yield Case(f"nosql-member-{operator}", "nosql", request("POST", RESPONSES, body))
        listed = json.dumps({"answers": {"list": [{"a": 1}, {f"${operator}": [1]}]}}).encode()
        yield Case(f"nosql-deep-{operator}", "nosql", request("POST", RESPONSES, listed))
        yield Case(f"nosql-name-{operator}", "nosql", request("GET", f"/api/v1/forms?name[%24{operator}]=1"))


def _paths() -> Iterator[Case]:
    for number, path in enumerate(
        (
            "/../../../etc/passwd",
            "/api/../../../../etc/passwd",
            "/api/docs/..%2f..%2f..%2fetc%2fpasswd",
            "/api/docs/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
            "/api/docs/..%5c..%5c..%5cwindows%5cwin.ini",
            "/.git/config",
            "/.env",
            "/wp-config.php.bak",
            "/api/v1/forms/..%00/etc/passwd",
            "/cgi-bin/..%c0%af..%c0%afetc/passwd",
        )
    ):
        yield Case(f"traversal-path-{number}", "traversal", request("GET", path))


def _malformed() -> Iterator[Case]:
    bodies = (
        b"{",
        b"{]",
        b'{"answers": }',
        b'{"answers": {"a": "\xff\xfe"}}',
        b'{"a": NaN}',
        b"answers=1&x=2",
        b"<?xml version='1.0'?><!DOCTYPE x [<!ENTITY e SYSTEM 'file:///etc/passwd'>]><x>&e;</x>",
        b'{"a":' * 2000 + b"1" + b"}" * 2000,
        b"[" * 100_000,
        b'{"a": "unterminated',
        b'{"a": 1} {"b": 2}',
        b'{"a": 01x}',
    )
    for number, body in enumerate(bodies):
        yield Case(f"malformed-body-{number}", "malformed", request("POST", RESPONSES, body))
    typed = (
        ("application/x-www-form-urlencoded", b"a=1"),
        ("text/xml", b"<a/>"),
        ("multipart/form-data; boundary=x", b"--x\r\n\r\n\r\n--x--"),
        ("application/octet-stream", b"\x00\x01"),
    )
    for number, (kind, body) in enumerate(typed):
        yield Case(f"malformed-type-{number}", "malformed", request("POST", RESPONSES, body, {"Content-Type": kind}))
    end = b"\r\nConnection: close\r\n\r\n"
    lines = (
        b"GET / HTTP/9.9\r\nHost: quern.test\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"TRACE / HTTP/1.1\r\nHost: quern.test" + end,
        b"CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example" + end,
        b"PROPFIND / HTTP/1.1\r\nHost: quern.test" + end,
        b"POST / HTTP/1.1\r\nHost: quern.test\r\nContent-Length: -1" + end,
        b"POST / HTTP/1.1\r\nHost: quern.test\r\nContent-Length: 3\r\nTransfer-Encoding: chunked" + end + b"0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b" + end,
    )
    for number, line in enumerate(lines):
        yield Case(f"malformed-line-{number}", "malformed", line)
    packed = request("POST", RESPONSES, b"\x1f\x8b", {"Content-Encoding": "gzip"})
    yield Case("malformed-packed", "malformed", packed)


def _oversized() -> Iterator[Case]:
    yield Case("oversized-body", "oversized", request("POST", RESPONSES, b'{"a": "' + b"x" * (3 << 20) + b'"}'))
    yield Case("oversized-target", "oversized", request("GET", "/api/v1/forms?name=" + "x" * 40_000))
    yield Case("oversized-header", "oversized", request("GET", "/api/v1/forms", headers={"X-Long": "x" * 70_000}))
    many = json.dumps({"answers": {f"f{number}": 1 for number in range(20_000)}}).encode()
    yield Case("oversized-members", "oversized", request("POST", RESPONSES, many))
    claimed = request("POST", RESPONSES, b"{}", {"Content-Length": "999999999999"})
    yield Case("oversized-claimed", "oversized", claimed)
    query = "&".join(f"a{number}=1" for number in range(4000))
    yield Case("oversized-parameters", "oversized", request("GET", f"/api/v1/forms?{query}"))


def rule_set(source: Path, rules: Path) -> Iterator[Case]:
    """The regression cases of the rules that refuse by themselves at paranoia level 1.

    A body in a form's encoding is sent as the JSON that this service takes, each field an answer, so that no case is
    refused for its media type alone; bodies of other types are left out.
    """
    refusing = _refusing(rules)
    for path in sorted((source / "tests" / "regression" / "tests").rglob("*.yaml")):
        for test in yaml.safe_load(path.read_text())["tests"]:
            for number, item in enumerate(test["stages"]):
                stage = item["stage"]
                wanted = re.search(r'id "(\d+)"', str(stage["output"].get("log_contains", "")))
                if wanted is None or wanted[1] not in refusing:
                    continue
                # What is about the protocol is sent as it is.
                if (sent := _translated(stage["input"], as_it_is=wanted[1].startswith("92"))) is not None:
                    yield Case(f"{test['test_title']}.{number}", f"crs-{wanted[1][:3]}", sent)


def _refusing(rules: Path) -> frozenset[str]:
    """Identifiers of the rules of level 1 whose finding is critical."""
    found = set()
    for path in rules.glob("REQUEST-9*.conf"):
        for rule in re.split(r"\n(?=SecRule|SecAction)", re.sub(r"(?m)^#.*\n", "", path.read_text())):
            identity = re.search(r"id:(\d{6})", rule)
            if identity and "paranoia-level/1" in rule and re.search(r"severity:'?CRITICAL", rule):
                found.add(identity[1])
    return frozenset(found)


def _translated(given: dict[str, Any], as_it_is: bool) -> bytes | None:
    if encoded := given.get("encoded_request"):
        return base64.b64decode(encoded)
    headers = {str(name): str(value) for name, value in (given.get("headers") or {}).items()}
    kept = {
        name: value
        for name, value in headers.items()
        if name.lower() not in {"host", "content-length", "connection", "content-type"}
    }
    kind = next((value for name, value in headers.items() if name.lower() == "content-type"), "")
    data = given.get("data")
    if isinstance(data, list):
        data = "\r\n".join(map(str, data))
    method, target, body = str(given.get("method", "GET")), str(given.get("uri", "/")), None
    if as_it_is:
        body, kept = str(data or "").encode(), {**kept, "Content-Type": kind} if kind else kept
    elif data not in (None, ""):
        if kind.startswith("application/json"):
            body = str(data).encode()
        elif kind in ("", "text/plain") or kind.startswith("application/x-www-form-urlencoded"):
            fields = parse_qsl(str(data), keep_blank_values=True) or [("text", str(data))]
            body = json.dumps({"answers": dict(fields)}).encode()
            method, target = "POST", RESPONSES
        else:
            return None
    if re.search(r"[\x00-\x20\x7f]", target):
        # The case means what is between the blanks; a request line has none.
        target = quote(target, safe="%/:?#[]@!$&'()*+,;=\"<>\\^`{|}~")
    return request(method, target, body, kept)
