#!/usr/bin/python3
"""Ansible module: a Redis ACL file, whose passwords are systemd credentials on the host."""

from __future__ import annotations

import grp
import hashlib
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: redis_accounts
short_description: Keep a Redis ACL file
description:
  - The file holds SHA-256 digests of 256-bit random passwords. These are read from encrypted systemd credentials on
    the host, so that they never travel. The default account is off.
  - While a rotation is unfinished (C(.rotation), see encrypted_credentials), the passwords that the file knows go on
    holding beside the new ones.
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
  socket:
    description: >-
      the instance's UNIX socket; where it answers, changed accounts are set there too, by the account C(quern-admin),
      so that nothing is to be restarted and nobody is disconnected
    type: path
    required: true
author: Quern
"""

RETURN = r"""
live:
  description: whether the running instance knows the accounts as they are in the file now
  returned: always
  type: bool
"""

ADMIN = "quern-admin"
#: Off, without a password: nobody is it. Yet the log is replayed in its name at a start, and of that Redis asks the
#: rules at each EXEC (src/multi.c): forbidden anything, the account would lose every transaction of the log.
DEFAULT = "user default off resetpass allkeys allchannels +@all"


class Refused(Exception):
    """The instance refused a command."""


def passwords_of(folder: str, account: str, credential: str = "quern_redis_queue_url") -> list[str]:
    """The password inside an account's URL, and after it, during a rotation of the administrator's, the former ones."""
    path = Path(folder) / f"{account}.{credential}"
    command = ["systemd-creds", "decrypt", f"--name={credential}", str(path), "-"]
    url = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (urlsplit(url).password or "").split(",")


def previous_digests(lines: list[str], account: str) -> list[str]:
    """The password digests that the file knows for an account."""
    line = next((line for line in lines if line.startswith(f"user {account} ")), "")
    return re.findall(r"#([0-9a-f]{64})", line)


def lines_wanted(params: dict[str, Any], found: list[str]) -> list[str]:
    """The lines of the file."""
    lines = [DEFAULT]
    for account in params["accounts"]:
        credential = account.get("credential", "quern_redis_queue_url")
        secret = passwords_of(params["credentials"], account["name"], credential)[0]
        digests = [hashlib.sha256(secret.encode()).hexdigest()]
        if (Path(params["credentials"]) / ".rotation").exists():
            digests += [digest for digest in previous_digests(found, account["name"]) if digest not in digests]
        marks = " ".join(f"#{digest}" for digest in digests)
        lines.append(f"user {account['name']} on resetchannels -@all {account['rules']} {marks}")
    return lines


class Instance:
    """A running instance, spoken to in its own protocol (RESP 2, https://redis.io/docs/latest/develop/reference/protocol-spec/)."""

    def __init__(self, path: str) -> None:
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(10)
        self._connection.connect(path)
        self._stream = self._connection.makefile("rb")

    def call(self, *words: str) -> None:
        """One command whose answer is one line. Raises Refused."""
        parts = [word.encode() for word in words]
        packed = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
        self._connection.sendall(b"*%d\r\n%s" % (len(parts), packed))
        answer = self._stream.readline().decode().strip()
        if answer.startswith("-"):
            raise Refused(answer)


def come_in(instance: Instance, passwords: list[str]) -> None:
    """Be the administrator, by the first of the passwords that holds. Raises Refused when none does."""
    *others, last = passwords
    for password in others:
        try:
            instance.call("AUTH", ADMIN, password)
        except Refused:
            continue
        return
    instance.call("AUTH", ADMIN, last)


def set_live(path: str, passwords: list[str], found: list[str], wanted: list[str]) -> bool:
    """Set what differs in the running instance; whether that was possible. One that does not run reads the file."""
    if not Path(path).exists():
        return True
    try:
        instance = Instance(path)
        come_in(instance, passwords)
        for line in wanted:
            if line not in found:
                _, name, *rules = line.split()
                instance.call("ACL", "SETUSER", name, "reset", *rules)
        names = {line.split()[1] for line in wanted}
        for line in found:
            # Whoever wrote into the file may have left anything there.
            if line.startswith("user ") and line.split()[1] not in names:
                instance.call("ACL", "DELUSER", line.split()[1])
    except (OSError, Refused):
        return False
    return True


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "group": {"type": "str", "required": True},
            "credentials": {"type": "path", "required": True, "no_log": False},
            "accounts": {"type": "list", "elements": "dict", "required": True},
            "socket": {"type": "path", "required": True},
        },
        supports_check_mode=True,
    )
    params, path = module.params, Path(module.params["path"])
    found = path.read_text().splitlines() if path.exists() else []
    try:
        wanted = lines_wanted(params, found)
        administrator = passwords_of(params["credentials"], ADMIN)
    except subprocess.CalledProcessError as error:
        if module.check_mode:
            module.exit_json(changed=True, live=True)
        module.fail_json(msg=f"{params['credentials']}: systemd-creds: {error.stderr.strip()}; run the secrets role")
    if found == wanted:
        same = (path.stat().st_mode & 0o777, path.owner(), path.group()) == (0o640, "root", params["group"])
        if same:
            module.exit_json(changed=False, live=True)
    live = True
    if not module.check_mode:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text("\n".join(wanted) + "\n")
        partial.chmod(0o640)
        os.chown(partial, 0, grp.getgrnam(params["group"]).gr_gid)
        partial.replace(path)
        live = set_live(params["socket"], administrator, found, wanted)
    module.exit_json(changed=True, live=live)


if __name__ == "__main__":
    main()
