"""Zeroconf on this machine's interfaces: announce one service, watch one kind of service. The only file that opens it.

Owns sockets, re-announcement when interfaces change, and the bounds on what strangers on the LAN can make us hold: at
most MAX_SEEN services and MAX_ADDRESSES addresses of each, resolved one after the other. Refuses to fail its owner:
where multicast does not work, `problem` says why in a sentence and everything else goes on.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from zeroconf import BadTypeInNameException, InterfaceChoice, ServiceStateChange, Zeroconf
from zeroconf import Error as ZeroconfError
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from protos.announcement import Txt, instance_label, usable_addresses

MAX_SEEN = 256
INTERFACE_CHECK_S = 5.0
_RESOLVE_MS = 2000
_CLOSE_S = 5.0
_log = logging.getLogger("hive.lan")


@dataclass(frozen=True, slots=True)
class Service:
    """What is announced: `label` must be unique on the LAN; `txt` comes from protos.announcement."""

    kind: str
    label: str
    port: int
    txt: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Seen:
    """One service as it was resolved, unchecked."""

    txt: Txt
    addresses: tuple[str, ...]


def local_addresses() -> tuple[str, ...]:
    """Addresses of the interfaces that are up, as they may be announced; loopback only when there is nothing else."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = [
        address.address
        for name, addresses in sorted(psutil.net_if_addrs().items())
        for address in addresses
        if name in up and address.family in (socket.AF_INET, socket.AF_INET6) and "%" not in address.address
    ]
    return usable_addresses([each for each in found if not each.startswith("127.") and each != "::1"] or ["127.0.0.1"])


class Lan:
    """One zeroconf instance. Use `async with`; announce and watch inside.

    `interfaces`: addresses of those to use, None for all. `addresses`: what to announce, asked every `check_s`.
    """

    def __init__(
        self,
        interfaces: Sequence[str] | None = None,
        addresses: Callable[[], tuple[str, ...]] | None = None,
        check_s: float = INTERFACE_CHECK_S,
    ) -> None:
        chosen = tuple(interfaces) if interfaces is not None else None
        self._interfaces: Any = InterfaceChoice.All if chosen is None else list(chosen)
        self._addresses = addresses or (local_addresses if chosen is None else lambda: chosen)
        self._check_s = check_s
        self._zeroconf: AsyncZeroconf | None = None
        self._announced: tuple[Service, AsyncServiceInfo] | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._changes: asyncio.Queue[tuple[str, str, bool]] = asyncio.Queue(2 * MAX_SEEN)
        self._seen: dict[str, Seen] = {}
        self._change = asyncio.Event()
        self._tasks: set[asyncio.Future[Any]] = set()
        self.problem = ""

    async def __aenter__(self) -> Lan:
        try:
            self._zeroconf = AsyncZeroconf(interfaces=self._interfaces)
            await self._zeroconf.zeroconf.async_wait_for_start()
        except (OSError, RuntimeError, ZeroconfError) as error:
            await self._failed("zeroconf cannot be opened", error)
        else:
            self._run(asyncio.create_task(self._follow_interfaces(), name="lan interfaces"))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._close()

    async def announce(self, service: Service) -> None:
        """Announce a service, or change what is announced. Does not wait for the repeated packets to be out."""
        if self._zeroconf is None:
            return
        info = self._info(service)
        try:
            if self._announced is not None and self._announced[1].name == info.name:
                self._run(asyncio.ensure_future(await self._zeroconf.async_update_service(info)))
            else:
                await self.withdraw()
                registered = await self._zeroconf.async_register_service(
                    info,
                    cooperating_responders=True,
                    strict=False,  # labels are unique: no need to probe for them
                )
                self._run(asyncio.ensure_future(registered))
        except (OSError, ZeroconfError, BadTypeInNameException) as error:
            self.problem = f"zeroconf cannot announce {service.label}: {error or type(error).__name__}"
            _log.warning("%s", self.problem)
        else:
            self._announced = (service, info)

    async def withdraw(self) -> None:
        """Stop announcing; goodbye packets are sent."""
        if self._zeroconf is not None and self._announced is not None:
            _, info = self._announced
            self._announced = None
            await (await self._zeroconf.async_unregister_service(info))

    def watch(self, kind: str) -> None:
        """Collect services of a kind from now on."""
        if self._zeroconf is not None:
            self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, kind, handlers=[self._changed])
            self._run(asyncio.create_task(self._resolve(), name="lan resolve"))

    @property
    def seen(self) -> tuple[Seen, ...]:
        return tuple(self._seen.values())

    def next_change(self) -> asyncio.Event:
        """Set when what is `seen` changes next: take it, look, then wait."""
        return self._change

    def _changed_now(self) -> None:
        self._change.set()
        self._change = asyncio.Event()

    def _run(self, task: asyncio.Future[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _changed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        try:
            self._changes.put_nowait((service_type, name, state_change is not ServiceStateChange.Removed))
        except asyncio.QueueFull:
            _log.warning("too many announcements on the LAN at once: some are ignored")

    async def _resolve(self) -> None:
        while True:
            kind, name, present = await self._changes.get()
            if not present:
                if self._seen.pop(name, None) is not None:
                    self._changed_now()
            elif self._zeroconf is not None and (name in self._seen or len(self._seen) < MAX_SEEN):
                try:
                    info = AsyncServiceInfo(kind, name)
                    found = await info.async_request(self._zeroconf.zeroconf, _RESOLVE_MS)
                    addresses = usable_addresses(info.parsed_addresses()) if found else ()
                except Exception:  # a malformed answer of a stranger must not end the watching
                    _log.debug("an announcement could not be read", exc_info=True)
                    continue
                if addresses:
                    self._seen[name] = Seen(dict(info.properties), addresses)
                    self._changed_now()

    async def _follow_interfaces(self) -> None:
        """A laptop changes networks: join the new ones and say again where we are."""
        known = self._addresses()
        while True:
            await asyncio.sleep(self._check_s)
            now = self._addresses()
            if now == known or self._zeroconf is None:
                continue
            known = now
            try:
                await self._zeroconf.async_update_interfaces(self._interfaces)
            except (OSError, RuntimeError, ZeroconfError) as error:
                _log.warning("zeroconf could not follow a change of interfaces: %s", error)
            if self._announced is not None:
                await self.announce(self._announced[0])

    def _info(self, service: Service) -> AsyncServiceInfo:
        label = instance_label(service.label)
        return AsyncServiceInfo(
            service.kind,
            f"{label}.{service.kind}",
            port=service.port,
            properties=dict(service.txt),
            server=f"{label}.local.",
            parsed_addresses=list(self._addresses()),
        )

    async def _failed(self, what: str, error: Any) -> None:
        self.problem = f"{what}: {error}"
        _log.warning("%s; this machine can still be reached by its address", self.problem)
        await self._close()

    async def _close(self) -> None:
        zeroconf, self._zeroconf, browser, self._browser = self._zeroconf, None, self._browser, None
        self._announced = None
        if zeroconf is None:
            return
        try:
            async with asyncio.timeout(_CLOSE_S):
                if browser is not None:
                    await browser.async_cancel()
                await zeroconf.async_unregister_all_services()
                await zeroconf.async_close()
        except (TimeoutError, OSError, ZeroconfError):
            _log.debug("zeroconf did not close cleanly", exc_info=True)
