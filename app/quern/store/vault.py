"""Secrets at rest: what the database may hold only encrypted (webhook secrets, answers kept for repetition)."""

import base64

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


class VaultError(Exception):
    """A stored secret cannot be decrypted with any of the keys at hand."""


class Vault:
    """Encrypts with the first key, decrypts with any: put a new key first to rotate.

    Fernet: AES-128-CBC with HMAC-SHA-256, https://github.com/fernet/spec.
    """

    def __init__(self, *keys: str) -> None:
        self._fernet = MultiFernet([Fernet(key) for key in keys])

    def encrypt(self, plain: bytes) -> bytes:
        return self._fernet.encrypt(plain)

    def decrypt(self, sealed: bytes) -> bytes:
        """Raises VaultError when no key fits."""
        try:
            return self._fernet.decrypt(sealed)
        except InvalidToken:
            raise VaultError("no key in QUERN_SECRET_KEYS decrypts this; was an old key removed too early?") from None


def from_client_secret(*secrets: str) -> Vault:
    """A vault whose key only the client can give again: what it seals, the server cannot read at rest."""
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"quern idempotent answer").derive(
        "\0".join(secrets).encode()
    )
    return Vault(base64.urlsafe_b64encode(key).decode())
