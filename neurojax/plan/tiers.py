"""Makes fleets of well-known machines from vendors' datasheets, for users who have none to probe.

python -m neurojax.plan.tiers lab configs/fleet/lab.toml

Datasheets give the peak of memory and matrix units, which decoding does not reach, and no overhead of
layers and stages. Measure your own machines with `neurojax probe`.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from neurojax.config import to_toml
from neurojax.plan.fleet import Device, Fleet, Host, Link

GIB = 1 << 30


def _card(name: str, gib: int, read: float, flops: float, upload: float) -> Device:
  return Device(
    kind="cuda",
    name=name,
    memory_bytes=gib * GIB,
    # The driver, a CUDA context and XLA's own programs.
    used_bytes=GIB,
    read_bytes_per_s=read,
    flops_per_s=flops,
    upload_bytes_per_s=upload,
  )


CARDS: Mapping[str, Device] = {
  # Memory, its bandwidth, dense bf16 with float32 sums, one direction of the PCIe slot.
  # NVIDIA H100 datasheet: 3.35 TB/s, 1,979 TFLOPS with sparsity (half without), PCIe Gen5 128 GB/s.
  "h100": _card("NVIDIA H100 SXM 80GB", 80, 3.35e12, 989.4e12, 64e9),
  # NVIDIA H200 datasheet: 4.8 TB/s, products as the H100's; nvidia-smi says 143,771 MiB.
  "h200": _card("NVIDIA H200 SXM 141GB", 140, 4.8e12, 989.4e12, 64e9),
  # NVIDIA A100 datasheet (nvidia-1758950-r4): 2,039 and 1,555 GB/s, 312 TFLOPS, PCIe Gen4 64 GB/s.
  "a100": _card("NVIDIA A100 SXM 80GB", 80, 2.039e12, 312e12, 32e9),
  "a100-40": _card("NVIDIA A100 SXM 40GB", 40, 1.555e12, 312e12, 32e9),
  # NVIDIA L40S datasheet: 864 GB/s, 362.05 TFLOPS, PCIe Gen4 x16 64 GB/s.
  "l40s": _card("NVIDIA L40S 48GB", 48, 864e9, 362.05e12, 32e9),
  # NVIDIA L4 datasheet: 300 GB/s, 242 TFLOPS with sparsity, PCIe Gen4 x16 64 GB/s.
  "l4": _card("NVIDIA L4 24GB", 24, 300e9, 121e12, 32e9),
  # NVIDIA Ada GPU architecture white paper, appendix A: 1,008 GB/s, 165.2 TFLOPS.
  "rtx4090": _card("NVIDIA GeForce RTX 4090 24GB", 24, 1.008e12, 165e12, 32e9),
  # NVIDIA Ampere GA102 GPU architecture white paper v2.0, appendix A: 936 GB/s, 71 TFLOPS.
  "rtx3090": _card("NVIDIA GeForce RTX 3090 24GB", 24, 936e9, 71e12, 32e9),
  # Its product page: 192 bits of GDDR6 (360 GB/s), 3584 CUDA cores at 1.78 GHz; PCIe Gen4 x16. Its bf16
  # rate is not published: twice its FP32 rate (12.7), as the RTX 3090's is.
  "rtx3060": _card("NVIDIA GeForce RTX 3060 12GB", 12, 360e9, 25e12, 32e9),
}
"""Vendors' numbers, not measured, by the name of the card: the one place where they stand.

One direction of PCIe is half of what datasheets give for both. The numbers of H100, A100, L40S and of
the RTX 4090's products were checked against copies and tables of third parties; those of H200 and L4,
of the RTX 3090's products and of the RTX 3060 are unverified."""

CPUS: Mapping[str, Device] = {
  "desktop": Device(
    kind="cpu",
    name="desktop CPU, 8 cores, 2 channels of DDR5-5600",
    memory_bytes=32 * GIB,
    used_bytes=4 * GIB,
    read_bytes_per_s=89.6e9,
  ),
  "server": Device(
    kind="cpu",
    name="server CPU, 12 channels of DDR5-4800",
    memory_bytes=384 * GIB,
    used_bytes=16 * GIB,
    read_bytes_per_s=460.8e9,
  ),
}
"""Hosts' CPUs with their memory. Bandwidth is channels times transfers per second times 8 bytes (5600 MT/s
x 2 x 8, 4800 MT/s x 12 x 8), not measured; their FLOP/s are not known."""


def datasheet_flops_per_s(device_kind: str) -> float | None:
  """Dense bfloat16 FLOP/s of a data center GPU, from its maker's datasheet.

  Args:
    device_kind: What JAX calls the device, for example "NVIDIA H100 80GB HBM3".
  Returns: None where no word of the name is a card of `CARDS`, as for CPUs.
  """
  words = device_kind.lower().replace("-", " ").split()
  return next((CARDS[word].flops_per_s for word in words if word in CARDS), None)


TIERS: Mapping[str, int] = {
  "seed-40gb": 40,
  "seed-200gb": 200,
  "seed-800gb": 800,
  "seed-4tb": 4096,
  "seed-8tb": 8192,
}
"""Gigabytes of the rows of the table that this project started from, made of whole cards."""

_ETHERNET = {"latency_s": 0.0002, "bytes_per_s": 10e9 / 8}
_INFINIBAND = {"latency_s": 0.00001, "bytes_per_s": 400e9 / 8}


def fleet(name: str) -> Fleet:
  """Make a fleet of `NAMES`. Raises: ValueError: no fleet has this name."""
  if name == "cpu":
    return Fleet(hosts=(Host(name="box", devices=(CPUS["desktop"],)),), coordinator="box")
  if name == "gaming-pc":
    host = Host(name="pc", devices=(CARDS["rtx4090"], CPUS["desktop"]))
    return Fleet(hosts=(host,), coordinator="pc")
  if name == "lab":
    return _lab()
  if name in TIERS:
    return _tier(TIERS[name])
  raise ValueError(f"fleet {name!r}: choose one of {', '.join(NAMES)}")


NAMES = ("cpu", "gaming-pc", "lab", *TIERS)


def _lab() -> Fleet:
  """Mixed cards behind one 10 Gbit/s switch, and a slow host on 1 Gbit/s."""
  desktop = CPUS["desktop"]
  hosts = (
    Host(name="rack", devices=(CARDS["a100-40"],) * 2 + (CPUS["server"],)),
    Host(name="render", devices=(CARDS["l40s"], desktop)),
    Host(name="desk-1", devices=(CARDS["rtx4090"], desktop)),
    Host(name="desk-2", devices=(CARDS["rtx3090"], CARDS["rtx3090"], desktop)),
    Host(name="desk-3", devices=(CARDS["rtx3060"], desktop)),
    Host(name="old", devices=(dataclasses.replace(desktop, read_bytes_per_s=25.6e9),)),
  )
  slow = tuple(
    Link(hosts=("old", host.label), latency_s=0.0004, bytes_per_s=1e9 / 8) for host in hosts[:-1]
  )
  return Fleet(hosts=hosts, links=slow, coordinator="rack", **_ETHERNET)


def _tier(memory_gb: int) -> Fleet:
  """Cards of 40 GB up to 400 GB, then of 80 GB, eight to a host."""
  card, each = (CARDS["a100-40"], 40) if memory_gb <= 400 else (CARDS["h100"], 80)
  number = memory_gb // each
  hosts = []
  for index, first in enumerate(range(0, number, 8)):
    hosts.append(Host(name=f"node-{index}", devices=(card,) * min(8, number - first)))
  return Fleet(hosts=tuple(hosts), coordinator="node-0", **_INFINIBAND)


def text(name: str, path: str) -> str:
  """A fleet file, its first line the command that writes it."""
  command = f"# python -m neurojax.plan.tiers {name} {path}\n"
  note = "# Vendor datasheet numbers, not measured: see neurojax/plan/tiers.py.\n\n"
  return command + note + to_toml(fleet(name))


def _main(name: str, path: str) -> None:
  Path(path).write_text(text(name, path), encoding="utf-8")


if __name__ == "__main__":
  import tyro

  tyro.cli(tyro.conf.configure(tyro.conf.PositionalRequiredArgs)(_main))
