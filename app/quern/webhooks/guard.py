"""Keep webhooks from reaching what only this host can reach (server-side request forgery, OWASP API7:2023).

Three gates, all of which must hold:
- the URL: https, a plain host name, an allowed port, no user info (`parse_target`);
- the addresses: every one that the name resolves to, at the time of the attempt (`check_addresses`);
- the connection: made to exactly an address that was checked, in the same call (`PinnedBackend`), so that a name
  which resolves differently the second time gains nothing, for there is no second time.

TLS names and verifies the host, not the address.
"""

from __future__ import annotations

import ipaddress
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import urlsplit

import httpcore2
import idna

from quern.webhooks.settings import WebhookSettings

Address: TypeAlias = IPv4Address | IPv6Address
Network: TypeAlias = IPv4Network | IPv6Network
Resolver: TypeAlias = Callable[[str, int], Sequence[str]]
"""Host and port to numeric addresses, best first; raises OSError (`socket.gaierror`) when the name has none."""

MAX_URL_LENGTH = 2_048
DEFAULT_PORTS = {"https": 443, "http": 80}


class ForbiddenURLError(ValueError):
    """The URL itself breaks the policy; waiting will not help."""


class ForbiddenAddressError(ConnectionError):
    """The host resolves to an address that webhooks may not reach."""


class NameResolutionError(ConnectionError):
    """The host name has no address, or the answer did not come in time."""


class DeadlineError(TimeoutError):
    """The whole attempt took longer than it may."""


class ResponseTooLargeError(ConnectionError):
    """The receiver sent more bytes than an answer may have."""


class TLSError(ConnectionError):
    """The receiver's certificate or its TLS is not acceptable."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL taken apart once, so that what was checked is what is connected to."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


class _Special(NamedTuple):
    network: Network
    name: str
    private: bool = False


def _special(network: str, name: str, private: bool = False) -> _Special:
    return _Special(ipaddress.ip_network(network), name, private)


# IANA's special-purpose address registries (RFC 6890 and later), and what the large clouds answer on besides.
# `private` marks what an operator's own network uses, which naming a host in `allow_hosts` opens.
_SPECIAL = (
    _special("0.0.0.0/8", "this-network"),
    _special("10.0.0.0/8", "private", private=True),
    _special("100.64.0.0/10", "carrier-grade NAT", private=True),
    _special("127.0.0.0/8", "loopback", private=True),
    _special("168.63.129.16/32", "cloud metadata"),
    _special("169.254.0.0/16", "link-local (cloud metadata)"),
    _special("172.16.0.0/12", "private", private=True),
    _special("192.0.0.0/24", "IETF protocol"),
    _special("192.0.2.0/24", "documentation"),
    _special("192.88.99.0/24", "6to4 relay"),
    _special("192.168.0.0/16", "private", private=True),
    _special("198.18.0.0/15", "benchmarking"),
    _special("198.51.100.0/24", "documentation"),
    _special("203.0.113.0/24", "documentation"),
    _special("224.0.0.0/4", "multicast"),
    _special("240.0.0.0/4", "reserved"),
    _special("::1/128", "loopback", private=True),
    _special("::ffff:0:0/96", "IPv4-mapped"),
    _special("64:ff9b::/96", "NAT64"),
    _special("64:ff9b:1::/48", "NAT64"),
    _special("fd00:ec2::/32", "cloud metadata"),
    _special("fc00::/7", "unique-local", private=True),
    _special("fe80::/10", "link-local"),
    _special("fec0::/10", "site-local"),
    _special("ff00::/8", "multicast"),
    _special("2001::/32", "Teredo"),
    _special("2001::/23", "IETF protocol"),
    _special("2001:db8::/32", "documentation"),
    _special("2002::/16", "6to4"),
    _special("3fff::/20", "documentation"),
)
_GLOBAL_UNICAST_V6 = IPv6Network("2000::/3")


def _special_range(address: Address) -> _Special | None:
    for special in _SPECIAL:
        if address.version == special.network.version and address in special.network:
            return special
    if isinstance(address, IPv6Address):
        if address not in _GLOBAL_UNICAST_V6:
            return _Special(IPv6Network(address), "reserved")
        # RFC 5214, 6.1: an interface identifier 0000:5efe or 0200:5efe carries an IPv4 address (ISATAP).
        if (int(address) >> 32) & 0xFDFF_FFFF == 0x0000_5EFE:
            return _Special(IPv6Network(address), "ISATAP")
    # The registries grow: Python's newer copy of them may know a range that the table above does not.
    return None if address.is_global else _Special(ipaddress.ip_network(address), "not globally reachable")


def _embedded_ipv4(address: Address) -> IPv4Address | None:
    """The IPv4 address that a translator or tunnel would really reach for this IPv6 one."""
    if isinstance(address, IPv4Address):
        return None
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in IPv6Network("64:ff9b::/96") or address in IPv6Network("::/96"):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return None


def _in_any(address: Address, networks: Iterable[Network]) -> bool:
    return any(address.version == network.version and address in network for network in networks)


def host_is_allowed(host: str, settings: WebhookSettings) -> bool:
    """Whether the operator named this host, as itself or by a `*.suffix`."""
    return any(
        host.endswith(pattern[1:]) and host != pattern[2:] if pattern.startswith("*.") else host == pattern
        for pattern in settings.allow_hosts
    )


def refusal(address: Address, host: str, settings: WebhookSettings) -> str | None:
    """Why this address is not a legal target, as the name of the range it lies in; None if it is one.

    An operator's denial wins over everything, an allowed network over the built-in ranges. An allowed network of
    translated addresses (NAT64) opens the way only to IPv4 addresses that are legal targets themselves.
    """
    if _in_any(address, settings.deny_networks):
        return "denied by the operator"
    inner = _embedded_ipv4(address)
    if _in_any(address, settings.allow_networks):
        return refusal(inner, host, settings) if inner is not None else None
    special = _special_range(address)
    if special is None or (special.private and host_is_allowed(host, settings)):
        return None
    return special.name


def check_addresses(host: str, addresses: Sequence[str], settings: WebhookSettings) -> tuple[Address, ...]:
    """The addresses, parsed, if every one is a legal target; one bad address among good ones condemns the name.

    Raises ForbiddenAddressError, NameResolutionError (no address at all).
    """
    if not addresses:
        raise NameResolutionError(f"expected an address for {host}, found none")
    checked = []
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            raise ForbiddenAddressError(f"expected a numeric address for {host}, found something else") from None
        reason = refusal(address, host, settings)
        if reason is not None:
            raise ForbiddenAddressError(f"{host} resolves to an address that webhooks may not reach ({reason})")
        checked.append(address)
    return tuple(checked)


# What a URL may be made of here: printable ASCII without the characters that parsers read differently (RFC 3986
# allows none of these unencoded either), and letters outside ASCII, which only the host may have.
_SUSPICIOUS = re.compile(r"[\x00-\x20\x7f\\^`{|}<>\"]|\s")
_HOST_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")


def parse_target(url: str, settings: WebhookSettings) -> Target:
    """Take the URL apart and hold it against the policy, without any network.

    Raises ForbiddenURLError with what was expected and found; also for a literal address that is not a legal target.
    """
    if len(url) > MAX_URL_LENGTH:
        raise ForbiddenURLError(f"expected a URL of at most {MAX_URL_LENGTH} characters, found {len(url)}")
    if _SUSPICIOUS.search(url):
        raise ForbiddenURLError("expected a URL without spaces, control characters or backslashes; percent-encode them")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ForbiddenURLError(
            "expected a URL such as https://hooks.example.com/quern, found something else"
        ) from None
    schemes = ("https", "http") if settings.allow_http else ("https",)
    if parts.scheme not in schemes:
        raise ForbiddenURLError(f"expected a URL that starts with {' or '.join(s + '://' for s in schemes)}")
    if "@" in parts.netloc:
        raise ForbiddenURLError("expected a URL without a user name or password; check the signature instead")
    if "#" in url:
        raise ForbiddenURLError("expected a URL without a fragment (#…), which is never sent")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not path.isascii():
        raise ForbiddenURLError("expected an ASCII path and query; percent-encode other characters")
    port = DEFAULT_PORTS[parts.scheme] if port is None else port
    allowed = (*settings.allow_ports, (80, 80)) if settings.allow_http else settings.allow_ports
    if not any(first <= port <= last for first, last in allowed):
        raise ForbiddenURLError(f"expected one of the ports that the operator allows, found {port}")
    return Target(parts.scheme, _parse_host(parts.hostname or "", settings), port, path)


def _parse_host(text: str, settings: WebhookSettings) -> str:
    """The host as it is looked up and verified: an ASCII name without a final dot, or a canonical literal address."""
    if ":" in text:
        literal = text
    else:
        try:
            literal = idna.encode(text.rstrip("."), uts46=True).decode() if not text.isascii() else text.rstrip(".")
        except idna.IDNAError:
            raise ForbiddenURLError("expected a host name that is valid as an internationalized domain name") from None
    try:
        address = ipaddress.ip_address(literal)
    except ValueError:
        pass
    else:
        if "%" in literal:
            raise ForbiddenURLError("expected an address without a zone (%…)")
        reason = refusal(address, str(address), settings)
        if reason is not None:
            raise ForbiddenURLError(f"expected a host that webhooks may reach, found an address that is {reason}")
        return str(address)
    labels = literal.split(".")
    if len(literal) > 253 or not all(_HOST_LABEL.fullmatch(label) for label in labels):
        raise ForbiddenURLError("expected a host name of letters, digits and hyphens")
    # 127.1, 2130706433 and 0x7f.1 are addresses to the C library and names to others.
    if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", labels[-1]):
        raise ForbiddenURLError("expected a host name or an address in its usual form, found a shortened address")
    if len(labels) == 1 and not host_is_allowed(literal, settings):
        raise ForbiddenURLError("expected a host name with a domain, such as hooks.example.com")
    return literal


def system_resolver(host: str, port: int) -> list[str]:
    """The addresses that the system's resolver gives, in its order (RFC 6724), each once."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found))


def resolve(resolver: Resolver, host: str, port: int, seconds: float) -> Sequence[str]:
    """Ask the resolver, but wait no longer than `seconds`.

    The C library's lookup cannot be interrupted: it gets a thread of its own, which ends when the lookup does. One pool
    for all would let a tenant's slow name servers hold up the others.

    Raises NameResolutionError.
    """
    answer: queue.SimpleQueue[Sequence[str] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answer.put(resolver(host, port))
        except Exception as error:
            answer.put(error)

    threading.Thread(target=look_up, name="webhook-lookup", daemon=True).start()
    try:
        result = answer.get(timeout=max(seconds, 0.001))
    except queue.Empty:
        raise NameResolutionError(f"expected an address for {host} within {seconds:.1f} s, found no answer") from None
    if isinstance(result, (OSError, UnicodeError)):
        raise NameResolutionError(f"expected an address for {host}, found none") from result
    if isinstance(result, Exception):
        raise result
    return result


@dataclass(slots=True)
class Budget:
    """What one attempt may still spend: time until `deadline` (of `clock`, seconds) and bytes to receive."""

    deadline: float
    bytes_left: int
    clock: Callable[[], float] = time.monotonic

    def seconds(self, at_most: float | None = None) -> float:
        """The seconds left, no more than `at_most`; raises DeadlineError when there are none."""
        left = self.deadline - self.clock()
        if left <= 0:
            raise DeadlineError("the attempt took longer than it may")
        return left if at_most is None else min(left, at_most)

    def spend(self, size: int) -> None:
        self.bytes_left -= size
        if self.bytes_left < 0:
            raise ResponseTooLargeError("the receiver sent more than an answer may have")


class BoundedStream(httpcore2.NetworkStream):
    """A stream whose every operation is held to the attempt's budget, however slowly the bytes trickle."""

    def __init__(self, stream: httpcore2.NetworkStream, budget: Budget) -> None:
        self._stream = stream
        self._budget = budget

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = self._stream.read(max_bytes, self._budget.seconds(timeout))
        self._budget.spend(len(data))
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        # Not the stream's own write(), which grants every partial send the whole timeout anew: a receiver that takes a
        # byte now and then would hold a worker for hours.
        sock: socket.socket = self._stream.get_extra_info("socket")
        rest = memoryview(buffer)
        while rest:
            sock.settimeout(self._budget.seconds(timeout))
            try:
                rest = rest[sock.send(rest) :]
            except TimeoutError as error:
                raise httpcore2.WriteTimeout(str(error)) from error
            except OSError as error:
                raise httpcore2.WriteError(str(error)) from error

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        try:
            stream = self._stream.start_tls(ssl_context, server_hostname, self._budget.seconds(timeout))
        except httpcore2.ConnectError as error:
            cause = error.__cause__ or error.__context__
            reason = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else "handshake failed"
            raise TLSError(f"expected a TLS certificate valid for {server_hostname}, found: {reason}") from error
        return BoundedStream(stream, self._budget)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class PinnedBackend(httpcore2.NetworkBackend):
    """Resolves, checks and connects in one step, once. `address` is where it connected to, for the log."""

    def __init__(self, settings: WebhookSettings, budget: Budget, resolver: Resolver = system_resolver) -> None:
        self._settings = settings
        self._budget = budget
        self._resolver = resolver
        self._sockets = httpcore2.SyncBackend()
        self.address: str | None = None

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.NetworkStream:
        addresses = check_addresses(host, resolve(self._resolver, host, port, self._budget.seconds()), self._settings)
        # check_addresses() gave at least one address: this stands for none of them.
        failure: Exception = NameResolutionError(f"expected an address for {host}, found none")
        for address in addresses:
            # A numeric address: connecting asks no resolver again.
            self.address = str(address)
            limit = self._budget.seconds(min(timeout or 3600.0, self._settings.connect_timeout_seconds))
            try:
                stream = self._sockets.connect_tcp(self.address, port, limit, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
            else:
                return BoundedStream(stream, self._budget)
        raise failure
