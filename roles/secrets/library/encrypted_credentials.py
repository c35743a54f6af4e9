#!/usr/bin/python3
"""Ansible module: systemd credentials that are made on the host and encrypted at rest (systemd-creds(1))."""

from __future__ import annotations

import base64
import json
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
  - An unfinished rotation is written down in C(.rotation), by file. What it introduced is taken up by the next run, and
    not made anew, since some processes may use the new secret already and others still the former one.
options:
  directory:
    description: the folder of the files, mode 0700
    type: path
    required: true
  credentials:
    description: >-
      dicts of C(file), C(kind) (C(password), C(keyfile), C(given), C(ring), C(handover)) and C(template), a text with
      {secret}, and with {turn} where an account changes its name with its password. A ring is a list of keys, of which
      the first seals and all open; a handover is the password, and during a rotation the former ones after it.
    type: list
    elements: dict
    required: true
  given:
    description: >-
      values by file name - of those of kind C(given) the content, of the others the secret, which must look like one
      made here, since it becomes part of addresses and lists. What is given is not rotated
    type: dict
    default: {}
  rotate:
    description: files to make anew
    type: list
    elements: str
    default: []
  phase:
    description: >-
      C(introduce) makes the new secrets, while the former ones still hold; C(promote) lets the newest key of a ring
      seal; C(retire) forgets the former password of a handover, and ends the rotation. Each does its part once
    type: str
    choices: [introduce, promote, retire]
    default: introduce
author: Quern
"""

RETURN = r"""
made:
  description: names of the files that were written
  returned: always
  type: list
"""

#: What each kind looks like, for finding the secret inside a rendered template.
SHAPES = {
    "password": r"[A-Za-z0-9_-]{43}",
    "keyfile": r"[A-Za-z0-9+/=]{64,}",
    "ring": r"[A-Za-z0-9_-]{43}=(?:,[A-Za-z0-9_-]{43}=)*",
    "handover": r"[A-Za-z0-9_-]{43}(?:,[A-Za-z0-9_-]{43})*",
}
PHASES = ["introduce", "promote", "retire"]
#: How an account is called at every other rotation, so that the former one holds until nobody uses it.
TURN = "-b"


def fresh(kind: str) -> str:
    """A new secret of at least 256 bits."""
    if kind == "keyfile":
        return base64.b64encode(secrets.token_bytes(66)).decode()
    token = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    return token if kind == "ring" else token.rstrip("=")


def unlike(credentials: list[dict[str, Any]], given: dict[str, str]) -> list[str]:
    """What was given in the place of a secret and does not look like one."""
    return [
        item["file"]
        for item in credentials
        if item["kind"] in SHAPES
        and item["file"] in given
        and not re.fullmatch(SHAPES[item["kind"]], str(given[item["file"]]))
    ]


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


class Rotation:
    """How far each file has come in a rotation that has not ended."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / ".rotation"
        self._reached: dict[str, str] = json.loads(self._path.read_text()) if self._path.exists() else {}

    def is_to_do(self, file: str, phase: str) -> bool:
        """Whether the file has not come so far yet."""
        return file not in self._reached or PHASES.index(self._reached[file]) < PHASES.index(phase)

    def done(self, file: str, phase: str) -> None:
        """Write down that it has."""
        self._reached[file] = phase
        if phase == PHASES[-1]:
            del self._reached[file]
        partial = self._path.with_name(".rotation.partial")
        partial.touch(mode=0o600)
        partial.write_text(json.dumps(self._reached))
        partial.replace(self._path)
        if not self._reached:
            self._path.unlink()


def turned(kind: str, secret: str, phase: str) -> str:
    """The secret after a phase of its rotation."""
    known = secret.split(",")
    match kind, phase:
        case "ring", "introduce":
            # At the end: until every process can open what it seals, it seals nothing.
            return ",".join([*known, fresh(kind)])
        case "ring", "promote":
            return ",".join([known[-1], *known[:-1]])
        case "handover", "introduce":
            # All of the former: one of an interrupted rotation may not have come into use.
            return ",".join([fresh(kind), *known])
        case "handover", "retire":
            return known[0]
        case (("password" | "keyfile"), "introduce"):
            return fresh(kind)
    return secret


def wanted_content(item: dict[str, Any], found: str | None, given: dict[str, str], phase: str | None) -> str:
    """What the file shall hold: the secret it has already, or a fresh one, in the shape of its template."""
    kind, template = item["kind"], item.get("template", "{secret}")
    if kind == "given":
        return str(given[item["file"]])
    if item["file"] in given:
        return template.replace("{secret}", given[item["file"]]).replace("{turn}", "")
    if found is None:
        return template.replace("{secret}", fresh(kind)).replace("{turn}", "")
    # The template may have changed around the secret: the secret is what looks like one.
    match = re.search(rf"(?<![A-Za-z0-9_+/=-])({SHAPES[kind]})(?![A-Za-z0-9_+/=-])", found)
    secret = match[1] if match else fresh(kind)
    turn = ""
    if "{turn}" in template:
        before = re.escape(template.split("{turn}")[0])
        turn = TURN if re.match(f"{before}{TURN}:", found) else ""
    if phase:
        secret = turned(kind, secret, phase)
        if phase == "introduce":
            turn = "" if turn else TURN
    return template.replace("{secret}", secret).replace("{turn}", turn)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "directory": {"type": "path", "required": True},
            "credentials": {"type": "list", "elements": "dict", "required": True},
            "given": {"type": "dict", "default": {}, "no_log": True},
            "rotate": {"type": "list", "elements": "str", "default": []},
            "phase": {"choices": PHASES, "default": PHASES[0]},
        },
        supports_check_mode=True,
    )
    directory, made = Path(module.params["directory"]), []
    rotation = Rotation(directory)
    unknown = set(module.params["rotate"]) - {item["file"] for item in module.params["credentials"]}
    if unknown:
        module.fail_json(msg=f"expected credentials of this host to rotate, found {sorted(unknown)}")
    credentials, given = module.params["credentials"], module.params["given"]
    if wrong := unlike(credentials, given):
        module.fail_json(
            msg=f"secrets_given: expected for {', '.join(wrong)} what this host would make itself (a password is 43 of "
            "A-Z a-z 0-9 _ -), found something else; make one by: openssl rand -base64 32 | tr +/ -_ | tr -d ="
        )
    own = {item["file"] for item in credentials if item["kind"] != "given"}
    for item in credentials:
        if item["kind"] == "given" and item["file"] in own:
            continue
        path = directory / item["file"]
        phase = module.params["phase"] if item["file"] in module.params["rotate"] else None
        if item["file"] in given or (phase and not rotation.is_to_do(item["file"], phase)):
            phase = None
        try:
            found = decrypt(path)
            wanted = wanted_content(item, found, given, phase)
            if found != wanted:
                made.append(item["file"])
                if not module.check_mode:
                    encrypt(path, wanted)
            if phase and not module.check_mode:
                rotation.done(item["file"], phase)
        except Unreadable as error:
            module.fail_json(msg=str(error))
        except subprocess.CalledProcessError as error:
            module.fail_json(msg=f"{path}: systemd-creds could not encrypt it: {error.stderr.strip()}")
    module.exit_json(changed=bool(made), made=made)


if __name__ == "__main__":
    main()
