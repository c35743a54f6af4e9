"""Every template of every role, rendered by Ansible's own templar into a folder that mirrors the host's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.plugins.loader import init_plugin_loader
from ansible.template import Templar, trust_as_template

# Else no lookup is found.
init_plugin_loader([])

ROOT = Path(__file__).resolve().parents[2]
ROLES = ROOT / "roles"

#: What setup finds on a small host.
FACTS = {"memtotal_mb": 3934, "processor_vcpus": 2, "architecture": "x86_64", "distribution_release": "bookworm"}
#: What an operator must say (inventory/single).
INVENTORY: dict[str, Any] = {
    "ansible_user": "root",
    "ansible_check_mode": False,
    "inventory_hostname": "quern",
    "nginx_domain": "forms.example.org",
    "base_ssh_authorized_keys": ["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIFy operator@example.org"],
    "app_mail": {"host": "mail.example.org", "port": 587, "tls": "starttls", "from_address": "forms@example.org"},
}
#: What a value may hold, and what shells and systemd take for something else.
AWKWARD = """O'Brien's "Forms" $HOME `id` \\n 100% #1"""
#: Everything that is off, or empty, by default.
OPTIONS: dict[str, Any] = {
    "app_private_authority": "/root/authority.pem",
    "app_settings": {
        "QUERN_JOB__LEASE": 10,
        "QUERN_WEBHOOK__ALLOW_NETWORKS": ["10.1.0.0/16"],
        "QUERN_ENGINE_CHAT_MODEL": AWKWARD,
        "QUERN_ENGINE_PINNED": "one,two",
    },
    "app_clickhouse_url": "https://[2001:db8::7]:8443",
    "base_ssh_root_by_key": False,
    "base_ssh_forwarding": True,
    "base_ssh_user": "operator",
    "base_shell_idle_seconds": 0,
    "base_reboot_at": "04:30",
    "firewall_ssh_networks": ["192.0.2.0/24", "2001:db8::/32"],
    "firewall_webhook_networks": ["10.1.0.0/16", "fd00:1::/32"],
    "firewall_input_rules": ['tcp dport 9999 accept comment "a rule of the operator\'s"'],
    "firewall_output_rules": ['meta skuid root tcp dport 9999 accept comment "one more"'],
    "monitoring_mail_to": "ops@example.org",
    "monitoring_forward": "rsyslog",
    "monitoring_forward_host": "logs.example.org",
    "monitoring_forward_authority": "/root/forward.pem",
    "nginx_tls": "acme",
    "nginx_acme_email": "ops@example.org",
    "nginx_acme_authority": "/root/acme.pem",
    "nginx_alternative_names": ["www.example.org", "192.0.2.10", "2001:db8::1"],
    "nginx_waf_code_forms": ["frm_C0DE456789ABCDEFGHJKMNPQRS"],
    "nginx_waf_rules": ["SecRuleRemoveById 942100"],
    "secrets_given": {
        "quern.quern_mail_password": "from Vault",
        "quern-analytics.quern_clickhouse_password": "from Vault",
        "quern-forward.token": "from Vault",
    },
    "app_mail": {
        "host": "mail.example.org",
        "port": 465,
        "tls": "implicit",
        "from_address": "forms@example.org",
        "username": "quern",
        "from_name": AWKWARD,
    },
}
#: One after the other, so that every choice is taken in one of them.
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "options": OPTIONS,
    "other choices": {
        # As short as preflight takes it.
        "app_mail": {"host": "mail.example.org", "from_address": "forms@example.org"},
        "monitoring_mail_to": "ops@example.org",
        "monitoring_forward": "otlp",
        "monitoring_forward_endpoint": "https://collector.example.org:4318/v1/logs",
        "nginx_tls": "files",
        "nginx_waf": "none",
    },
}


def load(path: Path) -> dict[str, Any]:
    """A YAML file of variables, each string of which may be a template."""
    if not path.exists():
        return {}
    loaded: dict[str, Any] = DataLoader().load_from_file(str(path), trusted_as_template=True) or {}
    return loaded


def variables(options: Mapping[str, Any]) -> dict[str, Any]:
    """What a host knows while site.yml runs, with these options."""
    known: dict[str, Any] = {}
    for role in sorted(ROLES.iterdir()):
        known |= load(role / "defaults/main.yml") | load(role / "vars/main.yml")
    # Of what other tasks set on the way.
    made = {"app_release_path": "/opt/quern/releases/one", "app_environment": "/opt/quern/environments/one"}
    return {**known, **made, **INVENTORY, **options, "ansible_facts": FACTS}


def templates() -> list[Path]:
    return sorted(ROLES.glob("*/templates/**/*.j2"))


#: Templates that are rendered once for each of a list: the list, the loop's variable, and where the text lands.
LOOPS = {
    "etc/systemd/system/slice.j2": ("resources_slices", "item", "etc/systemd/system/{name}.slice"),
    "etc/quern/redis/instance.conf.j2": ("redis_instances", "redis_instance", "etc/quern/redis/{name}.conf"),
}


#: What depends on no variable, and so is the same in every variant.
_CONSTANT: dict[Path, str] = {}


def render(options: Mapping[str, Any]) -> Iterator[tuple[Path, str, str]]:
    """Each template's path, the path on the host without its first stroke, and the text."""
    known = variables(options)
    for path in templates():
        if path not in _CONSTANT and not any(name in path.read_text() for name in known):
            _CONSTANT[path] = text_of(path, {"ansible_search_path": [str(ROOT)]})
        role = path.relative_to(ROLES).parts[0]
        inside = str(path.relative_to(ROLES / role / "templates"))
        scope = {**known, "role_path": str(ROLES / role), "ansible_search_path": [str(ROLES / role), str(ROOT)]}
        if path in _CONSTANT:
            yield path, inside.removesuffix(".j2"), _CONSTANT[path]
            continue
        if inside not in LOOPS:
            yield path, inside.removesuffix(".j2"), text_of(path, scope)
            continue
        every, variable, place = LOOPS[inside]
        for item in Templar(loader=DataLoader(), variables=scope).template(scope[every]):
            yield path, place.format(name=item["name"]), text_of(path, {**scope, variable: item})


def text_of(path: Path, scope: dict[str, Any]) -> str:
    """As the module `template` renders it; an undefined variable is an error."""
    expression = trust_as_template(f"{{{{ lookup('ansible.builtin.template', {str(path)!r}) }}}}")
    return str(Templar(loader=DataLoader(), variables=scope).template(expression))


def specification(role: Path) -> dict[str, Any]:
    """The inputs of a role, of all its entry points together."""
    loaded = yaml.safe_load((role / "meta/argument_specs.yml").read_text())
    options: dict[str, Any] = {}
    for point in loaded["argument_specs"].values():
        options |= point.get("options") or {}
    return options
