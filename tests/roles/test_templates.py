"""What the roles write is what the programs that read it accept: no host is needed to see a mistake."""

import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import yaml

from quern.embedded.cache import cache_root
from tests.roles.conftest import Judge
from tests.roles.rendering import ROOT, text_of, variables
from tests.waf.arrangement import arrange, role_values

#: A mount or network namespace of one's own, for root and for others.
_OWN = ["unshare"] if os.geteuid() == 0 else ["unshare", "--map-root-user"]
#: Units whose exposure may be more than the issue's limits: how much, and why.
_MORE_EXPOSED = {
    "mount-options.service": (3.5, "it changes the host's own mounts, so it can have no mount namespace"),
}
#: What has no place for a comment.
_WITHOUT_A_HEADER = {"letters.map", "issue", "issue.net", "credentials.yml"}


def files(host: Path) -> list[Path]:
    """What the roles wrote: not what a program under test left beside it."""
    return sorted(path for name in ("etc", "opt", "usr") for path in (host / name).rglob("*") if path.is_file())


def moved(text: str, host: Path, programs: Path) -> str:
    """The same configuration with its paths under `host`; modules and rules come from the unpacked packages."""
    text = re.sub(r"/usr/(lib/nginx/modules|share/modsecurity-crs)/", rf"{programs}/usr/\1/", text)
    return re.sub(r"(?<![\w./-])/(etc/nginx|etc/quern|run|var/lib|var/cache|var/log)/", rf"{host}/\1/", text)


def test_everything_is_rendered_to_its_end(host: Path) -> None:
    for path in files(host):
        text = path.read_text()
        assert text.endswith("\n"), path
        assert not re.search(r"\{%-? ?(if|for|set|end)", text), path
        assert not re.search(r"\{\{ ?[a-z]+_", text), path
        assert "None" not in re.findall(r"=\s*(None)\b", text), path


def test_every_file_says_whose_it_is(host: Path) -> None:
    silent = [
        path.relative_to(host)
        for path in files(host)
        if path.name not in _WITHOUT_A_HEADER and not path.is_relative_to(host / "usr/share/pam-configs")
        if "Managed by Ansible (roles/" not in path.read_text()
    ]
    assert silent == []


def test_nginx_accepts_its_configuration(host: Path, programs: Path, judge: Judge) -> None:
    for folder in ("etc/quern/tls", "var/lib/nginx", "var/cache/nginx", "var/log/nginx", "run/nginx", "run/quern-api"):
        (host / folder).mkdir(parents=True, exist_ok=True)
    tls = host / "etc/quern/tls"
    request = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    made = [
        *request,
        "-subj",
        "/CN=forms.example.org",
        "-keyout",
        str(tls / "server.key"),
        "-out",
        str(tls / "server.pem"),
    ]
    subprocess.run(made, check=True, capture_output=True)
    for path in [host / "etc/nginx/nginx.conf", *(host / "etc/nginx/modsecurity").glob("*.conf")]:
        path.write_text(moved(path.read_text(), host, programs))
    arrange(host / "etc/nginx/modsecurity", programs, role_values())
    shutil.copy(programs / "etc/nginx/mime.types", host / "etc/nginx/mime.types")
    configuration = host / "etc/nginx/nginx.conf"
    judge("usr/sbin/nginx", "-q", "-t", "-e", "stderr", "-c", configuration, before=[*_OWN, "--net"])


def test_nftables_accepts_the_rules(host: Path, judge: Judge, tmp_path: Path) -> None:
    rules = (host / "etc/quern/nftables.conf").read_text()
    # Accounts of the appliance are not those of this machine.
    rules = re.sub(r"skuid \{([^}]*)\}", lambda found: _numbered(found[1]), rules)
    rules = re.sub(r"skuid (?!\{)[a-z_][\w-]*", "skuid 4242", rules)
    checked = tmp_path / "nftables.conf"
    checked.write_text(rules)
    judge("usr/sbin/nft", "--check", "--file", checked, before=[*_OWN, "--net"])


def _numbered(names: str) -> str:
    return "skuid { " + ", ".join(str(4242 + number) for number, _ in enumerate(names.split(","))) + " }"


def test_sshd_accepts_its_configuration(host: Path, programs: Path, judge: Judge, tmp_path: Path) -> None:
    main = tmp_path / "sshd_config"
    main.write_text(f"HostKey {tmp_path}/key\nInclude {host}/etc/ssh/sshd_config.d/*.conf\n")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "key")], check=True)
    # sshd wants its own account and folder: in a mount namespace, they are there.
    accounts = tmp_path / "passwd"
    accounts.write_text("root:x:0:0::/root:/bin/sh\nsshd:x:4242:65534::/run/sshd:/usr/sbin/nologin\n")
    script = f'mount -t tmpfs none /run && mkdir /run/sshd && mount --bind {accounts} /etc/passwd && exec "$@"'
    before = [*_OWN, "--mount", "sh", "-c", script, "sh"]
    said = judge("usr/sbin/sshd", "-T", "-f", main, before=before)
    assert "passwordauthentication no\n" in said
    assert "Deprecated" not in said


def test_sudo_accepts_its_rules(host: Path, judge: Judge) -> None:
    judge("usr/sbin/visudo", "--check", f"--file={host}/etc/sudoers.d/quern")


def test_systemd_accepts_the_units(host: Path) -> None:
    units = sorted(path for path in (host / "etc/systemd/system").glob("*.*") if path.is_file())
    assert len(units) > 20
    root = host / "systemd-root"
    shutil.copytree(host / "etc/systemd", root / "etc/systemd")
    for unit in units:
        for program in re.findall(r"^Exec\w+=[-+!:@]*(/\S+)", unit.read_text(), re.MULTILINE):
            stand_in = root / program.lstrip("/")
            stand_in.parent.mkdir(parents=True, exist_ok=True)
            stand_in.write_text("#!/bin/sh\n")
            stand_in.chmod(0o755)
    names = [unit.name.replace("@.", "@1.") for unit in units]
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", f"--root={root}", *names],
        capture_output=True,
        text=True,
        check=False,
    )
    # Units of Debian's are not in this folder.
    said = [
        line
        for line in done.stderr.splitlines()
        if not re.search(r"Unit \S+ not found|Failed to load \S+: Not found", line)
    ]
    assert said == []


def test_every_unit_is_hardened(host: Path, tmp_path: Path) -> None:
    """Those of a moment too, which tests/host does not find running."""
    exposed = {}
    for unit in sorted((host / "etc/systemd/system").glob("*.service")):
        # A template is judged as one of its instances.
        judged = tmp_path / unit.name.replace("@.", "@1.")
        judged.write_text(unit.read_text())
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", "--no-pager", str(judged)],
            capture_output=True,
            text=True,
            check=False,
        )
        found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
        assert found, done.stdout + done.stderr
        limit, _ = _MORE_EXPOSED.get(unit.name, (1.5 if unit.name.startswith(("quern-", "redis@")) else 2.0, ""))
        if float(found[1]) > limit:
            exposed[unit.name] = float(found[1])
    assert exposed == {}


def test_backups_that_go_elsewhere_may_ask_for_names() -> None:
    template = ROOT / "roles/firewall/templates/etc/quern/nftables.conf.j2"
    for repository, asks in {"/var/backups/quern": False, "sftp:backup@vault.example.org:/quern": True}.items():
        rules = text_of(template, {**variables({"backup_repository": repository}), "ansible_search_path": [str(ROOT)]})
        (names,) = [line for line in rules.splitlines() if "th dport 53 accept" in line]
        assert ("quern-backup" in names) is asks


def test_prometheus_and_alertmanager_accept_theirs(host: Path, judge: Judge) -> None:
    judge("usr/bin/promtool", "check", "config", "--syntax-only", host / "etc/prometheus/prometheus.yml")
    judge("usr/bin/amtool", "check-config", host / "etc/prometheus/alertmanager.yml")


def test_chrony_logrotate_and_aide_accept_theirs(host: Path, programs: Path, judge: Judge, tmp_path: Path) -> None:
    judge("usr/sbin/chronyd", "-p", "-f", host / "etc/chrony/conf.d/quern.conf")
    common = tmp_path / "logrotate.conf"
    # Packages' rules are not in this folder.
    common.write_text((host / "etc/logrotate.conf").read_text().replace("include /etc/logrotate.d", ""))
    common.chmod(0o644)
    accounting = tmp_path / "quern-accounting"
    accounting.write_text((host / "etc/logrotate.d/quern-accounting").read_text())
    accounting.chmod(0o644)
    assert "error:" not in judge("usr/sbin/logrotate", "--debug", common, accounting)
    rotation = tmp_path / "nginx"
    text = (host / "etc/logrotate.d/nginx").read_text()
    # Accounts of the appliance are not those of this machine.
    rotation.write_text(text.replace("nginx adm", "root root").replace("su root adm", "su root root"))
    rotation.chmod(0o644)
    assert "error:" not in judge("usr/sbin/logrotate", "--debug", rotation)
    judge("usr/bin/aide", "--config-check", f"--config={host}/etc/aide/aide.conf")


def test_rsyslog_accepts_its_configuration(host: Path, programs: Path, judge: Judge, tmp_path: Path) -> None:
    (host / "var/lib/quern-forward").mkdir(parents=True, exist_ok=True)
    shutil.copy("/etc/ssl/certs/ca-certificates.crt", host / "etc/quern/forward.pem")
    checked = tmp_path / "rsyslog.conf"
    checked.write_text(moved((host / "etc/quern/rsyslog.conf").read_text(), host, programs))
    modules = programs / "usr/lib" / f"{os.uname().machine}-linux-gnu" / "rsyslog"
    judge("usr/sbin/rsyslogd", "-N1", "-M", modules, "-f", checked)


def test_redis_starts_by_its_configuration(host: Path, programs: Path, judge: Judge) -> None:
    """It has no dry run: it starts, answers, and is ended."""
    # What waits is never thrown out, and outlives a restart; what is kept to be quick makes room.
    promises = {"queue": ("noeviction", "yes"), "cache": ("allkeys-lru", "no")}
    for name, (policy, appends) in promises.items():
        (host / f"var/lib/redis-{name}").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="q-", dir="/tmp") as short:
            text = moved((host / f"etc/quern/redis/{name}.conf").read_text(), host, programs)
            # A socket's path is short, and the passwords are not this test's.
            text = re.sub(r"^unixsocket .*", f"unixsocket {short}/redis.sock", text, flags=re.MULTILINE)
            text = re.sub(r"^aclfile .*", "", text, flags=re.MULTILINE)
            configuration = Path(short, "redis.conf")
            configuration.write_text(text)
            ask = f"{programs}/usr/bin/redis-cli -s {short}/redis.sock ping"
            asked = f"for _ in $(seq 600); do {ask} && break; sleep 0.1; done"
            asked += f"; {ask.removesuffix('ping')} config get maxmemory-policy appendonly"
            script = f'"$@" & {asked}; kill $!; wait $!'
            # Debian's redis-server is redis-check-rdb by another name.
            said = judge("usr/bin/redis-server", configuration, before=["sh", "-c", script, "sh"])
        assert "PONG" in said, said
        answered = said.split()
        assert answered[answered.index("maxmemory-policy") + 1] == policy
        assert answered[answered.index("appendonly") + 1] == appends


def test_mongod_accepts_its_configuration(host: Path) -> None:
    made = [path for path in (cache_root() / "mongod").glob("*/mongod") if path.is_file()]
    assert made, "expected a mongod in the cache; run: make setup"
    done = subprocess.run(
        [str(made[-1]), "--config", str(host / "etc/mongod.conf"), "--outputConfig"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert yaml.safe_load(done.stdout)["security"]["authorization"] == "enabled"


def test_apparmor_accepts_the_profiles(host: Path, programs: Path, judge: Judge) -> None:
    profiles = host / "etc/apparmor.d/quern"
    judge("sbin/apparmor_parser", "--skip-kernel-load", "--skip-cache", f"--base={programs}/etc/apparmor.d", profiles)


def test_the_shell_understands_the_scripts(host: Path) -> None:
    shellcheck = ROOT / ".venv/bin/shellcheck"
    scripts = [path for path in files(host) if path.read_text().startswith("#!/bin/")]
    assert len(scripts) > 5
    done = subprocess.run([str(shellcheck), *map(str, scripts)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_python_understands_the_programs(host: Path) -> None:
    for path in files(host):
        if path.read_text().startswith("#!") and "python" in path.read_text().split("\n")[0]:
            compile(path.read_text(), str(path), "exec")


def test_kernel_parameters_are_each_set_once(host: Path) -> None:
    lines = [
        line for line in (host / "etc/sysctl.d/99-quern.conf").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    names = [re.fullmatch(r"([a-z0-9_.]+) = (\S.*)", line) for line in lines]
    assert all(names), lines
    assert len({found[1] for found in names if found}) == len(lines)
