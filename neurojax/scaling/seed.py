"""The scaling formula and table of the page that this project started from, and their faults.

Source: NeuroLLM's architecture page, "Architecture Scaling" and "Memory Estimation".
"""

import dataclasses
import math

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count.training import train_bytes

VOCAB_SIZE = 50257
GIB = 1024**3

NOTE = """What NeuroLLM's architecture page leaves unsaid is settled: rotary pairs are neighbours (it multiplies
complex numbers), eps is inside the root, no biases, head tied to the embedding; key-value heads are a
quarter of the heads, as in the page's formula.
"""
"""Comment in the files of its architectures."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedArchitecture:
  """The page's numbers for an amount of memory, which need not be a valid architecture.

  Attributes:
    memory_gb: The page's "network memory", in whatever gigabyte it means.
    claimed_parameters: Parameters that the page's table claims; None for its formula.
  """

  memory_gb: float
  model_dim: int
  num_layers: int
  ffn_dim: int
  num_heads: int
  num_kv_heads: int
  claimed_parameters: float | None = None

  @property
  def head_dim(self) -> int:
    """Width of a head, rounded down as in the page's attention."""
    return self.model_dim // self.num_heads

  def parameters(self, *, tied: bool = True) -> int:
    """Parameters counted from the page's own matrices: no biases, a final norm, an embedding of 50,257."""
    outer = VOCAB_SIZE * self.model_dim * (1 if tied else 2)
    return self.num_layers * self._layer() + outer + self.model_dim

  def estimated_gib(self) -> float:
    """The page's `estimate_memory_per_layer` times layers: 6 bytes a parameter, nothing but layers."""
    return self.num_layers * self._layer() * 4 * 1.5 / GIB

  def _layer(self) -> int:
    h, f, d = self.model_dim, self.ffn_dim, self.head_dim
    return 2 * h * self.num_heads * d + 2 * h * self.num_kv_heads * d + 3 * h * f + 2 * h

  def config(self) -> ModelConfig:
    """The architecture. Raises: ValueError: the numbers make none."""
    if self.model_dim % self.num_heads:
      raise ValueError(f"model_dim = {self.model_dim} is no multiple of {self.num_heads} heads")
    return ModelConfig(
      vocab_size=VOCAB_SIZE,
      model_dim=self.model_dim,
      num_layers=self.num_layers,
      num_heads=self.num_heads,
      num_kv_heads=self.num_kv_heads,
      head_dim=self.head_dim,
      ffn_dim=self.ffn_dim,
      rope_style="interleaved",
    )


def formula(memory_gb: float) -> SeedArchitecture:
  """The page's `calculate_optimal_architecture`, unchanged.

  Raises: ValueError: not a positive, finite number; the page's code would give a width of 0.
  """
  if not 0 < memory_gb < math.inf:
    raise ValueError(
      f"memory_gb = {memory_gb!r}: positive and finite; at 0 the formula's width is 0"
    )
  hidden = int(256 * math.sqrt(memory_gb / 10))
  hidden = ((hidden + 63) // 64) * 64
  heads = max(4, hidden // 128)
  return SeedArchitecture(
    memory_gb=memory_gb,
    model_dim=hidden,
    num_layers=min(64, max(8, int(8 * math.log2(memory_gb / 10 + 1)))),
    ffn_dim=hidden * 4,
    num_heads=heads,
    num_kv_heads=max(1, heads // 4),
  )


TABLE: tuple[SeedArchitecture, ...] = tuple(
  SeedArchitecture(
    memory_gb=memory_gb,
    model_dim=width,
    num_layers=layers,
    ffn_dim=4 * width,
    num_heads=heads,
    num_kv_heads=heads // 4,
    claimed_parameters=claimed,
  )
  for memory_gb, width, layers, heads, claimed in (
    (40, 1024, 16, 8, 350e6),
    (200, 2048, 24, 16, 3.5e9),
    (800, 3072, 32, 24, 9.2e9),
    (4096, 5120, 48, 40, 45e9),
    (8192, 7168, 64, 56, 123e9),
  )
)
"""The page's five rows as printed, with key-value heads, which the table leaves out, from its formula."""


def row(memory_gb: float) -> SeedArchitecture:
  """The last row of the table whose memory is there. Raises: ValueError: even the first is more."""
  # 4 TB and 8 TB stand for 4096 and 8192, yet whoever has decimal terabytes means that row too.
  fitting = [
    a for a in TABLE if memory_gb >= (a.memory_gb if a.memory_gb < 4096 else a.memory_gb / 1.024)
  ]
  if not fitting:
    raise ValueError(f"{memory_gb:g} GB: the seed's table begins at {TABLE[0].memory_gb:g} GB")
  return fitting[-1]


def invalid(given: SeedArchitecture) -> tuple[str, ...]:
  """Reasons why it is no valid architecture; empty if it is one."""
  h, heads, kv_heads = given.model_dim, given.num_heads, given.num_kv_heads
  found = []
  if h % heads:
    found.append(
      f"head_dim = {h}/{heads} = {h / heads:.4g} is no integer: rounded down, {heads} heads of "
      f"{given.head_dim} are {heads * given.head_dim} wide, not {h}"
    )
  if given.head_dim % 2:
    found.append(f"head_dim = {given.head_dim} is odd: rotary positions turn pairs")
  if heads % kv_heads:
    found.append(f"{heads} heads are no multiple of {kv_heads} key-value heads")
  return tuple(found)


def findings(given: SeedArchitecture) -> tuple[str, ...]:
  """Everything that is wrong with it: validity, claimed size, and the memory that it leaves or lacks."""
  found = list(invalid(given))
  tied, untied = given.parameters(), given.parameters(tied=False)
  if given.claimed_parameters is not None:
    claimed = given.claimed_parameters
    # A claim within 2% of either count is rounding.
    if all(abs(claimed / counted - 1) > 0.02 for counted in (tied, untied)):
      found.append(
        f"claims {claimed / 1e9:.4g} billion parameters and has {tied / 1e9:.4g} "
        f"({untied / 1e9:.4g} with a head of its own): {claimed / untied:.1f} times too many"
      )
    if other := _differences(given, formula(given.memory_gb)):
      found.append(f"not what its formula gives for {given.memory_gb:g} GB: {other}")
  estimate = given.estimated_gib()
  found.append(
    f"its own estimate is {estimate:.3g} GiB, {100 * estimate / given.memory_gb:.1f}% of the "
    f"{given.memory_gb:g} GB it is sized for"
  )
  needed = train_gib(given)
  found.append(
    f"training takes {needed:.3g} GiB (AdamW, one sequence of 2048, layers rematerialized), "
    f"{needed / estimate:.1f} times its estimate"
  )
  return tuple(found)


def train_gib(given: SeedArchitecture) -> float:
  """GiB of one training step on one host.

  Heads that do not divide are rounded down, as in `parameters`. For numbers that are no valid architecture,
  activations are right to a few percent; all else is exact."""
  config = ModelConfig(
    vocab_size=VOCAB_SIZE,
    model_dim=given.model_dim,
    num_layers=given.num_layers,
    num_heads=given.num_heads,
    # Groups must be whole to be counted; the parameters that this adds are taken off again.
    num_kv_heads=given.num_kv_heads
    if given.num_heads % given.num_kv_heads == 0
    else given.num_heads,
    head_dim=given.head_dim + given.head_dim % 2,
    ffn_dim=given.ffn_dim,
  )
  step = train_bytes(config, Span.whole(config), batch=1, sequence=2048)
  extra = count.parameters(config) - given.parameters()
  # 18 bytes a parameter: master, copy, gradient, two moments.
  return (step.total - 18 * extra) / GIB


def _differences(given: SeedArchitecture, other: SeedArchitecture) -> str:
  return ", ".join(
    f"{name} = {getattr(other, name)}, not {getattr(given, name)}"
    for name in ("model_dim", "num_layers", "ffn_dim", "num_heads", "num_kv_heads")
    if getattr(given, name) != getattr(other, name)
  )
