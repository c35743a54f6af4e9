"""The operator's own certificate: served as it is given, changed by the next run, and gone with the setting."""

import ssl
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from testinfra.host import Host

from quern.embedded.certificate import issue_certificate
from tests.host.conftest import Place, Played
from tests.host.test_acme import served

pytestmark = pytest.mark.full

_PLAY = "tests/host/plays/certificate.yml"


def test_the_operators_files_are_served_and_exchanged(
    host: Host, place: Place, play: Callable[..., Played], tmp_path: Path
) -> None:
    try:
        serials = []
        for name in ("first", "second"):
            made = issue_certificate(tmp_path / name, ("quern.test", place.address))
            done = play(
                _PLAY, nginx_tls="files", nginx_certificate=str(made.chain), nginx_certificate_key=str(made.key)
            )
            assert done.code == 0, done.output[-3000:]
            context = ssl.create_default_context(cafile=str(made.authority))
            with urllib.request.urlopen(f"{place.url}/healthz", timeout=60, context=context) as answer:
                assert answer.status == 200
            serials.append(served(place)["serial"])
        assert serials[0] != serials[1]
        key = host.file("/etc/quern/tls/server.key")
        assert (key.user, key.group, key.mode) == ("root", "nginx", 0o640)
        again = play(_PLAY, nginx_tls="files", nginx_certificate=str(made.chain), nginx_certificate_key=str(made.key))
        assert again.changed == []
    finally:
        back = play(_PLAY, nginx_tls="local")
    assert back.code == 0, back.output[-3000:]
    assert "Quern authority" in served(place)["issuer"]
