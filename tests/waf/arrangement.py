"""The firewall's rules in groups, as the role's module makes them on a host."""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

ROLE = Path(__file__).resolve().parents[2] / "roles" / "nginx"


def core_rule_set() -> ModuleType:
    """The role's roles/nginx/module_utils/core_rule_set.py."""
    name = "core_rule_set"
    if name not in sys.modules:
        specification = importlib.util.spec_from_file_location(name, ROLE / f"module_utils/{name}.py")
        assert specification is not None and specification.loader is not None
        # Dataclasses look their own module up.
        sys.modules[name] = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def role_values() -> dict[str, Any]:
    """The role's defaults and variables."""
    files = (ROLE / "defaults/main.yml", ROLE / "vars/main.yml")
    return {name: value for file in files for name, value in yaml.safe_load(file.read_text()).items()}


def arrange(folder: Path, packages: Path, values: Mapping[str, Any]) -> None:
    """Write the groups of rules, as library/waf_rules.py does."""
    rules = packages / values["nginx_waf_folder"].lstrip("/")
    texts = {name: (rules / name).read_text() for name in values["nginx_waf_files"]}
    lists = {name: values[f"nginx_waf_{name}"] for name in ("left_out", "calm", "plain", "prose", "seldom", "proven")}
    blocking = values["nginx_waf_blocking_paranoia"]
    selection = core_rule_set().Selection(
        level=max(blocking, values["nginx_waf_detecting_paranoia"]), blocking=blocking, **lists
    )
    (folder / "rules").mkdir(exist_ok=True)
    own = (folder / "own.conf").read_text()
    for name, text in core_rule_set().arranged(own, texts, str(rules), selection).items():
        (folder / f"rules/{name}.conf").write_text(text)
