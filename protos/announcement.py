"""What nodes and coordinators say about themselves on a LAN, as DNS-SD TXT records: building and reading them.

Pure, no zeroconf. Everything read here was said by anyone who can send a packet: a hint, never a fact. Invariants: a
record that is built fits DNS (255 bytes per string); one that is read gives bounded, printable values or None; no input
raises. Unknown keys are ignored, so both sides may add some.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from protos import limits

COORDINATOR_TYPE = "_hive._tcp.local."
NODE_TYPE = "_hive-node._tcp.local."
FINGERPRINT_CHARACTERS = 16
MAX_ADDRESSES = 8
_MAX_VALUE_BYTES = 200
_HEX = frozenset("0123456789abcdef")

Txt = Mapping[bytes, bytes | None]


@dataclass(frozen=True, slots=True)
class CoordinatorAnnouncement:
    """`fingerprint` is the head of the CA's SHA-256: enough to choose, not to trust."""

    fingerprint: str
    enrolment_port: int
    session_port: int
    protocol: int
    version: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class NodeAnnouncement:
    """`id` is empty until the node joined; `gpu` is the first GPU's name or empty."""

    id: str
    name: str
    version: str
    cores: float
    memory_bytes: int
    gpu: str
    gflops: float
    joined: bool


@dataclass(frozen=True, slots=True)
class CoordinatorSighting:
    """An announcement and the addresses it came with, the most useful first."""

    announcement: CoordinatorAnnouncement
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NodeSighting:
    announcement: NodeAnnouncement
    addresses: tuple[str, ...]


def coordinator_txt(announcement: CoordinatorAnnouncement) -> dict[str, str]:
    return {
        "ca": announcement.fingerprint[:FINGERPRINT_CHARACTERS],
        "port": str(announcement.enrolment_port),
        "session": str(announcement.session_port),
        "protocol": str(announcement.protocol),
        "version": _clean(announcement.version),
        "name": _clean(announcement.name),
    }


def read_coordinator(txt: Txt) -> CoordinatorAnnouncement | None:
    """None for what no coordinator of ours would say."""
    fingerprint = _text(txt, "ca")
    ports = [_whole(txt, key, 65535) for key in ("port", "session")]
    if len(fingerprint) != FINGERPRINT_CHARACTERS or not _HEX.issuperset(fingerprint) or 0 in ports:
        return None
    return CoordinatorAnnouncement(
        fingerprint, ports[0], ports[1], _whole(txt, "protocol", 1_000_000), _text(txt, "version"), _text(txt, "name")
    )


def node_txt(announcement: NodeAnnouncement) -> dict[str, str]:
    return {
        "id": _clean(announcement.id),
        "name": _clean(announcement.name),
        "version": _clean(announcement.version),
        "cores": f"{announcement.cores:g}",
        "memory": str(announcement.memory_bytes),
        "gpu": _clean(announcement.gpu),
        "gflops": f"{announcement.gflops:.4g}",
        "joined": "yes" if announcement.joined else "no",
    }


def read_node(txt: Txt) -> NodeAnnouncement | None:
    name = _text(txt, "name")
    joined = _text(txt, "joined")
    if not name or joined not in ("yes", "no"):
        return None
    return NodeAnnouncement(
        id=_text(txt, "id"),
        name=name,
        version=_text(txt, "version"),
        cores=_number(txt, "cores", 1e6),
        memory_bytes=_whole(txt, "memory", 2**60),
        gpu=_text(txt, "gpu"),
        gflops=_number(txt, "gflops", 1e12),
        joined=joined == "yes",
    )


def usable_addresses(addresses: Iterable[str]) -> tuple[str, ...]:
    """At most MAX_ADDRESSES unicast addresses: IPv4 first, link-local and loopback last, the rest in their order."""
    ranked: dict[str, tuple[bool, bool, bool]] = {}
    for text in addresses:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            continue
        if not (address.is_multicast or address.is_unspecified):
            ranked.setdefault(text, (address.is_loopback, address.is_link_local, address.version == 6))
    return tuple(sorted(ranked, key=lambda text: ranked[text])[:MAX_ADDRESSES])


def instance_label(text: str) -> str:
    """A DNS label of at most 63 bytes for a service instance: letters, digits and dashes of the text."""
    label = "".join(c if c.isascii() and c.isalnum() else "-" for c in text).strip("-")
    return label[:63].strip("-") or "hive"


def _clean(text: str) -> str:
    """Printable, one line, short enough for one TXT string together with its key."""
    printable = "".join(c if c.isprintable() else "?" for c in text[: limits.MAX_NAME_CHARACTERS])
    return printable.encode(errors="replace")[:_MAX_VALUE_BYTES].decode(errors="ignore").strip()


def _text(txt: Txt, key: str) -> str:
    value = txt.get(key.encode())
    return _clean(value[:_MAX_VALUE_BYTES].decode(errors="replace")) if isinstance(value, bytes) else ""


def _whole(txt: Txt, key: str, largest: int) -> int:
    text = _text(txt, key)
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else 0
    return number if number <= largest else 0


def _number(txt: Txt, key: str, largest: float) -> float:
    try:
        number = float(_text(txt, key))
    except ValueError:
        return 0.0
    return number if math.isfinite(number) and 0 <= number <= largest else 0.0
