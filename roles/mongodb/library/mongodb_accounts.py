#!/usr/bin/python3
"""Ansible module: a one-node replica set and its accounts, whose passwords are systemd credentials on the host."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from ansible.module_utils.basic import AnsibleModule

try:
    from pymongo import MongoClient
    from pymongo.errors import OperationFailure, PyMongoError
except ImportError:  # a blank host in check mode
    MongoClient = None

DOCUMENTATION = r"""
module: mongodb_accounts
short_description: Initiate a one-node replica set and keep its accounts as they should be
description:
  - Passwords are read from encrypted systemd credentials on the host, so that they never travel.
  - The administrator's is C(mongodb.admin); an account NAME has its own in the URI C(NAME.quern_mongodb_uri).
options:
  socket:
    description: mongod's UNIX socket
    type: path
    required: true
  replica_set:
    description: the set's name
    type: str
    required: true
  credentials:
    description: the folder of encrypted credentials
    type: path
    required: true
  roles_defined:
    description: custom roles, dicts of C(name), C(privileges), C(roles)
    type: list
    elements: dict
    default: []
  accounts:
    description: >-
      dicts of C(name), C(roles) and, where it is another one, C(credential). The account itself is called as its
      credential says, C(NAME) or at every other rotation C(NAME-b)
    type: list
    elements: dict
    required: true
  drop_former:
    description: drop the account that the last rotation replaced
    type: bool
    default: false
author: Quern
"""

PATIENCE_SECONDS = 60
_NOT_YET_INITIALIZED = 94
_AUTHENTICATION_FAILED = 18


def credential(folder: str, file: str) -> str:
    """The decrypted content of OWNER.NAME."""
    name = file.split(".", 1)[1]
    command = ["systemd-creds", "decrypt", f"--name={name}", str(Path(folder) / file), "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def name_and_password(folder: str, account: str, file: str) -> tuple[str, str]:
    """What an account's connection string says."""
    parts = urlsplit(credential(folder, f"{account}.{file}"))
    return parts.username or account, parts.password or ""


class Node:
    """The one mongod."""

    def __init__(self, socket: str) -> None:
        self._socket = socket

    def client(self, name: str | None = None, password: str = "") -> Any:
        who = f"{quote(name)}:{quote(password)}@" if name else ""
        return MongoClient(
            f"mongodb://{who}{quote(self._socket, safe='')}/?directConnection=true&authSource=admin",
            serverSelectionTimeoutMS=2000,
        )

    def hello(self) -> dict[str, Any]:
        """What it says of itself, once it answers. Raises TimeoutError."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                with self.client() as client:
                    return dict(client.admin.command("isMaster"))
            except PyMongoError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{type(error).__name__}: {error}") from None
                time.sleep(0.5)

    def accepts(self, name: str, password: str) -> bool:
        """Whether this is the account's password."""
        try:
            with self.client(name, password) as client:
                client.admin.command("ping")
        except OperationFailure as error:
            if error.code == _AUTHENTICATION_FAILED:
                return False
            raise
        return True

    def wait_primary(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.hello().get("ismaster"):
            if time.monotonic() > deadline:
                raise TimeoutError("expected the node to become primary")
            time.sleep(0.3)


def plain_roles(roles: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(role["role"], role["db"]) for role in roles}


def plain_privileges(privileges: list[dict[str, Any]]) -> list[Any]:
    return sorted((sorted(item["resource"].items()), sorted(item["actions"])) for item in privileges)


def ensure_role(admin: Any, wanted: dict[str, Any], check: bool) -> bool:
    """Create or change a custom role; whether it had to."""
    found = admin.command("rolesInfo", wanted["name"], showPrivileges=True)["roles"]
    privileges, roles = wanted["privileges"], wanted.get("roles", [])
    if not found:
        if not check:
            admin.command("createRole", wanted["name"], privileges=privileges, roles=roles)
        return True
    same = plain_privileges(found[0]["privileges"]) == plain_privileges(privileges)
    if same and plain_roles(found[0]["roles"]) == plain_roles(roles):
        return False
    if not check:
        admin.command("updateRole", wanted["name"], privileges=privileges, roles=roles)
    return True


def ensure_account(node: Node, admin: Any, name: str, wanted: dict[str, Any], password: str, check: bool) -> bool:
    """Create or change an account; whether it had to."""
    found = admin.command("usersInfo", name)["users"]
    if not found:
        if not check:
            admin.command("createUser", name, pwd=password, roles=wanted["roles"], mechanisms=["SCRAM-SHA-256"])
        return True
    change: dict[str, Any] = {}
    if plain_roles(found[0]["roles"]) != plain_roles(wanted["roles"]):
        change["roles"] = wanted["roles"]
    if not node.accepts(name, password):
        change["pwd"] = password
    if change and not check:
        admin.command("updateUser", name, **change)
    return bool(change)


def drop_former(admin: Any, account: str, name: str, check: bool) -> bool:
    """Drop an account under its other name; whether it was there."""
    former = account if name != account else f"{account}-b"
    if not admin.command("usersInfo", former)["users"]:
        return False
    if not check:
        admin.command("dropUser", former)
    return True


def found_set(node: Node, params: dict[str, Any], passwords: list[str], check: bool) -> bool:
    """Initiate the set and make the administrator, where that is still to do (by the localhost exception)."""
    changed = False
    if "setName" not in node.hello():
        changed = True
        if check:
            return True
        members = [{"_id": 0, "host": params["socket"]}]
        with node.client() as client:
            client.admin.command("replSetInitiate", {"_id": params["replica_set"], "members": members})
    node.wait_primary()
    # During its rotation the credential holds the new password, and the former one after it.
    known = [one for one in passwords if node.accepts("admin", one)]
    if not known:
        changed = True
        if not check:
            with node.client() as client:
                client.admin.command(
                    "createUser", "admin", pwd=passwords[0], roles=["root"], mechanisms=["SCRAM-SHA-256"]
                )
    elif known[0] != passwords[0]:
        changed = True
        if not check:
            with node.client("admin", known[0]) as client:
                client.admin.command("updateUser", "admin", pwd=passwords[0])
    return changed


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "socket": {"type": "path", "required": True},
            "replica_set": {"type": "str", "required": True},
            "credentials": {"type": "path", "required": True, "no_log": False},
            "roles_defined": {"type": "list", "elements": "dict", "default": []},
            "accounts": {"type": "list", "elements": "dict", "required": True},
            "drop_former": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    params, check = module.params, module.check_mode
    if check and (MongoClient is None or not Path(params["socket"]).exists()):
        module.exit_json(changed=True, accounts=[item["name"] for item in params["accounts"]])
    if MongoClient is None:
        module.fail_json(msg="expected PyMongo, found none; run: apt-get install python3-pymongo")
    node = Node(params["socket"])
    try:
        passwords = credential(params["credentials"], "mongodb.admin").split(",")
        changed = found_set(node, params, passwords, check)
        touched = []
        if not (check and changed):
            with node.client("admin", passwords[0]) as client:
                for wanted in params["roles_defined"]:
                    if ensure_role(client.admin, wanted, check):
                        touched.append(wanted["name"])
                for wanted in params["accounts"]:
                    file = wanted.get("credential", "quern_mongodb_uri")
                    name, own = name_and_password(params["credentials"], wanted["name"], file)
                    if ensure_account(node, client.admin, name, wanted, own, check):
                        touched.append(name)
                    if params["drop_former"] and drop_former(client.admin, wanted["name"], name, check):
                        touched.append(wanted["name"])
    except (PyMongoError, TimeoutError) as error:
        # PyMongo's texts name hosts and codes; a connection string in one would carry a password.
        text = re.sub(r"//[^@/\s]+@", "//…@", str(error))
        module.fail_json(msg=f"{params['socket']}: {text}; look at: journalctl -u mongod")
    except subprocess.CalledProcessError as error:
        module.fail_json(msg=f"{params['credentials']}: systemd-creds: {error.stderr.strip()}; run the secrets role")
    module.exit_json(changed=changed or bool(touched), accounts=touched)


if __name__ == "__main__":
    main()
