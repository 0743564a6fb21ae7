"""Capacity is found, caps bound it, and what cannot be found out is empty with a note, never an exception."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from node import networks, probe
from node.limits import Caps
from node.networks import InterfaceAddress
from protos import documents, machine_bounds
from protos.capacity import Capacity, TrustedNetwork
from protos.errors import ErrorCode, HiveError

PRESENT = [
    InterfaceAddress("lo", "127.0.0.1", 8),
    InterfaceAddress("eth0", "fd00::5", 64),
    InterfaceAddress("eth0", "192.168.7.5", 24),
    InterfaceAddress("wlan0", "10.1.2.3", 16),
]


def test_this_machine_is_described_and_the_description_travels(tmp_path: Path) -> None:
    found = probe.capacity(tmp_path / "not" / "made" / "yet")
    assert 0 < found.cores <= found.cores_total
    assert 0 < found.memory_bytes <= found.memory_total_bytes * 0.8
    assert found.disk_free_bytes > 0
    assert found.networks == (networks.LOOPBACK,)
    assert documents.decode(Capacity, documents.encode(found)) == found


def test_caps_bound_what_is_granted_but_not_the_totals(tmp_path: Path) -> None:
    found = probe.capacity(tmp_path, Caps(cpus=0.25, memory_bytes=100 * 2**20, gpus=0, max_upload_bytes_per_s=5.0))
    assert (found.cores, found.memory_bytes, found.gpus) == (0.25, 100 * 2**20, ())
    assert found.max_upload_bytes_per_s == 5.0
    assert found.memory_total_bytes > 100 * 2**20
    assert probe.capacity(tmp_path, Caps(cpus=10_000.0)).cores == machine_bounds.available_cores()


def test_the_machine_id_is_stable_and_not_the_raw_one(tmp_path: Path) -> None:
    first, second = probe.capacity(tmp_path).machine_id, probe.capacity(tmp_path).machine_id
    assert first == second and len(first) == 32
    for path in (Path("/etc/machine-id"), Path("/proc/sys/kernel/random/boot_id")):
        if path.exists():
            assert path.read_text().strip().replace("-", "") != first


def test_a_probe_that_fails_leaves_a_note_and_an_empty_field() -> None:
    notes: list[str] = []

    def broken() -> int:
        raise OSError("no such device")

    assert probe.attempt("battery", broken, 7, notes) == 7
    assert notes == ["battery: OSError: no such device"]


def test_named_links_resolve_to_address_and_interface() -> None:
    found = networks.trusted_networks(["eth0", "10.1.0.0/16", "eth0"], PRESENT)
    assert found == (
        networks.LOOPBACK,
        TrustedNetwork("192.168.7.0/24", "eth0", "192.168.7.5"),
        TrustedNetwork("10.1.0.0/16", "wlan0", "10.1.2.3"),
    )


@pytest.mark.parametrize("name", ["eth9", "172.16.0.0/12", "300.1.1.1/24", ""])
def test_a_link_that_is_not_here_is_a_usage_error_that_lists_what_is(name: str) -> None:
    with pytest.raises(HiveError) as caught:
        networks.trusted_networks([name], PRESENT)
    assert caught.value.code is ErrorCode.USAGE
    assert "eth0 (fd00::5/64, 192.168.7.5/24)" in caught.value.hint


def test_this_machines_own_interfaces_are_listed() -> None:
    assert any(entry.address == "127.0.0.1" and entry.prefix == 8 for entry in networks.interface_addresses())


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("2,0", [2, 0]),
        ("1,9,0", [1]),
        ("GPU-b", [1]),
        ("GPU-", []),
        ("-1", []),
        ("0,0", [0]),
    ],
)
def test_visible_gpus_are_read_as_cuda_reads_them(variable: str | None, expected: list[int]) -> None:
    assert probe.visible_indices(variable, ["GPU-a1", "GPU-b2", "GPU-c3"]) == expected


@given(some.text(max_size=20))
def test_any_visible_variable_gives_existing_indices(variable: str) -> None:
    assert set(probe.visible_indices(variable, ["GPU-a", "GPU-b"])) <= {0, 1}


def test_affinity_bounds_the_cores() -> None:
    assert machine_bounds.available_cores() <= len(os.sched_getaffinity(0))
