"""Network namespaces as machines on one LAN: a switch (a namespace with a bridge) and a link to each machine.

Owns every namespace it makes, by names that no other run has, and removes all of them, however it ends; the machine's
own network is never touched. Addresses may repeat between runs: no two LANs are connected to each other.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import os
import secrets
import shutil
import struct
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

SUBNET = "10.78.0.0/24"
_RUNS = itertools.count()


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def why_not() -> str:
    """Why namespaces cannot be used here, or nothing."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [name for name in ("ip", "tc", "nsenter") if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed"
    try:
        with lan(1):
            return ""
    except RuntimeError as error:
        return f"network namespaces are not allowed here: {error}"


@dataclass(frozen=True, slots=True)
class Machine:
    """One namespace: `prefix` before a command runs it there."""

    namespace: str
    interface: str
    address: str
    port: str  # of the switch

    @property
    def prefix(self) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--"]


@dataclass(slots=True)
class Lan:
    switch: str
    machines: list[Machine] = field(default_factory=list)

    def __getitem__(self, number: int) -> Machine:
        return self.machines[number]

    def cut(self, number: int) -> None:
        """Unplug a machine from the switch: it sees no carrier, its addresses stay."""
        run("ip", "-n", self.switch, "link", "set", self[number].port, "down")

    def heal(self, number: int) -> None:
        run("ip", "-n", self.switch, "link", "set", self[number].port, "up")

    @contextlib.contextmanager
    def cut_off(self, number: int, at_least_s: float = 0.0) -> Iterator[None]:
        """The link is cut inside, and for so long at least."""
        self.cut(number)
        end = time.monotonic() + at_least_s
        try:
            yield
            time.sleep(max(0.0, end - time.monotonic()))  # the outage is what is tested
        finally:
            self.heal(number)

    def shape(self, number: int, rate: str, burst: str = "256kb") -> None:
        """Both directions of one link; the burst exceeds a segment of 64 KB."""
        machine = self[number]
        limit = ("root", "tbf", "rate", rate, "burst", burst, "latency", "50ms")
        run("tc", "-n", self.switch, "qdisc", "replace", "dev", machine.port, *limit)
        run("tc", "-n", machine.namespace, "qdisc", "replace", "dev", machine.interface, *limit)


@contextlib.contextmanager
def lan(machines: int, interfaces: tuple[str, ...] = (), before: Mapping[int, str] | None = None) -> Iterator[Lan]:
    """So many machines at 10.78.0.11 and up, their interface called e0 unless `interfaces` says otherwise.

    `before`: another address of a machine's interface, which the system then lists first.
    """
    tag = f"hx{os.getpid():x}n{next(_RUNS)}{secrets.token_hex(2)}"
    made = Lan(f"{tag}-switch")
    created: list[str] = []
    try:
        run("ip", "netns", "add", made.switch)
        created.append(made.switch)
        run("ip", "-n", made.switch, "link", "add", "lan", "type", "bridge")
        run("ip", "-n", made.switch, "link", "set", "lan", "up")
        for number in range(machines):
            interface = interfaces[number] if number < len(interfaces) else "e0"
            machine = Machine(f"{tag}-{number}", interface, f"10.78.0.{11 + number}", f"port{number}")
            run("ip", "netns", "add", machine.namespace)
            created.append(machine.namespace)
            _plug(made.switch, machine, (before or {}).get(number))
            made.machines.append(machine)
        yield made
    finally:
        for namespace in reversed(created):
            with contextlib.suppress(RuntimeError):
                run("ip", "netns", "del", namespace)


def _plug(switch: str, machine: Machine, before: str | None) -> None:
    there = ("ip", "-n", machine.namespace)
    peer = ("peer", "name", machine.interface, "netns", machine.namespace)
    run("ip", "-n", switch, "link", "add", machine.port, "type", "veth", *peer)
    run("ip", "-n", switch, "link", "set", machine.port, "master", "lan", "up")
    for address in filter(None, (before, f"{machine.address}/24")):
        run(*there, "addr", "add", address, "dev", machine.interface)
    run(*there, "link", "set", machine.interface, "up")
    run(*there, "link", "set", "lo", "up")


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that this one process listens on, in its own network namespace."""
    return {(local[0], local[1]) for local, _, state in _sockets(pid) if state == _LISTEN}


def connections(pid: int) -> set[tuple[str, str]]:
    """(local address, remote address) of every TCP connection of this one process."""
    return {(local[0], remote[0]) for local, remote, state in _sockets(pid) if state != _LISTEN}


_LISTEN = "0A"
_End = tuple[str, int]


def _sockets(pid: int) -> list[tuple[_End, _End, str]]:
    links = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(entry.readlink()))
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if f"socket:[{columns[9]}]" in links:
                found.append((_end(columns[1]), _end(columns[2]), columns[3]))
    return found


def _end(text: str) -> _End:
    """An address of /proc/net/tcp: 32-bit words in host order."""
    address, _, port = text.partition(":")
    words = [int(address[start : start + 8], 16) for start in range(0, len(address), 8)]
    parsed = ipaddress.ip_address(struct.pack(f"={len(words)}I", *words))
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return str(parsed), int(port, 16)
