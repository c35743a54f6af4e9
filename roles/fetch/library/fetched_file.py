#!/usr/bin/python3
"""Ansible module: a file from the network, fetched by an account that may do nothing else, and put in place by root."""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import pwd
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = r"""
module: fetched_file
short_description: Fetch a file as an unprivileged account, compare it, and put it in place
description:
  - The host's firewall lets root fetch nothing. The account writes what it receives into a pipe and owns no file.
  - A file that is there and right is left alone, without asking the network.
options:
  url:
    description: where it is, by http or https
    type: str
    required: true
  path:
    description: where it goes; the folder is there
    type: path
    required: true
  sha256:
    description: what the file must be; either this or O(openpgp_fingerprint)
    type: str
  openpgp_fingerprint:
    description: the fingerprint of the one public key that the file must hold
    type: str
  account:
    description: the account that fetches
    type: str
    default: quern-fetch
extends_documentation_fragment: files
author: Quern
"""

_CHUNK = 1 << 20
#: Debian's: any account may run it.
_PYTHON = "/usr/bin/python3"
#: A signing key is some kilobytes: more than this is none.
_KEY_BYTES = 1 << 20
_PUBLIC_KEY_TAG = 6
_DOWNLOAD = """
import shutil, sys, urllib.request
with urllib.request.urlopen(sys.argv[1], timeout=60) as answer:
    shutil.copyfileobj(answer, sys.stdout.buffer, 1 << 20)
"""


class NotAsExpectedError(Exception):
    """The file could not be fetched, or is another one; the text says what was expected and what was found."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def dearmored(content: bytes) -> bytes:
    """The binary form of a key file, which may be armored (RFC 4880, section 6.2), in several blocks even."""
    armored = rb"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(.*?)\r?\n-----END PGP"
    plain = []
    for block in re.finditer(armored, content, flags=re.DOTALL):
        # Headers end with an empty line; the checksum is a line of its own that starts with "=".
        lines = re.split(rb"\r?\n[ \t]*\r?\n", b"\n" + block[1], maxsplit=1)[-1].split()
        try:
            plain.append(base64.b64decode(b"".join(line for line in lines if not line.startswith(b"=")), validate=True))
        except binascii.Error as error:
            raise NotAsExpectedError(f"expected an armored OpenPGP key, found bad base64 ({error})") from error
    return b"".join(plain) or content


def packets(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Tag and body of every packet (RFC 4880, section 4.2)."""
    at = 0
    try:
        while at < len(content):
            header = content[at]
            if not header & 0x80:
                raise NotAsExpectedError("expected OpenPGP packets, found something else")
            if header & 0x40:
                tag, first = header & 0x3F, content[at + 1]
                if first < 192:
                    start, length = at + 2, first
                elif first < 224:
                    start, length = at + 3, ((first - 192) << 8) + content[at + 2] + 192
                elif first == 255:
                    start, length = at + 6, int.from_bytes(content[at + 2 : at + 6], "big")
                else:
                    raise NotAsExpectedError("expected whole OpenPGP packets, found one in parts")
            else:
                width = {0: 1, 1: 2, 2: 4}.get(header & 0x03, 0)
                tag, start = (header >> 2) & 0x0F, at + 1 + width
                length = int.from_bytes(content[at + 1 : start], "big") if width else len(content) - start
            if start + length > len(content):
                raise NotAsExpectedError("expected whole OpenPGP packets, found a cut one")
            yield tag, content[start : start + length]
            at = start + length
    except IndexError as error:
        raise NotAsExpectedError("expected whole OpenPGP packets, found a cut one") from error


def fingerprints(content: bytes) -> list[str]:
    """The fingerprint of every primary key of version 4 in the file (RFC 4880, section 12.2), in upper case."""
    found = []
    for tag, body in packets(dearmored(content)):
        if tag != _PUBLIC_KEY_TAG:
            continue
        if body[:1] != b"\x04":
            raise NotAsExpectedError(f"expected OpenPGP keys of version 4, found version {body[:1].hex()}")
        prefix = b"\x99" + len(body).to_bytes(2, "big")
        found.append(hashlib.sha1(prefix + body, usedforsecurity=False).hexdigest().upper())
    return found


def compare(path: Path, sha256: str | None, fingerprint: str | None) -> None:
    """Raises NotAsExpectedError unless the file is what it is said to be."""
    if sha256 and (digest := sha256_of(path)) != sha256.lower():
        raise NotAsExpectedError(f"expected SHA-256 {sha256.lower()}, found {digest}")
    if fingerprint:
        wanted = fingerprint.replace(" ", "").upper()
        if path.stat().st_size > _KEY_BYTES:
            raise NotAsExpectedError(f"expected an OpenPGP key, found a file of {path.stat().st_size} bytes")
        # One more key would be trusted as well.
        if (found := fingerprints(path.read_bytes())) != [wanted]:
            raise NotAsExpectedError(f"expected the OpenPGP key {wanted} alone, found {found or 'none'}")


def fetch(url: str, account: str, target: IO[bytes]) -> None:
    """Write what the address answers into `target`, as `account` receives it."""
    command = [_PYTHON, "-I", "-c", _DOWNLOAD, url]
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=said,
            cwd="/",
            user=account,
            group=pwd.getpwnam(account).pw_gid,
            extra_groups=[],
        )
        with cast("IO[bytes]", child.stdout) as received:
            while chunk := received.read(_CHUNK):
                target.write(chunk)
        if child.wait():
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines() or ["nothing"]
            raise NotAsExpectedError(f"expected {url} to answer {account}, found: {lines[-1]}")


def put(params: dict[str, str | None], path: Path) -> None:
    """Fetch beside `path`, compare, and rename: whoever looks finds the whole file or the former one."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    partial = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as target:
            fetch(str(params["url"]), str(params["account"]), target)
            target.flush()
            os.fsync(target.fileno())
        try:
            compare(partial, params["sha256"], params["openpgp_fingerprint"])
        except NotAsExpectedError as error:
            raise NotAsExpectedError(
                f"{params['url']}: {error}; correct the address or what it is compared with"
            ) from error
        # Its own mode comes with the next step; until then it is root's alone, as mkstemp made it.
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "sha256": {"type": "str"},
            "openpgp_fingerprint": {"type": "str"},
            "account": {"type": "str", "default": "quern-fetch"},
        },
        required_one_of=[["sha256", "openpgp_fingerprint"]],
        add_file_common_args=True,
        supports_check_mode=True,
    )
    params, path = module.params, Path(module.params["path"])
    if not re.match(r"https?://[^/]", params["url"]):
        module.fail_json(msg=f"expected an address by http or https, found {params['url']}")
    changed = False
    try:
        try:
            compare(path, params["sha256"], params["openpgp_fingerprint"])
        except (FileNotFoundError, NotAsExpectedError):
            changed = True
            if not module.check_mode:
                put(params, path)
    except (OSError, LookupError, NotAsExpectedError) as error:
        module.fail_json(msg=f"{path}: {error}")
    if path.exists():
        attributes = module.load_file_common_arguments(params)
        changed = module.set_fs_attributes_if_different(attributes, changed)
    module.exit_json(changed=changed, path=str(path))


if __name__ == "__main__":
    main()
