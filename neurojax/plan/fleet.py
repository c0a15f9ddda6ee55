"""Fleets: machines, their devices and speeds, and the links between them."""

import dataclasses
import functools
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from neurojax.config import from_toml, named_configs
from neurojax.count.working import DeviceKind
from neurojax.forms import Weights

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})")

MOST_BYTES = 2**50
"""Memory of one host at most: more is a slip, and sums over many hosts have to stay exact integers."""

MOST_LATENCY_S = 1e6
RATES = (1.0, 1e24)
"""Least and greatest bytes or operations a second: beyond these floating point cannot add a plan's times."""

LATENCY_S = 0.0005
BYTES_PER_S = 10e9 / 8
"""Link between two hosts where the fleet says nothing: a switched network of 10 Gbit/s."""

LOCAL_LATENCY_S = 0.00002
LOCAL_BYTES_PER_S = 10e9
"""Link between two stages on one host, where nothing was measured."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRates:
  """Bytes of weights per second that decoding one token reads, by the weights' form; None: not measured."""

  dense: float | None = None
  int8: float | None = None
  w2a16: float | None = None
  w2a8: float | None = None

  def of(self, weights: Weights) -> float | None:
    """The rate for one form of weights; None: not measured. "stored" never is: its matrices have many forms."""
    return None if weights == "stored" else getattr(self, weights)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """A device that can hold a stage: a GPU, or all CPUs of a host with the host's memory.

  Attributes:
    kind: "cuda" for an NVIDIA GPU, "cpu" for a host's CPUs.
    name: The maker's name of the device; several devices may have the same.
    memory_bytes: Bytes of memory, in use or not.
    used_bytes: Bytes of it that others use already.
    read_bytes_per_s: Bandwidth of reading memory, at best.
    flops_per_s: FLOP/s of matrix products in `flops_dtype`.
    flops_dtype: Dtype of these products.
    upload_bytes_per_s: Bandwidth from the host's memory to the device's.
    decode_bytes_per_s: The part of `read_bytes_per_s` that decoding reaches, where it was measured.
    layer_overhead_s: Seconds that each layer adds to a decoded token, beside reading.
    step_overhead_s: Seconds that each stage adds to a decoded token, beside reading.
    sample_s_per_entry: Seconds for each entry of the vocabulary that sampling a token takes, on the last
      stage.
    handover_s: Seconds that every stage but the last adds to a token, beside its step and the hop: threads
      and caches go cold, and the report to the coordinator is sent while the next stage works.
  """

  kind: DeviceKind
  name: str | None = None
  memory_bytes: int
  used_bytes: int = 0
  read_bytes_per_s: float | None = None
  flops_per_s: float | None = None
  flops_dtype: Literal["bfloat16", "float32"] = "bfloat16"
  upload_bytes_per_s: float | None = None
  decode_bytes_per_s: DecodeRates = DecodeRates()
  layer_overhead_s: float = 0.0
  step_overhead_s: float = 0.0
  sample_s_per_entry: float = 0.0
  handover_s: float = 0.0

  def check(self, where: str) -> None:
    """Check all values. Raises: ValueError: a value that no device has; `where` names the device."""
    _check_bytes(f"{where}: memory_bytes", self.memory_bytes)
    if not 0 <= self.used_bytes <= self.memory_bytes:
      raise ValueError(
        f"{where}: used_bytes = {self.used_bytes}: it must be between 0 and memory_bytes = "
        f"{self.memory_bytes}"
      )
    for name in ("read_bytes_per_s", "flops_per_s", "upload_bytes_per_s"):
      _check_rate(f"{where}: {name}", getattr(self, name))
    for field in dataclasses.fields(DecodeRates):
      rate = getattr(self.decode_bytes_per_s, field.name)
      _check_rate(f"{where}: decode_bytes_per_s.{field.name}", rate)
    for name in ("layer_overhead_s", "step_overhead_s", "sample_s_per_entry", "handover_s"):
      _check_seconds(f"{where}: {name}", getattr(self, name))

  @property
  def free_bytes(self) -> int:
    return self.memory_bytes - self.used_bytes

  def is_measured(self, weights: Weights) -> bool:
    """True if decoding with weights of this form was measured."""
    return self.decode_bytes_per_s.of(weights) is not None

  def decode_rate(self, weights: Weights) -> float | None:
    """Bytes per second of decoding with weights of this form; the best read rate where unmeasured."""
    return self.decode_bytes_per_s.of(weights) or self.read_bytes_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
  """One machine, or the stage server on it.

  Attributes:
    address: host:port of its stage server.
    name: Name in errors and tables; the address if absent.
    memory_bytes: Bytes that a stage here may take at most; those that the server reports as free if absent.
    devices: Devices, each of them a place for a stage.
    layers: Number of layers that the host has to hold, whatever is best; 0 keeps the host out.
  """

  address: str | None = None
  name: str | None = None
  memory_bytes: int | None = None
  devices: tuple[Device, ...] = ()
  layers: int | None = None

  def __post_init__(self) -> None:
    if self.address is not None:
      check_address(self.address)
    if not (self.address if self.name is None else self.name.strip()):
      raise ValueError(f"a host with name = {self.name!r} and no address: give it either")
    _check_bytes(f"host {self.label}: memory_bytes", self.memory_bytes)
    for label, device in _devices(self):
      if device is not None:
        device.check(f"host {label}")
    if self.layers is not None and self.layers < 0:
      raise ValueError(
        f"host {self.label}: layers = {self.layers}: a number of layers, 0 to keep the host out"
      )

  @property
  def label(self) -> str:
    label = self.address if self.name is None else self.name
    assert label is not None
    return label

  def reach(self) -> str:
    """The address. Raises: ValueError: there is none."""
    if self.address is None:
      raise ValueError(
        f"host {self.label} has no address: start `neurojax stage` there and write its host:port"
      )
    return self.address


@dataclasses.dataclass(frozen=True, kw_only=True)
class Link:
  """The network between two hosts, the same in both directions.

  Attributes:
    hosts: Labels of the two hosts.
    latency_s: Seconds of one way: half a round trip.
    bytes_per_s: Bandwidth of one way.
  """

  hosts: tuple[str, ...]
  latency_s: float
  bytes_per_s: float

  def __post_init__(self) -> None:
    if len(self.hosts) != 2:
      raise ValueError(f"hosts = {list(self.hosts)}: a link has two ends")
    ends = " - ".join(self.hosts)
    _check_seconds(f"link {ends}: latency_s", self.latency_s)
    _check_rate(f"link {ends}: bytes_per_s", self.bytes_per_s)

  def seconds(self, size_bytes: int) -> float:
    """Seconds that one message of this size takes one way."""
    return self.latency_s + size_bytes / self.bytes_per_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """One device of one host, with its free memory: a place for a stage.

  Attributes:
    label: Label of the host, followed by "/cuda1" or the like where the host has several devices.
    free_bytes: Bytes that a stage may take there.
  """

  host: Host
  device: Device
  label: str
  free_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
  """The hosts that are available, with the links between them.

  Attributes:
    hosts: Hosts, in the order of the pipeline unless a plan says otherwise.
    links: Links between pairs of hosts.
    latency_s, bytes_per_s: The link of every pair of hosts that has none of its own.
    local_latency_s, local_bytes_per_s: The link between two stages on one host.
    coordinator: Label of the host that tokens start from and return to; outside the fleet if absent.

  Example:
    >>> import neurojax as nj
    >>> from neurojax.plan.fleet import Device, Host
    >>> gpu = Device(kind="cuda", memory_bytes=24 * 10**9)
    >>> nj.Fleet(hosts=(Host(name="desk", devices=(gpu,)),)).places()[0].label
    'desk'
  """

  hosts: tuple[Host, ...]
  links: tuple[Link, ...] = ()
  latency_s: float = LATENCY_S
  bytes_per_s: float = BYTES_PER_S
  local_latency_s: float = LOCAL_LATENCY_S
  local_bytes_per_s: float = LOCAL_BYTES_PER_S
  coordinator: str | None = None

  def __post_init__(self) -> None:
    if not self.hosts:
      raise ValueError("a fleet needs at least one host")
    twice = _twice(host.address for host in self.hosts if host.address is not None)
    if twice:
      raise ValueError(f"address {twice} is listed twice: each stage server appears once")
    twice = _twice(host.label for host in self.hosts)
    twice = twice or _twice(label for host in self.hosts for label, _ in _devices(host))
    if twice:
      raise ValueError(f"two hosts are called {twice}: give each a name of its own")
    _check_seconds("latency_s", self.latency_s)
    _check_seconds("local_latency_s", self.local_latency_s)
    _check_rate("bytes_per_s", self.bytes_per_s)
    _check_rate("local_bytes_per_s", self.local_bytes_per_s)
    labels = {host.label for host in self.hosts}
    for name in [*(name for link in self.links for name in link.hosts), self.coordinator]:
      if name is not None and name not in labels:
        known = ", ".join(sorted(labels)[:8])
        raise ValueError(f"host {name!r} of a link or as coordinator is not in the fleet: {known}")
    for link in self.links:
      if link.hosts[0] == link.hosts[1]:
        raise ValueError(
          f"a link of {link.hosts[0]} to itself: local_latency_s and local_bytes_per_s of the fleet "
          "say what lies within a host"
        )
    twice = _twice(frozenset(link.hosts) for link in self.links)
    if twice:
      raise ValueError(f"two links between {' and '.join(sorted(twice))}: one goes both ways")

  def link(self, a: str | None, b: str | None) -> Link:
    """The link between two hosts, by label; None is a host outside the fleet.

    Raises: ValueError: no host has this label.
    """
    for label in (a, b):
      if label is not None and label not in self._by_label:
        raise ValueError(f"no host of the fleet is called {label!r}")
    known = self._by_ends.get((a, b))
    if known is not None:
      return known
    ends = (a or "outside", b or "outside")
    if a == b and a is not None:
      return Link(hosts=ends, latency_s=self.local_latency_s, bytes_per_s=self.local_bytes_per_s)
    return Link(hosts=ends, latency_s=self.latency_s, bytes_per_s=self.bytes_per_s)

  @functools.cached_property
  def _by_ends(self) -> dict[tuple[str | None, ...], Link]:
    return {ends: link for link in self.links for ends in (link.hosts, link.hosts[::-1])}

  @functools.cached_property
  def _by_label(self) -> dict[str, Host]:
    return {host.label: host for host in self.hosts}

  def places(self) -> tuple[Place, ...]:
    """Every device of every host, in order. A host without devices is one place of unknown speed.

    Raises: ValueError: the memory of a host is not known.
    """
    found = []
    for host in self.hosts:
      for label, device in _devices(host):
        if device is None:
          raise ValueError(
            f"host {label} says neither memory_bytes nor devices: run `neurojax probe` there, or "
            "write what it may hold"
          )
        free = device.free_bytes
        if host.memory_bytes is not None:
          free = min(free, host.memory_bytes)
        found.append(Place(host=host, device=device, label=label, free_bytes=free))
    return tuple(found)


def read_fleet(text: str) -> Fleet:
  """Read a fleet from a TOML file ([[hosts]] tables), a name in `fleets()`, or "host:port,host:port".

  Raises: ValueError: none of these, a bad address, or a file that cannot be read as a fleet.
  """
  if text.endswith(".toml"):
    return from_toml(Fleet, read_text(text, "the fleet"), where=text)
  if Path(text).exists() and text:
    raise ValueError(
      f"{text}: a fleet file's name ends in .toml; `neurojax probe --out` writes one"
    )
  if text in (known := fleets()):
    return read_fleet(str(known[text]))
  parts = [part.strip() for part in text.split(",") if part.strip()]
  if parts and not any(":" in part for part in parts):
    raise ValueError(
      f"fleet {text[:80]!r}: give the path of a TOML file, which `neurojax probe --out` writes, or addresses "
      f"as host:port,host:port, or one of {', '.join(known)}"
    )
  return Fleet(hosts=tuple(Host(address=part) for part in parts))


def fleets() -> dict[str, Path]:
  """The example fleets: configs/fleet/NAME.toml of the repository or the installed package."""
  return named_configs("fleet")


def read_text(path: str | Path, what: str) -> str:
  """Read a text file. Raises: ValueError: it is missing, a folder, forbidden, or not text."""
  try:
    return Path(path).read_text(encoding="utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from error
  except (FileNotFoundError, NotADirectoryError) as error:
    raise ValueError(f"{path}: no such file; give the path of {what}'s TOML file") from error
  except OSError as error:
    raise ValueError(
      f"{path}: {(error.strerror or str(error)).lower()}; give the path of {what}'s TOML file"
    ) from error


def merged(fleets: Sequence[Fleet]) -> Fleet:
  """Join the fleets of several probes into one.

  Hosts are matched by address or label. Values that an earlier fleet leaves open come from later ones.
  Defaults, the coordinator and the order are those of the first fleet; of two links between the same hosts
  the first stays.
  """
  hosts: dict[str, Host] = {}
  links: dict[frozenset[str], Link] = {}
  for fleet in fleets:
    by_address = {host.address: label for label, host in hosts.items() if host.address}
    called = {host.label: by_address.get(host.address, host.label) for host in fleet.hosts}
    for host in fleet.hosts:
      known = hosts.setdefault(called[host.label], host)
      missing = {
        field.name: getattr(host, field.name)
        for field in dataclasses.fields(Host)
        if field.name != "name" and getattr(known, field.name) in (None, ())
      }
      # Devices that a host measured itself say more than one number of free memory.
      if known.memory_bytes and not known.devices and host.devices:
        missing["memory_bytes"] = host.memory_bytes
      hosts[called[host.label]] = dataclasses.replace(known, **missing)
    for link in fleet.links:
      ends = (called[link.hosts[0]], called[link.hosts[1]])
      links.setdefault(frozenset(ends), dataclasses.replace(link, hosts=ends))
  return dataclasses.replace(fleets[0], hosts=tuple(hosts.values()), links=tuple(links.values()))


def check_address(address: str) -> None:
  """Check an address. Raises: ValueError: not host:port with a port of at most 65535."""
  match = _ADDRESS.fullmatch(address)
  if not match or int(match[2]) > 65535:
    raise ValueError(f"address {address!r}: write host:port, for example 127.0.0.1:7001")


def parse_bytes(text: str) -> int:
  """Read a size such as 6GB, 512MiB or 1000000 as bytes. Raises: ValueError: it is none."""
  match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgtp]i?)?b?\s*", text.lower())
  if not match:
    raise ValueError(
      f"size {text[:40]!r}: write a number with kB, MB, GB, TB, PB or KiB, MiB, GiB, TiB, PiB"
    )
  unit = match[2] or ""
  power = "kmgtp".index(unit[0]) + 1 if unit else 0
  number = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
  if not 1 <= number <= MOST_BYTES:
    raise ValueError(
      f"size {text[:40]!r}: it must be positive and at most {MOST_BYTES / 1e12:,.0f} TB; more than one "
      "host's memory belongs into a fleet file"
    )
  return int(number)


def _devices(host: Host) -> list[tuple[str, Device | None]]:
  """(label, device) of each place on a host; the device is None where the host's memory is not known."""
  if len(host.devices) <= 1:
    if host.devices:
      return [(host.label, host.devices[0])]
    size = host.memory_bytes
    return [(host.label, None if size is None else Device(kind="cpu", memory_bytes=size))]
  seen: Counter[str] = Counter()
  labels = []
  for device in host.devices:
    labels.append((f"{host.label}/{device.kind}{seen[device.kind]}", device))
    seen[device.kind] += 1
  return labels


def _twice(values: Any) -> Any:
  return next((value for value, times in Counter(values).items() if times > 1), None)


def _check_bytes(name: str, value: int | None) -> None:
  if value is not None and not 1 <= value <= MOST_BYTES:
    raise ValueError(
      f"{name} = {value}: it must be positive and at most {MOST_BYTES:,}, a pebibyte, or absent"
    )


def _check_rate(name: str, value: float | None) -> None:
  low, high = RATES
  if value is not None and not low <= value <= high:
    raise ValueError(f"{name} = {value}: it must be from {low:g} to {high:g} a second, or absent")


def _check_seconds(name: str, value: float) -> None:
  if not 0 <= value <= MOST_LATENCY_S:
    raise ValueError(f"{name} = {value}: it must be 0 or more seconds, at most {MOST_LATENCY_S:g}")
