#!/usr/bin/python3
"""Ansible module: the firewall's rules in groups (module_utils/core_rule_set.py)."""

from __future__ import annotations

from pathlib import Path

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.core_rule_set import Selection, arranged

DOCUMENTATION = r"""
module: waf_rules
short_description: Arrange the Core Rule Set
description:
  - Writes the rules of Debian's package and the appliance's own into one file for each group that a request may pass
    over. Where the package has other rules than those that were proved never to match calm requests, none is passed
    over for them.
options:
  rules:
    description: the folder of the Core Rule Set's files
    type: path
    required: true
  files:
    description: which of them, in order
    type: list
    elements: str
    required: true
  own:
    description: the file of the appliance's own rules
    type: path
    required: true
  path:
    description: the folder for the groups
    type: path
    required: true
  level:
    description: the highest paranoia level whose rules are tried
    type: int
    required: true
  blocking:
    description: the highest paranoia level that refuses
    type: int
    required: true
  left_out:
    description: identifiers and ranges of rules that are not tried at all
    type: list
    elements: str
    required: true
  calm:
    description: those that no calm request can match
    type: list
    elements: str
    required: true
  plain:
    description: those of them that no plain value can match either
    type: list
    elements: str
    required: true
  prose:
    description: those that take prose for an attack
    type: list
    elements: str
    required: true
  seldom:
    description: headers that a request without a body has seldom
    type: list
    elements: str
    required: true
  proven:
    description: digest of the rules of which that was proved
    type: str
    required: true
author: Quern
"""

HEADER = "# Managed by Ansible (roles/nginx): rules of Debian's modsecurity-crs and own.conf, arranged (docs/waf.md).\n"


def main() -> None:
    lists = {"type": "list", "elements": "str", "required": True}
    numbers = {"type": "int", "required": True}
    folders = {"type": "path", "required": True}
    module = AnsibleModule(
        argument_spec={
            "rules": folders,
            "files": lists,
            "own": folders,
            "path": folders,
            "level": numbers,
            "blocking": numbers,
            **dict.fromkeys(("left_out", "calm", "plain", "prose", "seldom"), lists),
            "proven": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    params = module.params
    rules, own = Path(params["rules"]), Path(params["own"])
    if module.check_mode and not (rules.is_dir() and own.exists()):
        # A dry run has installed and written nothing.
        module.exit_json(changed=True)
    read = ("rules", "files", "own", "path")
    selection = Selection(**{name: value for name, value in params.items() if name not in read})
    try:
        texts = {name: (rules / name).read_text() for name in params["files"]}
        groups = arranged(own.read_text(), texts, str(rules), selection)
    except (OSError, ValueError) as error:
        module.fail_json(msg=f"{rules}: {error}; expected the rules of Debian's modsecurity-crs (docs/waf.md)")
    changed = False
    for name, text in groups.items():
        path = Path(params["path"]) / f"{name}.conf"
        wanted = HEADER + text
        if path.exists() and path.read_text() == wanted:
            continue
        changed = True
        if not module.check_mode:
            partial = path.with_name(f".{path.name}.partial")
            partial.write_text(wanted)
            partial.chmod(0o644)
            partial.replace(path)
    module.exit_json(changed=changed)


if __name__ == "__main__":
    main()
