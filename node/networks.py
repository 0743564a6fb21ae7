"""The links whose owner allows unencrypted collectives: loopback, and what --trusted-lan names."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil

from protos.capacity import TrustedNetwork
from protos.errors import ErrorCode, HiveError

LOOPBACK = TrustedNetwork("loopback", "lo", "127.0.0.1")


@dataclass(frozen=True, slots=True)
class InterfaceAddress:
    """One address of one interface, with the length of its network's prefix."""

    interface: str
    address: str
    prefix: int


def interface_addresses() -> list[InterfaceAddress]:
    """Every IPv4 and global IPv6 address of this machine."""
    found = []
    for interface, addresses in psutil.net_if_addrs().items():
        for entry in addresses:
            if entry.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            address = ipaddress.ip_address(entry.address.partition("%")[0])
            if address.is_link_local:
                continue  # bound to a zone: not an address another machine could use as it stands
            prefix: int = address.max_prefixlen
            if entry.netmask:
                prefix = bin(int(ipaddress.ip_address(entry.netmask))).count("1")
            found.append(InterfaceAddress(interface, str(address), prefix))
    return found


def trusted_networks(names: Sequence[str], present: Sequence[InterfaceAddress]) -> tuple[TrustedNetwork, ...]:
    """Loopback and every named IFACE or CIDR. Raises HiveError (USAGE) for a name that matches nothing here. Pure."""
    found = [LOOPBACK]
    for name in names:
        network = _resolve(name, present)
        if network not in found:
            found.append(network)
    return tuple(found)


def still_here(names: Sequence[str], present: Sequence[InterfaceAddress]) -> tuple[str, ...]:
    """Those that match something now: a cable is pulled or a Wi-Fi left while the daemon runs, and comes back. Pure."""
    found = []
    for name in names:
        with contextlib.suppress(HiveError):
            _resolve(name, present)
            found.append(name)
    return tuple(found)


def _resolve(name: str, present: Sequence[InterfaceAddress]) -> TrustedNetwork:
    for entry in sorted(present, key=lambda entry: ":" in entry.address):  # IPv4 first
        if entry.interface == name:
            network = ipaddress.ip_network(f"{entry.address}/{entry.prefix}", strict=False)
            return TrustedNetwork(str(network), name, entry.address)
    try:
        named = ipaddress.ip_network(name, strict=False)
    except ValueError:
        raise _unknown(f"--trusted-lan {name}: there is no such interface, and it is not a CIDR", present) from None
    for entry in present:
        address = ipaddress.ip_address(entry.address)
        if address.version == named.version and address in named:
            return TrustedNetwork(str(named), entry.interface, entry.address)
    raise _unknown(f"--trusted-lan {name}: no address of this machine is in that network", present)


def _unknown(message: str, present: Sequence[InterfaceAddress]) -> HiveError:
    by_name: Mapping[str, list[str]] = {entry.interface: [] for entry in present}
    for entry in present:
        by_name[entry.interface].append(f"{entry.address}/{entry.prefix}")
    shown = "; ".join(f"{name} ({', '.join(addresses)})" for name, addresses in by_name.items())
    return HiveError(message, f"this machine has: {shown or 'no network interfaces'}", code=ErrorCode.USAGE)
