"""What is installed by default comes from the network, past a firewall that lets root fetch nothing.

`molecule/inventory` gives the other hosts archives instead, so these have a host and sources of their own.
"""

import functools
import hashlib
import http.server
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.host.conftest import ROOT, Place, Played, connect, place_of
from tests.host.test_ways_out import reaches

#: The firewall lets packages be fetched from there and from 443.
_PORT = 80
_SERIES = "7.0"
_PLAY = "tests/host/plays/sources.yml"
#: A release's wheels come from the package index but for llama.cpp's, which is compiled.
_RELEASE = ("llama", "app/release")


@dataclass(frozen=True)
class Source:
    """A web server beside the host: what lies in its folder, the signing key of its packages, whom it answered."""

    url: str
    folder: Path
    fingerprint: str
    answered: list[str]
    stop: Callable[[], None]


class _Handler(http.server.SimpleHTTPRequestHandler):
    answered: list[str]

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        self.answered.append(self.path)

    def log_message(self, format: str, *args: object) -> None:
        """What is not there is apt's and the tests' concern."""


def another(prefix: str) -> Iterator[Place]:
    """A blank host, gone afterwards."""
    name = f"{prefix}{os.getpid()}"
    program = str(ROOT / "molecule/nspawn-host")
    subprocess.run([program, "create", name], check=True, stdout=subprocess.DEVNULL)
    try:
        yield place_of(name)
    finally:
        subprocess.run([program, "destroy", name], check=True)


@pytest.fixture(scope="module")
def blank() -> Iterator[Place]:
    yield from another("b")


@pytest.fixture
def there(blank: Place) -> dict[str, str]:
    return {"QUERN_TEST_HOST": blank.folder.name}


@pytest.fixture(scope="module")
def source(blank: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """A mirror as MongoDB's is built, with the mongod of Quern's cache in it, a package index, and a model."""
    folder = tmp_path_factory.mktemp("source")
    fingerprint = publish(folder, tmp_path_factory.mktemp("work"))
    publish_wheels(folder / "simple")
    (folder / "model.onnx").write_bytes(os.urandom(3 << 20))
    # As an operator names a mirror of the package index.
    pip = blank.folder / "root/etc/pip.conf"
    own = pip.read_text() if pip.exists() else ""
    pip.write_text(f"[global]\nindex-url = http://{blank.gateway}/simple\ntrusted-host = {blank.gateway}\n")
    answered: list[str] = []
    handler = type("Handler", (_Handler,), {"answered": answered})
    server = http.server.ThreadingHTTPServer((blank.gateway, _PORT), functools.partial(handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()

    def stop() -> None:
        if thread.is_alive():
            server.shutdown()
            thread.join()
            server.server_close()
            pip.write_text(own)

    try:
        yield Source(f"http://{blank.gateway}", folder, fingerprint, answered, stop)
    finally:
        stop()


def publish(folder: Path, work: Path) -> str:
    """Make an apt repository with mongod's package, signed by a key of its own; returns the key's fingerprint."""
    if shutil.which("gpg") is None:
        subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", "gnupg"], check=True)
    pool = folder / "apt/pool"
    index = folder / f"apt/dists/bookworm/mongodb-org/{_SERIES}/main/binary-amd64"
    for made in (pool, index):
        made.mkdir(parents=True)
    package = pool / f"mongodb-org-server_{_SERIES}.99_amd64.deb"
    pack(work / "package", package)
    fields = output("dpkg-deb", "-f", package)
    described = f"{fields}\nFilename: pool/{package.name}\nSize: {package.stat().st_size}\nSHA256: {digest(package)}\n"
    (index / "Packages").write_text(described)
    listed = f" {digest(index / 'Packages')} {(index / 'Packages').stat().st_size} main/binary-amd64/Packages"
    (work / "Release").write_text(f"Codename: bookworm\nComponents: main\nArchitectures: amd64\nSHA256:\n{listed}\n")
    home = work / "gnupg"
    home.mkdir(mode=0o700)
    gpg = ("gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback")
    output(*gpg, "--quick-generate-key", "Tests <tests@quern.example>", "rsa2048", "sign", "never")
    output(*gpg, "--clearsign", "--output", index.parents[1] / "InRelease", work / "Release")
    output(*gpg, "--armor", "--output", folder / "server.asc", "--export")
    listing = output(*gpg, "--list-keys", "--with-colons")
    subprocess.run(["gpgconf", "--homedir", str(home), "--kill", "all"], check=False)
    return next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr:"))


def publish_wheels(index: Path) -> None:
    """The pinned wheels, each in its project's folder, whose listing is what pip reads (PEP 503)."""
    archive = output(sys.executable, ROOT / "scripts/collect-wheels")
    with tarfile.open(archive) as packed:
        packed.extractall(index, filter="data")
    for wheel in index.glob("*.whl"):
        project = index / re.sub(r"[-_.]+", "-", wheel.name.split("-")[0]).lower()
        project.mkdir(exist_ok=True)
        wheel.rename(project / wheel.name)


def pack(tree: Path, package: Path) -> None:
    """mongod's package as far as it matters here: program, conffile, unit, and the account that its postinst makes."""
    cached = max((cache() / "mongod").glob("*/mongod"), key=lambda path: path.stat().st_mtime)
    for name in ("DEBIAN", "usr/bin", "etc", "lib/systemd/system"):
        (tree / name).mkdir(parents=True)
    shutil.copy(cached, tree / "usr/bin/mongod")
    (tree / "etc/mongod.conf").write_text("net:\n  bindIp: 0.0.0.0\n")
    (tree / "lib/systemd/system/mongod.service").write_text(
        "[Service]\nExecStart=/usr/bin/mongod -f /etc/mongod.conf\n"
    )
    (tree / "DEBIAN/control").write_text(
        f"Package: mongodb-org-server\nVersion: {_SERIES}.99\nArchitecture: amd64\n"
        "Maintainer: Tests <tests@quern.example>\nDepends: libc6, libcurl4, libssl3, adduser\n"
        "Description: MongoDB's server\n"
    )
    (tree / "DEBIAN/conffiles").write_text("/etc/mongod.conf\n")
    (tree / "DEBIAN/postinst").write_text(
        "#!/bin/sh\nset -e\ngetent group mongodb >/dev/null || addgroup --quiet --system mongodb\n"
        "getent passwd mongodb >/dev/null || adduser --quiet --system --no-create-home --home /var/lib/mongodb"
        " --ingroup mongodb mongodb\n"
    )
    (tree / "DEBIAN/postinst").chmod(0o755)
    output("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, package)


def output(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout.strip()


def digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def cache() -> Path:
    return Path(os.environ.get("QUERN_CACHE") or Path.home() / ".cache" / "quern")


def wanted(source: Source) -> dict[str, object]:
    """mongod, a model and the release's wheels by their addresses, as an operator says it."""
    model = {"model": "tests", "file": "model.onnx", "sha256": digest(source.folder / "model.onnx")}
    return {
        "sources_roles": ["secrets", "resources", "mongodb", "models", *_RELEASE],
        "mongodb_binary": "",
        "mongodb_version": _SERIES,
        "mongodb_apt_repository": f"{source.url}/apt",
        "mongodb_apt_key": f"{source.url}/server.asc",
        "mongodb_apt_key_fingerprint": source.fingerprint,
        "models_files": [{**model, "url": f"{source.url}/model.onnx"}],
        "app_wheels_archive": "",
    }


def test_a_dry_run_on_a_blank_host_foretells_and_fetches_nothing(
    blank: Place, source: Source, there: dict[str, str], play: Callable[..., Played]
) -> None:
    told = play(_PLAY, environment=there, dry=True, **wanted(source))
    assert told.code == 0, told.output
    assert any(task.endswith("Install mongod") for task, _ in told.changed)
    assert any(task.endswith("Fetch the file") for task, _ in told.changed)
    assert any(task.endswith("Fetch the pinned wheels") for task, _ in told.changed)
    assert source.answered == []
    assert not connect(blank, "root").file("/usr/bin/mongod").exists


def test_a_wheel_that_is_not_what_was_pinned_is_not_installed(
    blank: Place, source: Source, there: dict[str, str], play: Callable[..., Played]
) -> None:
    wheel = min(source.folder.glob("simple/*/*.whl"), key=lambda path: path.stat().st_size)
    pinned = wheel.read_bytes()
    wheel.write_bytes(pinned + b"\n")
    refused = play(_PLAY, environment=there, sources_roles=_RELEASE, app_wheels_archive="")
    wheel.write_bytes(pinned)
    assert refused.code != 0
    assert "DO NOT MATCH THE HASHES" in refused.output
    host = connect(blank, "root")
    assert host.check_output("find /opt/quern/environments -name .complete -o -name flask") == ""


def test_mongod_models_and_wheels_are_fetched_by_accounts_that_may(
    blank: Place, source: Source, there: dict[str, str], play: Callable[..., Played]
) -> None:
    installed = play(_PLAY, environment=there, **wanted(source))
    assert installed.code == 0, installed.output
    host = connect(blank, "root")
    # The firewall was there before them.
    assert not reaches(host, "root", blank.gateway, _PORT)
    assert reaches(host, "quern-fetch", blank.gateway, _PORT)
    assert source.answered.count("/server.asc") == 1
    assert source.answered.count("/model.onnx") == 1
    running = host.check_output("readlink /proc/$(systemctl show --value -p MainPID mongod)/exe")
    assert running == "/usr/bin/mongod"
    assert host.check_output("dpkg-query -W -f '${Version}' mongodb-org-server") == f"{_SERIES}.99"
    model = host.file("/opt/quern/models/tests/model.onnx")
    assert (model.user, model.group, model.mode, model.size) == ("root", "root", 0o444, 3 << 20)
    # From the index, and nothing but what is pinned; then installed, and of no use any more.
    wheels = {path.name for path in source.folder.glob("simple/*/*.whl")}
    assert wheels <= {name.rpartition("/")[2] for name in source.answered}
    assert not host.file("/var/lib/quern-fetch/wheels").exists
    release = host.check_output("ls -d /opt/quern/releases/*")
    said = host.check_output("runuser -u quern-operator -- %s/bin/quern --version", release)
    assert said.startswith("quern, version")
    assert host.check_output("find -L %s/environment ! -user root | head", release) == ""


def test_a_second_run_changes_nothing_and_asks_no_network(
    source: Source, there: dict[str, str], play: Callable[..., Played]
) -> None:
    before = list(source.answered)
    variables = wanted(source)
    source.stop()
    again = play(_PLAY, environment=there, **variables)
    assert again.code == 0, again.output
    assert again.changed == []
    assert source.answered == before


@pytest.mark.full
def test_llama_is_compiled_by_an_account_without_a_network(
    blank: Place, there: dict[str, str], play: Callable[..., Played]
) -> None:
    variables = {"sources_roles": ["llama"], "llama_wheels": ""}
    compiled = play(_PLAY, environment=there, **variables)
    assert compiled.code == 0, compiled.output
    host = connect(blank, "root")
    wheels = host.check_output("ls /opt/quern/wheels/llama").split()
    assert [wheel.split("-")[0] for wheel in wheels] == ["diskcache", "llama_cpp_python"]
    built = host.check_output("stat -c %U $(ls -d /opt/quern/build/cache/llama/*)")
    assert built == "quern-build"
    # Nobody else has got a compiler by it.
    assert host.run("runuser -u quern-fetch -- gcc --version").rc != 0
    again = play(_PLAY, environment=there, **variables)
    assert again.code == 0, again.output
    assert again.changed == []
