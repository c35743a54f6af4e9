"""The module that fetches files: as another account, whole, and only what they are said to be."""

import hashlib
import http.server
import json
import os
import pwd
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.roles.conftest import served
from tests.roles.rendering import ROLES

MODULE = ROLES / "fetch/library/fetched_file.py"
CONTENT = b"model" * 1000
#: A key made for this test (gpg --quick-generate-key tests@quern.example ed25519 sign never), and its fingerprint.
KEY = Path(__file__).with_name("signing-key.asc").read_bytes()
FINGERPRINT = "DD066ED6AFCA06DDA719CDDF96C1140A3AD55739"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may act as another account")


class _Handler(http.server.BaseHTTPRequestHandler):
    asked: list[str]
    askers: list[int]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.askers.append(owner(self.client_address[1]))
        content = {"/model": CONTENT, "/key": KEY, "/keys": KEY + KEY}.get(self.path)
        self.send_response(200 if content else 404)
        self.end_headers()
        self.wfile.write(content or b"")

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


def owner(port: int) -> int:
    """The user of the socket with that port, as the kernel lists them (proc(5), /proc/net/tcp)."""
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return next(int(row[7]) for row in rows if row[1].endswith(f":{port:04X}"))


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def askers() -> list[int]:
    """The users whose processes asked."""
    return []


@pytest.fixture
def server(asked: list[str], askers: list[int]) -> Iterator[str]:
    handler = type("Handler", (_Handler,), {"asked": asked, "askers": askers})
    with served(handler) as address:
        yield address


def run(check: bool = False, **options: Any) -> dict[str, Any]:
    """What the module answers, run as Ansible runs it."""
    given = {"account": "nobody", "mode": "0444", **options, "_ansible_check_mode": check}
    text = json.dumps({"ANSIBLE_MODULE_ARGS": given})
    environment = {"PATH": os.environ["PATH"], "no_proxy": "127.0.0.1"}
    command = [sys.executable, str(MODULE)]
    done = subprocess.run(
        command, input=text, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


SUM = hashlib.sha256(CONTENT).hexdigest()


def test_a_file_is_fetched_once(server: str, asked: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model"
    assert run(url=f"{server}/model", path=str(path), sha256=SUM)["changed"]
    assert path.read_bytes() == CONTENT
    assert path.stat().st_mode & 0o777 == 0o444
    assert not run(url=f"{server}/model", path=str(path), sha256=SUM)["changed"]
    assert asked == ["/model"]


def test_a_dry_run_asks_nobody(server: str, asked: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model"
    assert run(check=True, url=f"{server}/model", path=str(path), sha256=SUM)["changed"]
    assert asked == []
    assert not path.exists()


def test_what_is_another_file_is_not_put_in_place(server: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_text("the former one")
    refused = run(url=f"{server}/key", path=str(path), sha256=SUM)
    assert refused["failed"]
    assert f"expected SHA-256 {SUM}, found {hashlib.sha256(KEY).hexdigest()}" in refused["msg"]
    assert path.read_text() == "the former one"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_not_there_is_said(server: str, tmp_path: Path) -> None:
    refused = run(url=f"{server}/nothing", path=str(tmp_path / "model"), sha256=SUM)
    assert "HTTP Error 404" in refused["msg"]
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_fetched_again(server: str, asked: list[str], tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(CONTENT[:-1])
    assert run(url=f"{server}/model", path=str(path), sha256=SUM)["changed"]
    assert path.read_bytes() == CONTENT


def test_it_is_another_account_that_fetches(server: str, askers: list[int], tmp_path: Path) -> None:
    assert run(url=f"{server}/model", path=str(tmp_path / "model"), sha256=SUM)["changed"]
    assert askers == [pwd.getpwnam("nobody").pw_uid]
    assert (tmp_path / "model").stat().st_uid == 0


def test_only_the_key_of_that_fingerprint_is_taken(server: str, tmp_path: Path) -> None:
    path = tmp_path / "key.asc"
    assert run(url=f"{server}/key", path=str(path), openpgp_fingerprint=FINGERPRINT)["changed"]
    assert not run(url=f"{server}/key", path=str(path), openpgp_fingerprint=FINGERPRINT)["changed"]
    refused = run(url=f"{server}/key", path=str(tmp_path / "other"), openpgp_fingerprint="0" * 40)
    assert f"expected the OpenPGP key {'0' * 40} alone, found ['{FINGERPRINT}']" in refused["msg"]
    assert list(tmp_path.iterdir()) == [path]


def test_a_second_key_in_the_file_is_refused(server: str, tmp_path: Path) -> None:
    """Whoever signs with it would be trusted as well."""
    refused = run(url=f"{server}/keys", path=str(tmp_path / "key.asc"), openpgp_fingerprint=FINGERPRINT)
    assert "alone" in refused["msg"]
    assert list(tmp_path.iterdir()) == []
