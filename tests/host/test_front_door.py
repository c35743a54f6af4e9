"""nginx: TLS as promised, nothing of the operator's from outside, problem documents for refusals."""

import json
import resource
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from testinfra.host import Host

from tests.host.conftest import Place, Played

_PLAY = "tests/host/plays/certificate.yml"


def get(url: str, trusting: ssl.SSLContext, **headers: str) -> tuple[int, dict[str, str], bytes]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=headers), context=trusting, timeout=30
        ) as answer:
            return answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, {k.lower(): v for k, v in error.headers.items()}, error.read()


@pytest.mark.parametrize(
    ("version", "accepted"),
    [(ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True), (ssl.TLSVersion.TLSv1_3, True)],
)
def test_old_tls_is_refused(place: Place, host: Host, version: ssl.TLSVersion, accepted: bool) -> None:
    context = ssl.create_default_context(cadata=host.file("/etc/quern/tls/authority.pem").content_string)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    try:
        with (
            socket.create_connection((place.address, 443), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname=place.address) as wrapped,
        ):
            assert wrapped.version() == version.name.replace("_", ".")
    except ssl.SSLError:
        assert not accepted
    else:
        assert accepted


def test_http_leads_to_tls(place: Place) -> None:
    with socket.create_connection((place.address, 80), timeout=20) as plain:
        plain.sendall(b"GET /x HTTP/1.1\r\nHost: quern.test\r\nConnection: close\r\n\r\n")
        answer = plain.recv(4096).decode()
    assert answer.startswith("HTTP/1.1 308 ")
    assert "\r\nLocation: https://quern.test/x\r\n" in answer


def test_browsers_are_told_to_insist_on_tls(place: Place, trusting: ssl.SSLContext) -> None:
    status, headers, _ = get(f"{place.url}/healthz", trusting)
    assert status == 200
    assert headers["strict-transport-security"] == "max-age=31536000"
    assert headers["server"] == "nginx"


@pytest.mark.parametrize("path", ["/metrics", "/readyz"])
def test_what_is_the_operators_is_not_served_outside(place: Place, trusting: ssl.SSLContext, path: str) -> None:
    assert get(place.url + path, trusting)[0] == 404


def test_a_large_body_is_refused_with_a_problem_document(place: Place, trusting: ssl.SSLContext) -> None:
    request = urllib.request.Request(f"{place.url}/api/v1/forms", b"x" * (3 << 20), method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, context=trusting, timeout=30)
    assert refused.value.code == 413
    assert refused.value.headers["Content-Type"] == "application/problem+json"
    assert json.load(refused.value)["status"] == 413


def answering(address: str) -> list[int]:
    """Every TCP port that lets somebody in."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    at_once = min(8000, most - 200)
    found = []
    for first in range(1, 65_536, at_once):
        ways = {port: socket.socket() for port in range(first, min(first + at_once, 65_536))}
        for port, way in ways.items():
            way.setblocking(False)
            way.connect_ex((address, port))
        # The firewall answers nobody else; what gets lost is asked for again after a second.
        time.sleep(2.5)
        for port, way in ways.items():
            with way, suppress(OSError):
                way.getpeername()
                found.append(port)
    return found


def test_nothing_but_the_promised_ports_answers(place: Place, expected: dict[str, Any]) -> None:
    assert answering(place.address) == expected["open_ports"]


def test_an_attack_is_refused_and_prose_passes(place: Place, trusting: ssl.SSLContext, tenant_key: str) -> None:
    attack = get(f"{place.url}/api/v1/forms?name=%27%20union%20select%20a%20from%20b--", trusting)
    assert attack[0] == 403
    assert json.loads(attack[2])["title"] == "Forbidden"
    status, _, _ = get(f"{place.url}/api/v1/forms", trusting, Authorization=f"Bearer {tenant_key}")
    assert status == 200


def test_the_documentation_comes_from_the_cache(place: Place, trusting: ssl.SSLContext) -> None:
    found = [get(f"{place.url}/api/openapi.json", trusting)[1]["x-cache"] for _ in range(2)]
    assert found[1] == "HIT"


def test_settings_that_nginx_would_not_start_with_fail_every_run_and_it_goes_on_with_the_old_ones(
    place: Place, trusting: ssl.SSLContext, play: Callable[..., Played]
) -> None:
    try:
        for _ in range(2):
            refused = play(_PLAY, nginx_waf_rules=["SecRuleThatNobodyKnows On"])
            assert refused.code != 0
            assert "[emerg]" in refused.output
            assert get(f"{place.url}/healthz", trusting)[0] == 200
    finally:
        mended = play(_PLAY)
    assert mended.code == 0, mended.output
    assert play(_PLAY).changed == []
