"""The role's nginx with ModSecurity and the Core Rule Set, as the role renders it, in a folder of its own."""

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from quern.embedded.certificate import ServerCertificate, issue_certificate
from quern.embedded.ports import free_port
from quern.embedded.process import ChildProcess
from quern.observe.nginxlog import Finding, finding_of
from tests.waf.arrangement import ROLE, arrange, role_values
from tests.waf.debian import unpacked

PACKAGES = (
    *("nginx", "libnginx-mod-http-modsecurity", "libmodsecurity3", "modsecurity-crs"),
    # What the engine is linked with, and a machine without it may lack.
    *("libfuzzy2", "libgeoip1", "liblua5.3-0", "libmaxminddb0", "libyajl2", "libcurl3-gnutls"),
)
CONFIGURATION = (
    "main.conf",
    "engine.conf",
    "setup.conf",
    "exclusions.conf",
    "screens.conf",
    "own.conf",
    "letters.map",
)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([ROLE / "templates", ROLE.parents[1] / "templates"]),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # noqa: S701 - configuration, not HTML
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["to_json"] = json.dumps
    return environment


def _instances(addresses: Sequence[str]) -> dict[str, str]:
    """What makes `addresses`, two at most, the only instances."""
    limits = "max_fails=1 fail_timeout=2s;"
    servers = [f"server {address} {limits}" for address in addresses] + [""]
    return {f"server unix:/run/quern-api/{number}.sock {limits}": servers[number - 1] for number in (1, 2)}


class FrontDoor(ChildProcess):
    """Listens by TLS on a loopback port, in front of UNIX sockets in `directory` (api-1.sock, api-2.sock, events.sock).

    The configuration is the role's, rendered with the role's defaults and `variables`; only its paths and ports are
    other ones. `api` are the addresses of the instances, where these are no sockets.
    """

    def __init__(self, directory: Path, *, api: Sequence[str] = (), **variables: Any) -> None:
        self.directory, self.port, self.plain_port = directory, free_port(), free_port()
        root = unpacked("front-door", PACKAGES)
        libraries = root / "usr" / "lib" / f"{os.uname().machine}-linux-gnu"
        for folder in ("tls", "state", "cache", "log", "modsecurity", "nginx"):
            (directory / folder).mkdir(parents=True, exist_ok=True)
        self.certificate: ServerCertificate = issue_certificate(directory / "tls", ("127.0.0.1",))
        moved = {
            "listen 80 default_server": f"listen 127.0.0.1:{self.plain_port} default_server",
            "listen [::]:80 default_server": "# no second address",
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "listen [::]:443 ssl http2 default_server backlog=2048": "# no second address",
            "listen 127.0.0.1:9460": f"listen unix:{directory}/metrics.sock",
            "/etc/quern/tls/server.pem": str(self.certificate.chain),
            "/etc/quern/tls/server.key": str(self.certificate.key),
            **(_instances(api) if api else {}),
            "/run/quern-api/1.sock": f"{directory}/api-1.sock",
            "/run/quern-api/2.sock": f"{directory}/api-2.sock",
            "/run/quern-events.sock": f"{directory}/events.sock",
            "/run/": f"{directory}/",
            "/var/lib/nginx/": f"{directory}/state/",
            "/var/cache/nginx/": f"{directory}/cache/",
            "/var/log/nginx/": f"{directory}/log/",
            "/etc/nginx/modsecurity/": f"{directory}/modsecurity/",
            "/usr/lib/nginx/modules/": f"{root}/usr/lib/nginx/modules/",
            "pid /": "daemon off; pid /",
            "include mime.types;": "",
        }
        values = {**role_values(), "nginx_domain": "quern.test", **variables}
        templates = _environment()

        def render(path: str, target: Path) -> None:
            text = templates.get_template(f"{path}.j2").render(values)
            for there, here in moved.items():
                text = text.replace(there, here)
            target.write_text(text)

        for name in CONFIGURATION:
            render(f"etc/nginx/modsecurity/{name}", directory / "modsecurity" / name)
        arrange(directory / "modsecurity", root, values)
        configuration = directory / "nginx.conf"
        render("etc/nginx/nginx.conf", configuration)
        if os.geteuid() == 0:
            # Workers of another account could not reach the sockets.
            configuration.write_text("user root;\n" + configuration.read_text())
        # The second is the unit's.
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(libraries),
            "GLIBC_TUNABLES": "glibc.malloc.tcache_count=2000",
        }
        command = [str(root / "usr/sbin/nginx"), "-p", str(directory), "-e", "stderr", "-c", str(configuration)]
        checked = subprocess.run([*command, "-q", "-t"], env=environment, capture_output=True, text=True, check=False)
        if checked.returncode:
            raise RuntimeError(f"nginx refuses the role's configuration:\n{checked.stderr}")
        super().__init__(
            "nginx",
            command,
            environment=environment,
            log=directory / "nginx.log",
            ready=self._accepts,
            death_signal=signal.SIGTERM,
        )

    def _accepts(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2):
                return True
        except OSError:
            return False

    def findings(self, request_id: str) -> list[Finding]:
        """What the rules found in one request, in order."""
        found = [finding_of(line) for line in self._said() if f'[unique_id "{request_id}"]' in line]
        return [finding for finding in found if finding is not None]

    def denials(self) -> dict[str, int]:
        """The requests that a rule refused, by their identifiers, with the status that it asked for."""
        pattern = re.compile(r'ModSecurity: Access denied with code (\d+).*\[unique_id "([^"]+)"\]')
        return {found[2]: int(found[1]) for line in self._said() if (found := pattern.search(line))}

    def lost_workers(self) -> list[str]:
        """What the master said about processes that ended by a signal, which others follow."""
        log = (self.directory / "nginx.log").read_text(errors="replace")
        return [line for line in log.splitlines() if " exited on signal " in line]

    def _said(self) -> list[str]:
        path = self.directory / "log" / "waf.log"
        return path.read_text(errors="replace").splitlines() if path.exists() else []
