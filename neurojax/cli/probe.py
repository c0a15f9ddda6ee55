"""`neurojax probe`: what this host can do, and what lies between it and others."""

import asyncio
import dataclasses
import json
import shlex
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from neurojax.cli.options import check_out, stderr
from neurojax.plan.fleet import DecodeRates

if TYPE_CHECKING:
  from neurojax.measure.machine.links import Measured, Peer
  from neurojax.plan.fleet import Device, Fleet, Host

_SECONDS, _QUICK_SECONDS = 1.0, 0.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """Measure this host's devices and, given running stage servers, the way to them: a fleet file.

  Takes a minute or two for each GPU and for the CPUs; leave the machine alone meanwhile.

  Example: neurojax probe --listen-address 10.0.0.1:7001 --peers 10.0.0.2:7001 --out fleet.toml
  """

  name: str | None = None
  """What the fleet file calls this host; its network name if absent."""
  listen_address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Where others reach the stage server of this host."""
  peers: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT,...")] = None
  """Running stage servers to measure the way to."""
  arch: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """Measure decoding with layers of this architecture, for plans of it: the rate depends on the shape."""
  add: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TOML ...")] = ()
  """Fleet files of other hosts' probes: what they say of themselves joins what is measured here."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Write the fleet to this file."""
  json: bool = False
  """Print the fleet as one JSON object."""
  quick: bool = False
  """Measure seconds, not minutes: whether it works, not what the host can do."""

  def run(self) -> int:
    from neurojax.config import ModelConfig, to_toml
    from neurojax.plan.fleet import check_address, merged, read_fleet

    addresses = [part.strip() for part in (self.peers or "").split(",") if part.strip()]
    for address in (*addresses, *([self.listen_address] if self.listen_address else [])):
      check_address(address)
    if self.out and self.out.suffix != ".toml":
      raise ValueError(f"--out {self.out}: a fleet file's name ends in .toml")
    check_out("--out", self.out)
    layers_of = ModelConfig.named(self.arch) if self.arch else None
    others = [read_fleet(str(path)) for path in self.add]
    # JAX and gRPC take seconds to import: only after everything that can be wrong was looked at.
    from neurojax.measure.machine import links
    from neurojax.measure.machine.devices import probe_devices

    seconds = _QUICK_SECONDS if self.quick else _SECONDS

    async def measure_links() -> "tuple[Measured, list[Peer]]":
      # One after the other: they would share this host's connection.
      met = [await links.meet(address, seconds=seconds) for address in addresses]
      return await links.loopback(seconds=seconds), met

    with stderr.status("measuring links"):
      local, met = asyncio.run(measure_links())
    with stderr.status("measuring devices"):
      devices = probe_devices(quick=self.quick, layers_of=layers_of)
    if not self.quick:
      from neurojax.measure.machine.handover import with_handover

      with stderr.status("measuring stage servers"):
        devices = asyncio.run(with_handover(devices, local))
    here = self._host(devices)
    fleet = merged([_fleet(here, local, met), *others])
    if self.out:
      command = f"neurojax {shlex.join(sys.argv[1:] if sys.argv[1:2] == ['probe'] else ['probe'])}"
      self.out.write_text(f"# {command}\n{to_toml(fleet)}", encoding="utf-8")
    if self.json:
      print(json.dumps(dataclasses.asdict(fleet)))
    else:
      _print(fleet)
      if self.out:
        stderr.print(f"wrote {self.out}")
    return 0

  def _host(self, devices: "tuple[Device, ...]") -> "Host":
    from neurojax.plan.fleet import Host

    name = self.name or socket.gethostname()
    return Host(name=name, address=self.listen_address, devices=devices)


def _fleet(here: "Host", local: "Measured", met: "list[Peer]") -> "Fleet":
  """Raises: ValueError: a peer has the name of another host."""
  from neurojax.plan.fleet import Fleet, Host, Link

  hosts, links = [here], []
  for peer in met:
    # A stage server on this very host, for one, is reached but is not another host.
    if peer.name == here.label:
      raise ValueError(
        f"the stage server at {peer.address} is called {peer.name} as this host is: give --name"
      )
    hosts.append(Host(name=peer.name, address=peer.address, memory_bytes=peer.memory_bytes))
    ends = (here.label, peer.name)
    links.append(Link(hosts=ends, latency_s=peer.link.latency_s, bytes_per_s=peer.link.bytes_per_s))
  return Fleet(
    hosts=tuple(hosts),
    links=tuple(links),
    local_latency_s=local.latency_s,
    local_bytes_per_s=local.bytes_per_s,
    coordinator=here.label,
  )


def _print(fleet: "Fleet") -> None:
  places = fleet.places()
  table = Table(title="devices", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  table.add_column("")
  for place in places:
    table.add_column(place.label, justify="right")
  rows: dict[str, Callable[[Device], str]] = {
    "device": lambda device: device.name or device.kind,
    "memory, GB": lambda device: f"{device.memory_bytes / 1e9:.1f}",
    "of it in use, GB": lambda device: f"{device.used_bytes / 1e9:.1f}",
    "reads, GB/s": lambda device: _show(device.read_bytes_per_s, 1e9),
    **{
      f"decode {form.name}, GB/s": lambda device, form=form: _show(
        getattr(device.decode_bytes_per_s, form.name), 1e9
      )
      for form in dataclasses.fields(DecodeRates)
    },
    "products, GFLOP/s": lambda device: _show(device.flops_per_s, 1e9),
    "in": lambda device: device.flops_dtype if device.flops_per_s else "-",
    "upload, GB/s": lambda device: _show(device.upload_bytes_per_s, 1e9),
    "for each layer, us": lambda device: _show(device.layer_overhead_s, 1e-6),
    "for each stage, us": lambda device: _show(device.step_overhead_s, 1e-6),
    "for each stage but the last, us": lambda device: _show(device.handover_s, 1e-6),
    "drawing of 100,000 entries, us": lambda device: _show(device.sample_s_per_entry, 1e-11),
  }
  for name, show in rows.items():
    table.add_row(name, *(show(place.device) for place in places))
  links = Table(title="links", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  links.add_column("between")
  links.add_column("one way, ms", justify="right")
  links.add_column("MB/s", justify="right")
  ways = [(" and ".join(links.hosts), links.latency_s, links.bytes_per_s) for link in fleet.links]
  ways.append(("two stages on one host", fleet.local_latency_s, fleet.local_bytes_per_s))
  for ends, latency_s, bytes_per_s in ways:
    links.add_row(ends, f"{latency_s * 1e3:.3f}", f"{bytes_per_s / 1e6:.0f}")
  console = Console(markup=False)
  console.print(table)
  console.print(links)


def _show(value: float | None, unit: float) -> str:
  return "-" if value is None else f"{value / unit:,.1f}"
