#!/usr/bin/python3
"""Ansible module: systemd credentials that are made on the host and encrypted at rest (systemd-creds(1))."""

from __future__ import annotations

import base64
import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: encrypted_credentials
short_description: Make systemd credentials on the host, encrypted at rest
description:
  - Each credential is a file OWNER.NAME, sealed by C(systemd-creds) under NAME - it can be loaded as nothing else.
  - A secret that is there is kept. One that cannot be decrypted is an error, never silently replaced.
options:
  directory:
    description: the folder of the files, mode 0700
    type: path
    required: true
  credentials:
    description: >-
      dicts of C(file), C(kind) (C(password), C(fernet), C(keyfile), C(given)) and C(template), a text with {secret}
    type: list
    elements: dict
    required: true
  given:
    description: values of those of kind C(given), by file name
    type: dict
    default: {}
  rotate:
    description: files to make anew
    type: list
    elements: str
    default: []
author: Quern
"""

RETURN = r"""
made:
  description: names of the files that were written
  returned: always
  type: list
"""

#: What each kind looks like, for finding the secret inside a rendered template.
SHAPES = {"password": r"[A-Za-z0-9_-]{43}", "fernet": r"[A-Za-z0-9_=-]{44}", "keyfile": r"[A-Za-z0-9+/=]{64,}"}


def fresh(kind: str) -> str:
    """A new secret of at least 256 bits."""
    if kind == "keyfile":
        return base64.b64encode(secrets.token_bytes(66)).decode()
    token = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return token if kind == "fernet" else token.rstrip("=")


class Unreadable(Exception):
    """A credential is there but cannot be decrypted."""


def credential_name(file: str) -> str:
    """The name under which a file is sealed: `quern-api.quern_mongodb_uri` is `quern_mongodb_uri`."""
    return file.split(".", 1)[1]


def decrypt(path: Path) -> str | None:
    """The content, or None where there is no file."""
    if not path.exists():
        return None
    command = ["systemd-creds", "decrypt", f"--name={credential_name(path.name)}", str(path), "-"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise Unreadable(
            f"{path}: expected a credential sealed with this host's key, found one that is not "
            f"({answer.stderr.strip().splitlines()[-1]}); restore /var/lib/systemd/credential.secret from the backup, "
            f"or move the file away to have a new secret made"
        )
    return answer.stdout


def encrypt(path: Path, content: str) -> None:
    """Put a sealed file in place, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    command = ["systemd-creds", "encrypt", f"--name={credential_name(path.name)}", "-", str(partial)]
    partial.unlink(missing_ok=True)
    subprocess.run(command, input=content, capture_output=True, text=True, check=True)
    partial.chmod(0o600)
    partial.replace(path)


def wanted_content(item: dict[str, Any], found: str | None, given: dict[str, str], rotate: bool) -> str:
    """What the file shall hold: the secret it has already, or a fresh one, in the shape of its template."""
    if item["kind"] == "given":
        return str(given[item["file"]])
    template = item.get("template", "{secret}")
    if found is not None and not rotate:
        # The template may have changed around the secret: the secret is what looks like one.
        secret = re.search(rf"(?<![A-Za-z0-9_+/=-])({SHAPES[item['kind']]})(?![A-Za-z0-9_+/=-])", found)
        if secret is not None:
            return template.replace("{secret}", secret[1])
    return template.replace("{secret}", fresh(item["kind"]))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "credentials": {"type": "list", "elements": "dict", "required": True},
            "given": {"type": "dict", "default": {}, "no_log": True},
            "rotate": {"type": "list", "elements": "str", "default": []},
        },
        supports_check_mode=True,
    )
    directory, made = Path(module.params["directory"]), []
    for item in module.params["credentials"]:
        path = directory / item["file"]
        rotate = item["file"] in module.params["rotate"]
        try:
            found = decrypt(path)
            wanted = wanted_content(item, found, module.params["given"], rotate)
            if found == wanted:
                continue
            made.append(item["file"])
            if not module.check_mode:
                encrypt(path, wanted)
        except Unreadable as error:
            module.fail_json(msg=str(error))
        except subprocess.CalledProcessError as error:
            module.fail_json(msg=f"{path}: systemd-creds could not encrypt it: {error.stderr.strip()}")
    module.exit_json(changed=bool(made), made=made)


if __name__ == "__main__":
    main()
