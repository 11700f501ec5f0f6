"""The network interface by which training workers reach each other."""

from __future__ import annotations

import os


def use_node_interface(address: str = "") -> None:
    """Have Gloo talk by the interface that has this node's address in Ray (or `address`), unless GLOO_SOCKET_IFNAME is set.

    By itself it takes the address that the host's own name stands for, which in /etc/hosts is often a loopback one: workers
    on other hosts then cannot connect. To be called on each worker, before `init_process_group`. Where no interface has the
    address, as behind a NAT, Gloo chooses.
    """
    if not address:
        import ray

        address = ray.util.get_node_ip_address()
    if interface := find_interface(address):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def find_interface(address: str) -> str:
    """Name of the interface with this IPv4 or IPv6 address; empty where there is none."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address.partition("%")[0] == address for one in addresses):
            return name
    return ""
