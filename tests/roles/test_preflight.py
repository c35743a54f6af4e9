"""The play that stands before everything refuses what cannot work, and says what to do (playbooks/preflight.yml).

It runs here against this machine, told that it is another host where the host is what is wrong. It changes nothing.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.roles.rendering import ROOT

#: A blank Debian 12 host, as the facts say it; what the play asks the host itself, this machine answers.
HOST: dict[str, Any] = {
    "distribution": "Debian",
    "distribution_version": "12.9",
    "distribution_major_version": "12",
    "architecture": "x86_64",
    "memtotal_mb": 3934,
    "processor_vcpus": 2,
}
CLICKHOUSE = {"quern-analytics.quern_clickhouse_password": "from Vault"}
MAIL = {"host": "127.0.0.1", "from_address": "forms@example.org"}

#: What is given beside the good values, what is said of the host, and what the refusal names.
REFUSALS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "a value of another type": ({"app_releases_kept": "three"}, {}, ["app_releases_kept", "int"]),
    "a choice that is none": ({"nginx_waf": "on"}, {}, ["nginx_waf", "block, detect, none"]),
    "a model without a checksum": ({"models_files": [{"model": "m", "file": "f"}]}, {}, ["sha256"]),
    "a name that is none": ({"nginx_domain": "Forms Example"}, {}, ["nginx_domain", "lower case"]),
    "ACME without an address": ({"nginx_tls": "acme"}, {}, ["nginx_acme_email"]),
    "a certificate that is not there": ({"nginx_tls": "files"}, {}, ["nginx_certificate_key"]),
    "an authority that is not there": ({"app_private_authority": "/nowhere.pem"}, {}, ["app_private_authority"]),
    "forwarding to nowhere": ({"monitoring_forward": "rsyslog"}, {}, ["monitoring_forward_host"]),
    "mail from nobody": ({"app_mail": {"host": "127.0.0.1"}}, {}, ["app_mail", "from_address"]),
    "mail by a word that nobody knows": ({"app_mail": {**MAIL, "pass": "x"}}, {}, ["app_mail", "secrets_given"]),
    "a relay's user without a password": ({"app_mail": {**MAIL, "username": "u"}}, {}, ["quern.quern_mail_password"]),
    "alerts by a relay that nobody named": (
        {"app_mail": {}},
        {},
        ["app_mail", "the alerts for monitoring_mail_to, ops@example.org", "or leave monitoring_mail_to out"],
    ),
    "alerts by TLS at a port where Alertmanager knows none": (
        {"app_mail": {**MAIL, "tls": "implicit"}},
        {},
        ["monitoring_mail_to", "port 465", "found tls implicit with port 587"],
    ),
    "mail by a port that is closed": ({"app_mail": {**MAIL, "port": 2525}}, {}, ["firewall_mail_ports", "2525"]),
    "ClickHouse by its name": (
        {"app_clickhouse_url": "http://clickhouse:8123", "secrets_given": CLICKHOUSE},
        {},
        ["app_clickhouse_url", "by its address"],
    ),
    "ClickHouse at no address": (
        {"app_clickhouse_url": "http://10.0.0.777:8123", "secrets_given": CLICKHOUSE},
        {},
        ["app_clickhouse_url", "10.0.0.777"],
    ),
    "ClickHouse without a password": (
        {"app_clickhouse_url": "http://10.0.0.7:8123"},
        {},
        ["quern-analytics.quern_clickhouse_password"],
    ),
    "a network that is none": ({"firewall_webhook_networks": ["10.0.0.0/99"]}, {}, ["10.0.0.0/99"]),
    "two ports for SSH": ({"base_ssh_port": 2222, "firewall_ssh_port": 22}, {}, ["base_ssh_port", "2222"]),
    "a port that Ansible does not come by": ({"base_ssh_port": 2222}, {}, ["ansible_port", "2222"]),
    "the placeholder of a key": (
        {"base_ssh_authorized_keys": ["ssh-ed25519 AAAAC3Nza...change-me operator@example.org"]},
        {},
        ["base_ssh_authorized_keys", "change-me", "ssh-keygen -t ed25519"],
    ),
    "another Debian": (
        {},
        {"distribution_major_version": "13", "distribution_version": "13.1"},
        ["13.1", "served when"],
    ),
    "another processor": ({}, {"architecture": "aarch64"}, ["x86_64", "aarch64"]),
    "a processor without AVX": ({"preflight_cpuinfo": "{{ models_folder }}/../cpuinfo"}, {}, ["AVX", "hypervisor"]),
    "too little memory": ({}, {"memtotal_mb": 1970}, ["MB of memory", "1970", "models_files"]),
    "caches larger than the memory": ({"mongodb_cache_gigabytes": 3}, {}, ["3072", "mongodb_cache_gigabytes"]),
    "a model larger than AI's share": ({"resources_ai_memory_percent": 6}, {}, ["resources_ai_memory_percent"]),
    "too small a disk": ({"mongodb_oplog_megabytes": 10**9}, {}, ["MB free below /var and /opt"]),
    "a clock that is wrong": ({}, {"date_time": {"epoch": "1700000000", "iso8601": "then"}}, ["five minutes", "then"]),
    "a time zone that is none": ({"base_timezone": "Mars/Olympus"}, {}, ["base_timezone", "Mars/Olympus"]),
    "a network that shuts the operator out": (
        {"firewall_ssh_networks": ["198.51.100.0/24"]},
        {},
        ["firewall_ssh_networks", "192.0.2.7"],
    ),
    "a port that another holds": ({"TAKEN": "443"}, {}, ["ports 80 and 443", "python3"]),
    "package sources that have no address": (
        {"bundle_archive": ""},
        {},
        ["no address for", "packages.invalid", "/etc/resolv.conf"],
    ),
    "a relay that has no address": (
        {"app_mail": {**MAIL, "host": "mail.invalid"}},
        {},
        ["no address for", "mail.invalid"],
    ),
}

#: Beside the play, in its network: nobody, or one that holds a port; then the play.
_LISTENER = """
if [ -n "$TAKEN" ]; then
    python3 -c 'import socket, time; taken = socket.create_server(("", '"$TAKEN"')); time.sleep(600)' &
fi
status=0
"$@" || status=$?
[ -z "$TAKEN" ] || kill $!
exit $status
"""

Preflight = Callable[[dict[str, Any], dict[str, Any]], subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A public key of each kind that SSH takes."""
    folder = tmp_path_factory.mktemp("keys")
    kinds = [("ed25519", "256"), ("ecdsa", "256"), ("ecdsa", "384"), ("ecdsa", "521"), ("rsa", "3072")]
    for number, (kind, bits) in enumerate(kinds):
        path = folder / str(number)
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-b", bits, "-N", "", "-f", str(path)], check=True)
    return [path.read_text().strip() for path in sorted(folder.glob("*.pub"))]


@pytest.fixture(scope="module")
def preflight(keys: list[str], tmp_path_factory: pytest.TempPathFactory) -> Preflight:
    """Runs the play in a network of its own, where nobody listens and names come from /etc/hosts alone.

    What it finds in /etc/apt is a source of packages that has no address.
    """
    folder = tmp_path_factory.mktemp("preflight")
    for name, size in {"chat.gguf": 200, "embedder.onnx": 20}.items():
        (folder / "models/m").mkdir(parents=True, exist_ok=True)
        with (folder / "models/m" / name).open("wb") as file:
            file.truncate(size * 2**20)
    (folder / "cpuinfo").write_text("flags\t\t: fpu sse sse2 ssse3 sse4_1 sse4_2 popcnt\n")
    (folder / "apt").mkdir()
    (folder / "apt/sources.list").write_text("deb http://packages.invalid/debian bookworm main\n")
    inventory = folder / "hosts.yml"
    good = {
        "ansible_connection": "local",
        "ansible_become": False,
        "ansible_python_interpreter": "/usr/bin/python3",
        "nginx_domain": "forms.example.org",
        "base_ssh_authorized_keys": keys,
        "app_mail": MAIL,
        "monitoring_mail_to": "ops@example.org",
        "firewall_ssh_networks": ["192.0.2.0/24"],
        "models_folder": str(folder / "models"),
        "models_files": [{"model": "m", "file": name, "sha256": "0" * 64} for name in ("chat.gguf", "embedder.onnx")],
        # Packages come from an archive: the names of their sources matter to nobody.
        "bundle_archive": "/somewhere/quern-bundle.tar",
    }
    inventory.write_text(json.dumps({"all": {"hosts": {"quern": good}}}))
    environment = {**os.environ, "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "NO_COLOR": "1"}
    environment |= {"ANSIBLE_FORCE_COLOR": "0", "ANSIBLE_LOCAL_TEMP": str(folder / "local")}
    # Operators live anywhere.
    environment |= {"TZ": "Europe/Berlin", "SSH_CLIENT": "192.0.2.7 50000 22"}
    # Facts are gathered once: each run is told its own.
    environment |= {"ANSIBLE_CACHE_PLUGIN": "jsonfile", "ANSIBLE_CACHE_PLUGIN_CONNECTION": str(folder / "facts")}
    own = ["unshare", "--net", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    sources = f"mount --bind {folder}/apt /etc/apt"
    own += ["sh", "-c", f"ip link set lo up && {sources} || exit 70; {_LISTENER}", "sh"]

    def run(values: dict[str, Any], facts: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        known = {**HOST, "date_time": {"epoch": str(int(time.time())), "iso8601": "now"}, **facts}
        taken = {"TAKEN": values.get("TAKEN", "")}
        program = str(Path(sys.executable).parent / "ansible-playbook")
        command = [*own, program, "-i", str(inventory), "playbooks/preflight.yml"]
        command += ["-e", json.dumps({**values, "ansible_facts": known})]
        return subprocess.run(
            command, cwd=ROOT, env=environment | taken, capture_output=True, text=True, check=False, timeout=600
        )

    return run


@pytest.fixture(scope="module")
def runs(preflight: Preflight) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All of them, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(preflight, values, facts) for name, (values, facts, _) in REFUSALS.items()}


def test_good_values_and_a_good_host_pass(preflight: Preflight) -> None:
    done = preflight({}, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed=0" in done.stdout


def test_a_relay_that_wants_a_user_passes_with_its_password(preflight: Preflight) -> None:
    mail = {**MAIL, "port": 465, "tls": "implicit", "username": "u"}
    done = preflight({"app_mail": mail, "secrets_given": {"quern.quern_mail_password": "from Vault"}}, {})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from Vault" not in done.stdout + done.stderr


def test_without_mail_and_alerts_by_mail_there_is_no_relay_to_name(preflight: Preflight) -> None:
    done = preflight({"app_mail": {}, "monitoring_mail_to": ""}, {})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refuses(name: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[name].result()
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    for part in REFUSALS[name][2]:
        assert part in said, said
