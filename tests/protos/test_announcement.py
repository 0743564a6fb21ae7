"""TXT records: what is built is read back, what strangers send is bounded and never raises."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from zeroconf import ServiceInfo

from protos.announcement import (
    COORDINATOR_TYPE,
    MAX_ADDRESSES,
    NODE_TYPE,
    CoordinatorAnnouncement,
    NodeAnnouncement,
    coordinator_txt,
    instance_label,
    node_txt,
    read_coordinator,
    read_node,
    usable_addresses,
)

ports = st.integers(1, 65535)
nodes = st.builds(
    NodeAnnouncement,
    id=st.text(max_size=300),
    name=st.text(max_size=300),
    version=st.text(max_size=300),
    cores=st.floats(0, 1e5),
    memory_bytes=st.integers(0, 2**50),
    gpu=st.text(max_size=300),
    gflops=st.floats(0, 1e9),
    joined=st.booleans(),
)
coordinators = st.builds(
    CoordinatorAnnouncement,
    fingerprint=st.text("0123456789abcdef", min_size=16, max_size=64),
    enrolment_port=ports,
    session_port=ports,
    protocol=st.integers(0, 1000),
    version=st.text(max_size=300),
    name=st.text(max_size=300),
)
strangers = st.dictionaries(
    st.sampled_from(
        [b"ca", b"port", b"session", b"protocol", b"version", b"name", b"id", b"cores", b"memory", b"gpu", b"gflops"]
    )
    | st.just(b"joined"),
    st.none() | st.binary(max_size=255) | st.sampled_from([b"yes", b"no", b"nan", b"1e999", b"-1", "٣".encode()]),
)


def test_a_plain_announcement_is_read_back_whole() -> None:
    coordinator = CoordinatorAnnouncement("0123456789abcdef", 7700, 7701, 1, "0.1.0", "lab")
    assert read_coordinator(_wire(COORDINATOR_TYPE, coordinator_txt(coordinator))) == coordinator
    node = NodeAnnouncement("n-abc", "box", "0.1.0", 7.5, 17179869184, "RTX 4090", 1234.0, True)
    assert read_node(_wire(NODE_TYPE, node_txt(node))) == node


@given(coordinators)
def test_any_coordinators_words_fit_dns_and_keep_what_matters(announcement: CoordinatorAnnouncement) -> None:
    read = read_coordinator(_wire(COORDINATOR_TYPE, coordinator_txt(announcement)))
    assert read is not None
    assert read.fingerprint == announcement.fingerprint[:16]
    assert (read.enrolment_port, read.session_port) == (announcement.enrolment_port, announcement.session_port)
    assert read.name.isprintable()


@given(nodes)
def test_any_nodes_words_fit_dns_and_keep_what_matters(announcement: NodeAnnouncement) -> None:
    read = read_node(_wire(NODE_TYPE, node_txt(announcement)))
    if read is not None:  # a name without a printable character is no name
        assert (read.joined, read.memory_bytes) == (announcement.joined, announcement.memory_bytes)
        assert read.name.isprintable() and read.gpu.isprintable() and len(read.name) <= 100
        assert abs(read.gflops - announcement.gflops) <= 1e-3 * announcement.gflops


@given(strangers)
def test_a_strangers_words_never_crash_us_and_are_bounded(txt: dict[bytes, bytes | None]) -> None:
    if (node := read_node(txt)) is not None:
        for text in (node.id, node.name, node.version, node.gpu):
            assert text.isprintable() and len(text) <= 100
        assert 0 <= node.cores <= 1e6 and 0 <= node.memory_bytes <= 2**60 and 0 <= node.gflops <= 1e12
    if (coordinator := read_coordinator(txt)) is not None:
        assert 0 < coordinator.enrolment_port < 65536 and 0 < coordinator.session_port < 65536


@given(st.lists(st.text(max_size=50) | st.ip_addresses().map(str), max_size=60))
def test_addresses_are_bounded_and_nearest_last(addresses: list[str]) -> None:
    assert len(usable_addresses(addresses)) <= MAX_ADDRESSES
    assert set(usable_addresses(addresses)) <= set(addresses)


def test_a_reachable_address_comes_before_a_local_one() -> None:
    found = usable_addresses(["127.0.0.1", "fe80::1", "fd00::1", "224.0.0.1", "junk", "10.0.0.1", "0.0.0.0"])
    assert found == ("10.0.0.1", "fd00::1", "fe80::1", "127.0.0.1")


@given(st.text())
def test_any_name_becomes_a_dns_label(text: str) -> None:
    label = instance_label(text)
    assert 0 < len(label.encode()) <= 63 and not label.startswith("-") and not label.endswith("-")


def _wire(kind: str, txt: dict[str, str]) -> dict[bytes, bytes | None]:
    """The records after zeroconf packed and unpacked them."""
    packed = ServiceInfo(kind, f"x.{kind}", port=1, properties=txt, server="x.local.").text
    return dict(ServiceInfo(kind, f"x.{kind}", port=1, properties=packed, server="x.local.").properties)
