from __future__ import annotations

import os
import socket

import psutil
import pytest
import torch.distributed as dist

from jobs.network import find_interface, use_node_interface


def test_every_address_of_this_host_has_its_interface() -> None:
    own = {
        one.address.partition("%")[0]: name
        for name, addresses in psutil.net_if_addrs().items()
        for one in addresses
        if one.family in (socket.AF_INET, socket.AF_INET6)
    }
    assert own["127.0.0.1"] == find_interface("127.0.0.1")
    for address in own:
        assert find_interface(address)
    assert find_interface("203.0.113.77") == "", "an address for documentation, that nobody has"


def test_gloo_is_told_unless_someone_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that what the function sets is undone
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    use_node_interface("203.0.113.77")
    assert "GLOO_SOCKET_IFNAME" not in os.environ
    use_node_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == find_interface("127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "by-hand")
    use_node_interface("127.0.0.1")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "by-hand"


def test_gloo_listens_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable has an effect in the installed PyTorch: an interface that does not exist is an error."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-one")
    store = dist.HashStore()
    with pytest.raises(RuntimeError, match="no-such-one"):
        dist.ProcessGroupGloo(store, 0, 1)
