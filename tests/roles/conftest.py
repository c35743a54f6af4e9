"""The rendered folders, and the programs that judge them: Debian's own, unpacked into the cache."""

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "app"))

from tests.roles.rendering import VARIANTS, render
from tests.waf.debian import unpacked

PACKAGES = (
    *("aide", "apparmor", "chrony", "logrotate", "nftables", "openssh-server", "prometheus", "prometheus-alertmanager"),
    *("redis-server", "redis-tools", "rsyslog", "rsyslog-gnutls", "sudo"),
    *("nginx", "nginx-common", "libnginx-mod-http-modsecurity", "libmodsecurity3", "modsecurity-crs"),
    # What they are linked with, and a machine without them may lack.
    *(
        "libaudit1",
        "libestr0",
        "libext2fs2",
        "libfastjson4",
        "libfuzzy2",
        "libgeoip1",
        "libgnutls30",
        "libhiredis0.14",
        "libjansson4",
    ),
    *(
        "libjemalloc2",
        "liblua5.1-0",
        "liblua5.3-0",
        "liblzf1",
        "libatomic1",
        "libmaxminddb0",
        "libmhash2",
        "libnftables1",
    ),
    *(
        "libedit2",
        "libpopt0",
        "libwrap0",
        "libyajl2",
        "libcurl3-gnutls",
        "libseccomp2",
        "libnettle8",
    ),
    *(
        "libnftnl11",
        "libxtables12",
        "libbsd0",
        "libmd0",
        "lua-cjson",
        "lua-bitop",
    ),
)

Judge = Callable[..., str]


@pytest.fixture(scope="session", params=list(VARIANTS))
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the roles write to a host, at the same paths."""
    folder = tmp_path_factory.mktemp("host")
    for template, place, text in render(VARIANTS[request.param]):
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        assert not target.exists(), f"{template} and another template write /{place}"
        target.write_text(text)
    return folder


@pytest.fixture(scope="session")
def programs() -> Path:
    return unpacked("role-judges", PACKAGES)


@pytest.fixture(scope="session")
def judge(programs: Path) -> Judge:
    """Run one of the programs; it must be content. `judge("usr/sbin/nft", "--check", …)` returns what it said."""
    libraries = [
        folder
        for name in (f"{os.uname().machine}-linux-gnu", "sudo", "x86_64-linux-gnu/rsyslog")
        for prefix in ("usr/lib", "lib", "usr/libexec")
        if (folder := programs / prefix / name).is_dir()
    ]

    def run(program: str, *arguments: str | Path, before: Sequence[str] = (), may_fail: bool = False) -> str:
        environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}
        command = [*before, str(programs / program), *map(str, arguments)]
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=300
        )
        said = done.stdout + done.stderr
        assert may_fail or done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{said}"
        return said

    return run


@contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on loopback, each request in a thread of its own."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()
