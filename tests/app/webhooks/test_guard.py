"""Which URLs and addresses webhooks may reach: the rules, without a network."""

import ipaddress
import threading
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quern.webhooks.guard import (
    ForbiddenAddressError,
    ForbiddenURLError,
    NameResolutionError,
    check_addresses,
    parse_target,
    refusal,
    resolve,
)
from quern.webhooks.settings import WebhookSettings

STRICT = WebhookSettings()


def settings(**changes: Any) -> WebhookSettings:
    return WebhookSettings.model_validate(changes)


INTERNAL = [
    "0.0.0.0",  # noqa: S104
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.255.254",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.255",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::7f00:1",
    "::ffff:127.0.0.1",
    "::ffff:8.8.8.8",
    "64:ff9b::7f00:1",
    "64:ff9b::808:808",
    "64:ff9b:1::1",
    "100::1",
    "2001::1",
    "2001:10::1",
    "2001:db8::1",
    "2002:7f00:1::1",
    "2002:808:808::1",
    "2606:4700::5efe:7f00:1",
    "2606:4700::200:5efe:10.0.0.1",
    "3fff::1",
    "4000::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%lo",
    "fec0::1",
    "ff02::1",
]
PUBLIC = ["1.1.1.1", "8.8.8.8", "9.255.255.255", "11.0.0.1", "172.32.0.1", "2606:4700::1111", "2a00:1450::1"]


@pytest.mark.parametrize("address", INTERNAL)
def test_internal_and_special_addresses_are_refused(address: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        check_addresses("hooks.example.com", [address], STRICT)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_legal(address: str) -> None:
    assert check_addresses("hooks.example.com", [address], STRICT) == (ipaddress.ip_address(address),)


def test_one_internal_address_among_public_ones_condemns_the_name() -> None:
    with pytest.raises(ForbiddenAddressError):
        check_addresses("hooks.example.com", ["8.8.8.8", "10.0.0.1"], STRICT)


def test_a_name_without_addresses_is_no_target() -> None:
    with pytest.raises(NameResolutionError):
        check_addresses("hooks.example.com", [], STRICT)


@given(st.integers(0, 2**32 - 1))
def test_no_ipv4_address_that_python_knows_as_special_is_legal(number: int) -> None:
    address = IPv4Address(number)
    if refusal(address, "hooks.example.com", STRICT) is None:
        assert address.is_global
        assert not (address.is_private or address.is_loopback or address.is_link_local or address.is_multicast)
        assert not (address.is_reserved or address.is_unspecified)


@given(st.integers(0, 2**128 - 1) | st.integers(2**125, 2**126 - 1))
def test_no_ipv6_address_that_python_knows_as_special_is_legal(number: int) -> None:
    address = IPv6Address(number)
    if refusal(address, "hooks.example.com", STRICT) is None:
        assert address.is_global
        assert address in ipaddress.ip_network("2000::/3")
        assert address.ipv4_mapped is None and address.sixtofour is None and address.teredo is None


@given(st.sampled_from([a for a in INTERNAL if ":" not in a]), st.integers(0, 2**64))
def test_no_ipv6_form_of_an_internal_ipv4_address_is_legal(internal: str, tail: int) -> None:
    inner = int(IPv4Address(internal))
    for number in (
        inner,
        (0xFFFF << 32) | inner,
        (0x64FF9B << 96) | inner,
        (0x2002 << 112) | (inner << 80) | (tail & (2**80 - 1)),
    ):
        assert refusal(IPv6Address(number), "hooks.example.com", STRICT) is not None


def test_an_allowed_network_opens_only_itself() -> None:
    opened = settings(allow_networks=["10.20.0.0/16"])
    assert check_addresses("hooks.corp", ["10.20.3.4"], opened)
    with pytest.raises(ForbiddenAddressError):
        check_addresses("hooks.corp", ["10.21.0.1"], opened)


def test_an_allowed_translation_prefix_opens_only_public_addresses_behind_it() -> None:
    opened = settings(allow_networks=["64:ff9b::/96", "::ffff:0:0/96", "2002::/16"])
    assert check_addresses("hooks.example.com", ["64:ff9b::808:808", "::ffff:8.8.8.8", "2002:808:808::1"], opened)
    for address in ("64:ff9b::7f00:1", "::ffff:169.254.169.254", "2002:a00:1::1"):
        with pytest.raises(ForbiddenAddressError):
            check_addresses("hooks.example.com", [address], opened)


def test_a_denied_network_stays_denied_whatever_allows_it() -> None:
    denied = settings(
        deny_networks=["8.8.8.0/24", "10.0.0.5/32"], allow_networks=["10.0.0.0/8"], allow_hosts=["a.corp"]
    )
    for address in ("8.8.8.8", "10.0.0.5"):
        with pytest.raises(ForbiddenAddressError, match="denied by the operator"):
            check_addresses("a.corp", [address], denied)
    assert check_addresses("a.corp", ["10.0.0.6"], denied)


@pytest.mark.parametrize("address", ["10.0.0.1", "192.168.0.1", "127.0.0.1", "fd12::1", "::1", "100.64.0.1"])
def test_an_allowed_host_may_resolve_to_the_operators_own_network(address: str) -> None:
    opened = settings(allow_hosts=["Hooks.Corp.", "*.lan"])
    assert check_addresses("hooks.corp", [address], opened)
    assert check_addresses("a.b.lan", [address], opened)
    for other in ("lan", "xhooks.corp", "hooks.corp.example.com", "evillan"):
        with pytest.raises(ForbiddenAddressError):
            check_addresses(other, [address], opened)


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "fd00:ec2::254", "fe80::1", "0.0.0.1", "224.0.0.1", "::ffff:10.0.0.1"]
)
def test_not_even_an_allowed_host_reaches_metadata_or_multicast(address: str) -> None:
    with pytest.raises(ForbiddenAddressError):
        check_addresses("hooks.corp", [address], settings(allow_hosts=["hooks.corp"]))


@pytest.mark.parametrize(
    ("url", "host", "port", "path"),
    [
        ("https://hooks.example.com/quern", "hooks.example.com", 443, "/quern"),
        ("HTTPS://Hooks.Example.COM.:8443", "hooks.example.com", 8443, "/"),
        ("https://hooks.example.com?a=b&c=%20", "hooks.example.com", 443, "/?a=b&c=%20"),
        ("https://bücher.example/", "xn--bcher-kva.example", 443, "/"),
        ("https://8.8.8.8/", "8.8.8.8", 443, "/"),
        ("https://[2606:4700:0::1111]/", "2606:4700::1111", 443, "/"),
        ("https://my_host.example.com/", "my_host.example.com", 443, "/"),
    ],
)
def test_a_usual_url_is_taken_apart(url: str, host: str, port: int, path: str) -> None:
    target = parse_target(url, STRICT)
    assert (target.scheme, target.host, target.port, target.path) == ("https", host, port, path)
    assert parse_target(target.url, STRICT) == target


@pytest.mark.parametrize(
    "url",
    [
        "",
        "hooks.example.com",
        "//hooks.example.com/",
        "http://hooks.example.com/",
        "ftp://hooks.example.com/",
        "file:///etc/passwd",
        "gopher://hooks.example.com/",
        "javascript:alert(1)",
        "https://",
        "https:///path",
        "https:hooks.example.com",
        "https://user@hooks.example.com/",
        "https://user:pass@hooks.example.com/",
        "https://8.8.8.8@127.0.0.1/",
        "https://@hooks.example.com/",
        "https://hooks.example.com/#fragment",
        "https://hooks.example.com#@127.0.0.1/",
        "https://hooks.example.com\\@127.0.0.1/",
        "https://hooks.example.com/a b",
        "https://hooks.example.com/\r\nX-Evil: 1",
        "https://hooks.example.com/\x00",
        "https://hooks.\u2028example.com/",
        "https://hooks.example.com:22/",
        "https://hooks.example.com:80/",
        "https://hooks.example.com:0/",
        "https://hooks.example.com:65536/",
        "https://hooks.example.com:https/",
        "https://hooks.example.com:-1/",
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0x7f000001/",
        "https://0x7f.1/",
        "https://0177.0.0.1/",
        "https://127.0.0.1./",
        "https://169.254.169.254/latest/meta-data/",
        "https://\uff11\uff12\uff17.\uff10.\uff10.\uff11/",
        "https://①②⑦.0.0.1/",
        "https://127\u30020\u30020\u30021/",
        "https://[::1]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[fe80::1%25eth0]/",
        "https://[::1/",
        "https://localhost/",
        "https://redis/",
        "https://hooks..example.com/",
        "https://-hooks.example.com/",
        "https://.example.com/",
        "https://hooks.exam ple.com/",
        "https://hooks.example.com/ä",
        "https://xn--a/",
        "https://\u200d.example.com/",
        "https://" + "a" * 64 + ".example.com/",
        "https://" + "a." * 130 + "example.com/",
        "https://hooks.example.com/" + "a" * 2048,
    ],
)
def test_urls_that_a_parser_could_read_differently_or_that_lead_inside_are_refused(url: str) -> None:
    with pytest.raises(ForbiddenURLError):
        parse_target(url, STRICT)


def test_http_and_other_ports_are_the_operators_choice() -> None:
    opened = settings(allow_http=True, allow_ports=[443, "8000-8010"])
    assert parse_target("http://hooks.example.com/", opened).port == 80
    assert parse_target("http://hooks.example.com:8010/", opened).authority == "hooks.example.com:8010"
    with pytest.raises(ForbiddenURLError):
        parse_target("http://hooks.example.com:8011/", opened)
    with pytest.raises(ForbiddenURLError):
        parse_target("https://hooks.example.com:8443/", opened)


def test_a_single_label_or_a_literal_is_legal_only_when_the_operator_says_so() -> None:
    assert parse_target("https://localhost/", settings(allow_hosts=["localhost"])).host == "localhost"
    assert parse_target("https://10.1.2.3/", settings(allow_networks=["10.0.0.0/8"])).host == "10.1.2.3"


@given(st.text(st.characters(codec="utf-8"), max_size=60))
@example("https://[")
@example("https://a:b:c")
@example("https://a@[::1]:443#@b")
def test_every_text_is_either_a_clean_target_or_refused(text: str) -> None:
    for url in (text, "https://" + text):
        try:
            target = parse_target(url, STRICT)
        except ForbiddenURLError:
            continue
        assert target.scheme == "https" and target.port in (443, 8443)
        assert target.host.isascii() and target.path.startswith("/")
        assert not set("@\\#\r\n \t") & set(target.host + target.path.partition("?")[0])
        assert parse_target(target.url, STRICT) == target


@pytest.mark.parametrize("ports", [[0], [65_536], ["9-8"], ["http"], ["1-"], ["-5"], ["٣"]])
def test_a_wrong_port_setting_is_refused_with_an_example(ports: list[object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        settings(allow_ports=ports)


@pytest.mark.parametrize("host", ["", "*", "*.", "http://a", "a b", "a.*.b", "a:443"])
def test_a_wrong_host_setting_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match="expected a host name"):
        settings(allow_hosts=[host])


def test_a_resolver_that_does_not_answer_is_given_up_on() -> None:
    release = threading.Event()

    def hanging(host: str, port: int) -> list[str]:
        release.wait(60)
        return ["8.8.8.8"]

    try:
        with pytest.raises(NameResolutionError, match="no answer"):
            resolve(hanging, "hooks.example.com", 443, 0.05)
    finally:
        release.set()
