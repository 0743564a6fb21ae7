"""What a node trusts follows its interfaces: a network that is gone is not trusted, and is again when it is back."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from node import networks
from node.networks import InterfaceAddress
from strategies.backend_torch import gloo_device

LO, WIRED = InterfaceAddress("lo", "127.0.0.1", 8), InterfaceAddress("eth0", "192.168.7.5", 24)
OFFICE = InterfaceAddress("eth0", "10.1.2.3", 16)


def test_a_network_that_is_gone_is_left_out_and_comes_back() -> None:
    names = ["10.1.0.0/16", "eth0"]
    assert networks.still_here(names, [LO, WIRED, OFFICE]) == ("10.1.0.0/16", "eth0")
    assert networks.still_here(names, [LO, WIRED]) == ("eth0",)
    assert networks.still_here(names, [LO]) == ()
    for present in ([LO], [LO, WIRED], [LO, WIRED, OFFICE]):
        here = networks.trusted_networks(networks.still_here(names, present), present)
        assert here[0] == networks.LOOPBACK


def test_a_cidr_names_its_own_address_of_an_interface_that_has_several() -> None:
    (_, trusted) = networks.trusted_networks(["10.1.0.0/16"], [LO, WIRED, OFFICE])
    assert (trusted.interface, trusted.address) == ("eth0", "10.1.2.3")


def test_a_group_without_a_trusted_address_is_not_made() -> None:
    assert isinstance(gloo_device("127.0.0.1"), dist.ProcessGroupGloo.Device)
    with pytest.raises((RuntimeError, ValueError)):
        gloo_device("")
    with pytest.raises(RuntimeError):
        gloo_device("192.0.2.7")  # not an address of this machine
