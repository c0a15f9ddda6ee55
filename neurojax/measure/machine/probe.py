"""Measures this host and the links to running stage servers, as a fleet that plans are made for."""

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Sequence

from neurojax.config import ModelConfig
from neurojax.measure.machine import links
from neurojax.measure.machine.devices import probe_devices
from neurojax.measure.machine.handover import with_handover
from neurojax.measure.machine.links import Measured, Peer
from neurojax.plan.fleet import Fleet, Host, Link, check_address, merged

_SECONDS, _QUICK_SECONDS = 1.0, 0.2
"""Seconds that round trips of a link are measured for, and as long again for its bandwidth."""


def probe(
  name: str | None = None,
  *,
  address: str | None = None,
  peers: Sequence[str] = (),
  layers_of: ModelConfig | None = None,
  quick: bool = False,
  others: Sequence[Fleet] = (),
  say: Callable[[str], None] = lambda _: None,
) -> Fleet:
  """Measure the devices of this host, and the links from it to running stage servers.

  Takes a minute or two for each GPU and for the CPUs. Whatever else runs meanwhile is measured too.

  Args:
    name: Name of this host in the fleet; its network name if absent.
    address: host:port where others reach the stage server of this host.
    peers: Addresses, host:port, of the stage servers to measure the links to.
    layers_of: Architecture whose layers show the rate of decoding; a middling size if absent.
    quick: Measure for seconds: shows whether probing works, not what the host can do.
    others: Fleets that were probed on other hosts. What they say of their hosts joins the result.
    say: Called with a few words before each part of the work.
  Raises:
    ValueError: An address that is none, or a peer with the name of this host.
    StageLost: A stage server does not answer.
    OSError: A process that measures a device failed.
    EngineError: A stage server that was started to be measured failed.
  """
  for one in (*peers, *([] if address is None else [address])):
    check_address(one)
  local, met = asyncio.run(_measure_links(peers, _QUICK_SECONDS if quick else _SECONDS, say))
  # A peer with this host's name is refused before minutes are spent on devices.
  fleet = fleet_of(Host(name=name or socket.gethostname(), address=address), local, met)
  devices = probe_devices(quick=quick, layers_of=layers_of, say=say)
  if not quick:
    devices = asyncio.run(with_handover(devices, local, say=say))
  here = dataclasses.replace(fleet.hosts[0], devices=devices)
  fleet = dataclasses.replace(fleet, hosts=(here, *fleet.hosts[1:]))
  return merged([fleet, *others])


async def _measure_links(
  peers: Sequence[str], seconds: float, say: Callable[[str], None]
) -> tuple[Measured, list[Peer]]:
  met = []
  # One after the other: they would share this host's connection.
  for address in peers:
    say(f"link to {address}: round trips and bandwidth")
    met.append(await links.meet(address, seconds=seconds))
  say("link between two processes of this host: round trips and bandwidth")
  return await links.loopback(seconds=seconds), met


def fleet_of(here: Host, local: Measured, met: Sequence[Peer]) -> Fleet:
  """The fleet of one host, which is the coordinator, and of the stage servers that it met.

  Args:
    local: The link between two processes on the host.
  Raises: ValueError: a peer has the name of the host.
  """
  hosts, between = [here], []
  for peer in met:
    # A stage server on this very host, for one, is reached but is not another host.
    if peer.name == here.label:
      raise ValueError(
        f"the stage server at {peer.address} is called {peer.name}, as this host is: give this host "
        "another name (--name)"
      )
    hosts.append(Host(name=peer.name, address=peer.address, memory_bytes=peer.memory_bytes))
    ends = (here.label, peer.name)
    between.append(
      Link(hosts=ends, latency_s=peer.link.latency_s, bytes_per_s=peer.link.bytes_per_s)
    )
  return Fleet(
    hosts=tuple(hosts),
    links=tuple(between),
    local_latency_s=local.latency_s,
    local_bytes_per_s=local.bytes_per_s,
    coordinator=here.label,
  )
