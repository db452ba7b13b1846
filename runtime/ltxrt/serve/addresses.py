# SPDX-License-Identifier: Apache-2.0
"""Which network addresses a server may reach on behalf of a caller: public ones, and what its operator adds."""

import socket
from collections.abc import Callable
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

__all__ = ["Network", "Resolver", "is_public", "resolve"]

Network = IPv4Network | IPv6Network
#: Host and port to addresses, as text.
Resolver = Callable[[str, int], list[str]]

# Ranges that carry an IPv4 address inside an IPv6 one, or lead to the nearest of many routers. What a gateway makes of
# them is not for us to know, so none counts as public, whatever lies within.
_NEVER = tuple(
    map(
        ip_network,
        (
            "::/96",  # IPv4-compatible
            "::ffff:0:0/96",  # IPv4-mapped
            "::ffff:0:0:0/96",  # IPv4-translated
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",  # NAT64, local
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
            "fec0::/10",  # site-local
            "192.88.99.0/24",  # 6to4 relays
        ),
    )
)


def is_public(address: str, allowed: tuple[Network, ...] = ()) -> bool:
    """Whether an address is globally routable unicast, or in a network that the operator allows.

    Args:
        address: As a resolver gives it; a zone (``%eth0``) makes it link-local.
        allowed: Networks that count as public.
    """
    if "%" in address:
        return False
    parsed = ip_address(address)
    if any(parsed in network for network in allowed):
        return True
    special = parsed.is_multicast or parsed.is_reserved or any(parsed in network for network in _NEVER)
    return parsed.is_global and not special


def resolve(host: str, port: int) -> list[str]:
    """All addresses of a host. Every spelling of an address (decimal, octal, hex) is one to the resolver too.

    Raises:
        OSError: There is no such host.
    """
    return list(dict.fromkeys(str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)))
