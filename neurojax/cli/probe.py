"""`neurojax probe`: measures this host and the links to others, and writes a fleet file."""

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from neurojax.cli.console import stderr
from neurojax.cli.options import check_out
from neurojax.plan.fleet import DecodeRates

if TYPE_CHECKING:
  from neurojax.plan.fleet import Device, Fleet


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
  """Measure this host's devices and its links to running stage servers, and write a fleet file.

  Takes a minute or two for each GPU and for the CPUs; leave the machine alone meanwhile. Run it on each
  host, and join the files with --add.

  Example: neurojax probe --listen-address 10.0.0.1:7001 --peers 10.0.0.2:7001 --out fleet.toml
  """

  name: str | None = None
  """Name of this host in the fleet file; its network name if absent."""
  listen_address: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT")] = None
  """Address where others reach the stage server of this host."""
  peers: Annotated[str | None, tyro.conf.arg(metavar="HOST:PORT,...")] = None
  """Running stage servers: the links to them are measured."""
  arch: Annotated[str | None, tyro.conf.arg(metavar="NAME|TOML")] = None
  """Measure decoding with layers of this architecture, if plans are for it: the rate depends on the
  widths of layers."""
  add: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="TOML ...")] = ()
  """Fleet files that `neurojax probe` wrote on other hosts: their hosts join the result."""
  out: Annotated[Path | None, tyro.conf.arg(metavar="TOML")] = None
  """Write the fleet to this file."""
  json: bool = False
  """Print the fleet as one JSON object."""
  quick: bool = False
  """Measure for seconds: shows whether probing works, not what the host can do."""

  def run(self) -> int:
    from neurojax.config import ModelConfig, to_toml
    from neurojax.plan.fleet import check_address, read_fleet

    peers = [part.strip() for part in (self.peers or "").split(",") if part.strip()]
    for address in (*peers, *([self.listen_address] if self.listen_address else [])):
      check_address(address)
    if self.out and self.out.suffix != ".toml":
      raise ValueError(f"--out {self.out}: a fleet file's name ends in .toml")
    check_out("--out", self.out)
    layers_of = ModelConfig.named(self.arch) if self.arch else None
    others = [read_fleet(str(path)) for path in self.add]
    # JAX and gRPC take seconds to import: only after everything that can be wrong was looked at.
    from neurojax.measure.machine.probe import probe

    with _progress() as say:
      fleet = probe(
        self.name,
        address=self.listen_address,
        peers=peers,
        layers_of=layers_of,
        quick=self.quick,
        others=others,
        say=say,
      )
    if self.out:
      command = f"neurojax {shlex.join(sys.argv[1:] if sys.argv[1:2] == ['probe'] else ['probe'])}"
      self.out.write_text(f"# {command}\n{to_toml(fleet)}", encoding="utf-8")
    if self.json:
      print(json.dumps(dataclasses.asdict(fleet)))
    else:
      _print(fleet)
      if self.out:
        stderr.print(f"wrote {self.out}", markup=False, highlight=False)
    return 0


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
  """Shows what is measured at the moment: one changing line on a terminal, else a line for each part."""
  if stderr.is_terminal:
    with stderr.status("") as status:
      yield lambda text: status.update(escape(f"measuring {text}"))
  else:
    yield lambda text: stderr.print(
      f"measuring {text}", markup=False, highlight=False, soft_wrap=True
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
    "of that in use, GB": lambda device: f"{device.used_bytes / 1e9:.1f}",
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
    "added by each layer, us": lambda device: _show(device.layer_overhead_s, 1e-6),
    "added by each stage, us": lambda device: _show(device.step_overhead_s, 1e-6),
    "added by each hand-over, us": lambda device: _show(device.handover_s, 1e-6),
    "sampling from 100,000 tokens, us": lambda device: _show(device.sample_s_per_entry, 1e-11),
  }
  for name, show in rows.items():
    table.add_row(name, *(show(place.device) for place in places))
  links = Table(title="links", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
  links.add_column("between")
  links.add_column("latency one way, ms", justify="right")
  links.add_column("MB/s", justify="right")
  ways = [(" and ".join(links.hosts), links.latency_s, links.bytes_per_s) for link in fleet.links]
  ways.append(("two stages on this host", fleet.local_latency_s, fleet.local_bytes_per_s))
  for ends, latency_s, bytes_per_s in ways:
    links.add_row(ends, f"{latency_s * 1e3:.3f}", f"{bytes_per_s / 1e6:.0f}")
  console = Console(markup=False)
  console.print(table)
  console.print(links)


def _show(value: float | None, unit: float) -> str:
  return "-" if value is None else f"{value / unit:,.1f}"
