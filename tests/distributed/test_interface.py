"""Ranks on several hosts connect from the interface that leads to rank 0."""

import psutil
import pytest

from pipeline import distributed

OWN = [(name, entry.address) for name, entries in psutil.net_if_addrs().items() for entry in entries
       if entry.family.name == "AF_INET" and not entry.address.startswith("127.")]  # fmt: skip


@pytest.mark.skipif(not OWN, reason="this host has no network")
@pytest.mark.parametrize(
    ("size", "local", "master", "given", "chosen"),
    [
        ("2", "1", "own", None, True),
        ("2", "2", "own", None, False),  # all ranks are here
        ("2", "1", "127.0.0.1", None, False),
        ("2", "1", "localhost", None, False),
        ("2", "1", "own", "eth7", False),
    ],
)
def test_the_interface_of_the_route_to_rank_0_is_chosen(monkeypatch, size, local, master, given, chosen):
    interface, address = OWN[0]
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.setenv("MASTER_ADDR", address if master == "own" else master)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if given:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", given)
    distributed._choose_interface()
    assert distributed.os.environ.get("GLOO_SOCKET_IFNAME") == (interface if chosen else given)
