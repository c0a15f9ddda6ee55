"""The machines at hand. Imports no JAX."""

import dataclasses
import re
from pathlib import Path

from neurojax.config import from_toml

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Host:
  """One stage server.

  Attributes:
    address: host:port.
    name: What errors and tables call it; the address if absent.
    memory_bytes: What the plan may use at most; what the server reports as free if absent.
  """

  address: str
  name: str | None = None
  memory_bytes: int | None = None

  def __post_init__(self) -> None:
    check_address(self.address)
    if self.memory_bytes is not None and self.memory_bytes < 1:
      raise ValueError(f"memory_bytes = {self.memory_bytes}: it must be positive")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fleet:
  """Stage servers, in the order in which the layers pass through them."""

  hosts: tuple[Host, ...]

  def __post_init__(self) -> None:
    if not self.hosts:
      raise ValueError("a fleet needs at least one host")
    addresses = [host.address for host in self.hosts]
    twice = next((a for a in addresses if addresses.count(a) > 1), None)
    if twice:
      raise ValueError(f"address {twice} is listed twice: each stage server appears once")


def read_fleet(text: str) -> Fleet:
  """From the path of a TOML file ([[hosts]] tables) or a list "host:port,host:port".

  Raises: ValueError: neither, or a bad address. FileNotFoundError: a .toml path that is not there.
  """
  if text.endswith(".toml"):
    try:
      table = Path(text).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
      raise ValueError(f"{text}: not UTF-8 at byte {error.start}") from error
    return from_toml(Fleet, table, where=text)
  parts = [part.strip() for part in text.split(",") if part.strip()]
  return Fleet(hosts=tuple(Host(address=part) for part in parts))


def check_address(address: str) -> None:
  """Raises: ValueError: not host:port with a port of at most 65535."""
  match = _ADDRESS.fullmatch(address)
  if not match or int(match[2]) > 65535:
    raise ValueError(f"address {address!r}: write host:port, for example 127.0.0.1:7001")


def parse_bytes(text: str) -> int:
  """Bytes of a size such as 6GB, 512MiB or 1000000. Raises: ValueError: none of these."""
  match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B?\s*", text)
  if not match:
    raise ValueError(
      f"size {text[:40]!r}: write a number with kB, MB, GB, TB or KiB, MiB, GiB, TiB"
    )
  unit = match[2] or ""
  power = "kMGT".index(unit[0].replace("K", "k")) + 1 if unit else 0
  number = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power
  if not 1 <= number < 2**62:
    raise ValueError(f"size {text[:40]!r}: it must be positive, and memory that a machine can have")
  size = int(number)
  return size
