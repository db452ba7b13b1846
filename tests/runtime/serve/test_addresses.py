# SPDX-License-Identifier: Apache-2.0
"""Which addresses count as public, form by form."""

import socket
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ltxrt.serve.addresses import is_public, resolve

INSIDE = (
    *("127.0.0.1", "127.255.255.254", "0.0.0.0", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.0.1"),
    *("169.254.169.254", "100.64.0.1", "100.127.255.255", "192.0.0.1", "192.0.2.1", "198.18.0.1", "198.51.100.7"),
    *("203.0.113.9", "224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255", "192.88.99.1"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "2001:db8::1"),
    *("::ffff:127.0.0.1", "::ffff:169.254.169.254", "::ffff:8.8.8.8", "::127.0.0.1", "::ffff:0:127.0.0.1"),
    *("64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a9fe:a9fe::1"),
    *("2001::1", "2001:0:7f00:1::", "100::1"),
)


@pytest.mark.parametrize("address", INSIDE)
def test_inside(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "93.184.216.34", "2606:4700::1111", "2a00:1450:4001::1"])
def test_outside(address):
    assert is_public(address)


def test_the_operator_may_allow_a_network():
    allowed = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert is_public("10.9.9.9", allowed)
    assert is_public("fd00::1", allowed)
    assert not is_public("127.0.0.1", allowed)
    assert not is_public("::ffff:10.9.9.9", allowed)


@given(st.integers(0, 2**32 - 1))
def test_no_ipv6_form_makes_an_ipv4_address_public(number):
    tail = f"{number >> 16:x}:{number & 0xFFFF:x}"
    for prefix in ("::ffff:", "::", "64:ff9b::"):
        assert not is_public(str(ip_address(f"{prefix}{tail}")))
    assert not is_public(str(ip_address(f"2002:{tail}::")))


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "0177.0.0.1", "127.1", "127.0.0.1", "localhost"])
def test_every_spelling_of_loopback_resolves_to_an_address_inside(host):
    try:
        addresses = resolve(host, 80)
    except socket.gaierror:
        pytest.skip("this system's resolver does not take that spelling")
    assert addresses
    assert not any(map(is_public, addresses))
