#!/usr/bin/python3
"""Ansible module: a Redis ACL file, whose passwords are systemd credentials on the host."""

from __future__ import annotations

import grp
import hashlib
import os
import subprocess
from pathlib import Path
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: redis_accounts
short_description: Keep a Redis ACL file
description:
  - The file holds SHA-256 digests of 256-bit random passwords. These are read from encrypted systemd credentials on
    the host, so that they never travel. The default account is off.
options:
  path:
    description: the ACL file
    type: path
    required: true
  group:
    description: who reads it
    type: str
    required: true
  credentials:
    description: the folder of encrypted credentials
    type: path
    required: true
  accounts:
    description: dicts of C(name) and C(rules)
    type: list
    elements: dict
    required: true
author: Quern
"""


def digest_of(folder: str, account: str) -> str:
    """SHA-256 of the password inside an account's URL."""
    path = Path(folder) / f"{account}.quern_redis_queue_url"
    command = ["systemd-creds", "decrypt", "--name=quern_redis_queue_url", str(path), "-"]
    url = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return hashlib.sha256((urlsplit(url).password or "").encode()).hexdigest()


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "group": {"type": "str", "required": True},
            "credentials": {"type": "path", "required": True, "no_log": False},
            "accounts": {"type": "list", "elements": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    params, path = module.params, Path(module.params["path"])
    lines = ["user default off resetpass resetkeys resetchannels -@all"]
    try:
        for account in params["accounts"]:
            digest = digest_of(params["credentials"], account["name"])
            lines.append(f"user {account['name']} on resetchannels -@all {account['rules']} #{digest}")
    except subprocess.CalledProcessError as error:
        if module.check_mode:
            module.exit_json(changed=True)
        module.fail_json(msg=f"{params['credentials']}: systemd-creds: {error.stderr.strip()}; run the secrets role")
    wanted = "\n".join(lines) + "\n"
    if path.exists() and path.read_text() == wanted:
        same = (path.stat().st_mode & 0o777, path.owner(), path.group()) == (0o640, "root", params["group"])
        if same:
            module.exit_json(changed=False)
    if not module.check_mode:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(wanted)
        partial.chmod(0o640)
        os.chown(partial, 0, grp.getgrnam(params["group"]).gr_gid)
        partial.replace(path)
    module.exit_json(changed=True)


if __name__ == "__main__":
    main()
