"""Finds the largest architecture that fits a fleet, and predicts its speed and loss."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from neurojax import count
from neurojax.config import ModelConfig
from neurojax.count.wording import short
from neurojax.count.working import DeviceKind
from neurojax.plan.fleet import Device, Fleet, Host, Place, parse_bytes, read_fleet
from neurojax.plan.notebook import shown
from neurojax.plan.tiers import CARDS
from neurojax.scaling import fits
from neurojax.scaling.arithmetic import (
  Losses,
  caveats,
  loss_line,
  losses_after,
  memory_lines,
  next_larger,
  too_small,
  training_flops,
)
from neurojax.scaling.candidates import VOCAB_SIZE, candidates
from neurojax.scaling.law import (
  CHINCHILLA_BESIROGLU,
  Law,
  compute_optimal,
  optimal_tokens,
  read_law,
)
from neurojax.scaling.purpose import Purpose, ServePurpose, purpose_of
from neurojax.scaling.stages import Line, SizedStage, Speed, allowed_bytes, needs_of, serve, train

HEADROOM = 0.1
"""Share of each place's free memory left unused: a process takes more than weights, caches and its programs'
working memory."""

MFU = 0.4
"""Share of the devices' FLOP/s that training reaches. MaxText's Llama 2 7B: 0.38 to 0.50 on 8 to 128 H100,
nanochat 0.41 to 0.46. Doubt: none is published for ternary training, for pipelines of unlike machines,
or for CPUs."""

YARDSTICK_GPUS = 1000
"""H100s of an imagined cluster, the measure of models that fit where nobody has trained their like."""

MOST_TOKENS = 1e20
"""Training tokens at most: about a million times as many as people have written."""

HYSTERESIS = 1.3
"""A current architecture that fits is kept until one with this many times its parameters fits: below that a
change is not worth converting or training again. Source: the factor of NeuroShard's scaler."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostMemory:
  """The memory of one host.

  Attributes:
    host: Label of the host.
    memory_bytes: Bytes that its stages take.
    free_bytes: Bytes that it has free without them.
    headroom_bytes: Free bytes that its stages leave.
  """

  host: str
  memory_bytes: int
  free_bytes: int
  headroom_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sized:
  """An architecture for a fleet, a placement that holds it, and predictions.

  Attributes:
    config: The architecture.
    parameters: Its number of parameters.
    purpose: Purpose that it was sized for.
    stages: Layers of each place.
    hosts: Memory of each host.
    speed: Predicted speeds.
    train_days: Days of training for `losses.tokens`; None unless the speed of training is known.
    losses: Predicted losses.
    kept: It is the current architecture, kept because nothing much larger fits.
    arithmetic: The arithmetic behind each number.
    notes: Sentences on doubts and missing values.
  """

  config: ModelConfig
  parameters: int
  purpose: Purpose
  stages: tuple[SizedStage, ...]
  hosts: tuple[HostMemory, ...]
  speed: Speed
  train_days: float | None
  losses: Losses
  kept: bool
  arithmetic: tuple[Line, ...]
  notes: tuple[str, ...]

  def summary(self) -> str:
    """One line: the architecture."""
    c = self.config
    kept = " (kept)" if self.kept else ""
    return (
      f"{_large(self.parameters)} parameters{kept}: {c.num_layers} layers of {c.model_dim}, "
      f"{c.num_heads} heads of {c.head_dim}, {c.num_kv_heads} key-value heads, ffn {c.ffn_dim}, "
      f"vocabulary {c.vocab_size}, head {'tied' if c.tied_embedding else 'its own'}"
    )

  def _repr_html_(self) -> str:
    stages = [
      (f"{s.label}, layers {s.first_layer}..{s.last_layer}",
       f"{s.memory_bytes / 1e9:,.2f} of {s.free_bytes / 1e9:,.2f} GB")
      for s in self.stages
    ]  # fmt: skip
    return shown(self.summary(), ("what", "predicted"), [*self.predictions(), *stages])

  def predictions(self) -> list[tuple[str, str]]:
    """Speeds, training days and losses that are predicted, each as (what, value)."""
    rows = []
    for what, rate in (
      ("decode", self.speed.decode_tokens_per_s),
      ("prefill", self.speed.prefill_tokens_per_s),
      ("training", self.speed.train_tokens_per_s),
    ):
      if rate is not None:
        rows.append((what, f"{short(rate, 4)} tokens/s"))
    losses = self.losses
    if self.train_days is not None:
      rows.append(("training days", f"{self.train_days:,.4g} for {losses.tokens:.4g} tokens"))
    band = ""
    if losses.bf16.low is not None and losses.bf16.high is not None:
      band = f" ({losses.bf16.low:.2f} to {losses.bf16.high:.2f})"
    rows.append(("loss, bf16", f"{losses.bf16.value:.3f}{band} nats, {losses.law}"))
    ternary = (
      f"{losses.ternary_low:.3f} to {losses.ternary_high:.3f} with published gaps; "
      f"{losses.ternary.value:.3f} by {losses.ternary_law} (unverified, other data)"
    )
    return [*rows, ("loss, ternary", ternary)]

  def table(self) -> dict[str, Any]:
    """Plain values for JSON and TOML: the architecture's fields first, absent values left out."""
    purpose = self.purpose.table()
    table = {
      **dataclasses.asdict(self.config),
      "parameters": self.parameters,
      "purpose": "serve" if isinstance(self.purpose, ServePurpose) else "train",
      **{name: value for name, value in purpose.items() if name != "context"},
      "kept": self.kept,
      "stages": [dataclasses.asdict(stage) for stage in self.stages],
      "hosts": [dataclasses.asdict(host) for host in self.hosts],
      **dataclasses.asdict(self.speed),
      "train_days": self.train_days,
      "losses": dataclasses.asdict(self.losses),
      "arithmetic": [dataclasses.asdict(line) for line in self.arithmetic],
      "notes": list(self.notes),
    }
    return _without_none(table)


def fleet_for(given: "Fleet | str | int") -> Fleet:
  """A fleet from what people say of their machines.

  Args:
    given: A fleet; its TOML file or its name (`plan.fleet.read_fleet`); or the memory of one host, in
      bytes or as text such as "64GB".
  Raises: ValueError: none of these.
  """
  if isinstance(given, Fleet):
    return given
  if isinstance(given, int) and not isinstance(given, bool):
    if given < 1:
      raise ValueError(f"memory = {given}: a positive number of bytes")
    return one_host(given)
  if isinstance(given, Path):
    given = str(given)
  if not isinstance(given, str):
    raise TypeError(
      f'memory = {given!r}: give bytes as a whole number, text such as "64GB", or a fleet'
    )
  return (
    one_host(parse_bytes(given))
    if given[:1].isdecimal() and ":" not in given
    else read_fleet(given)
  )


def one_host(memory_bytes: int) -> Fleet:
  """A fleet of one place with this much memory. Its speed is not known."""
  device = Device(kind="cuda", memory_bytes=memory_bytes)
  return Fleet(hosts=(Host(name="host", devices=(device,)),))


def size(
  fleet: Fleet | str | int,
  purpose: Purpose | Literal["serve", "train"] = "serve",
  *,
  headroom: float = HEADROOM,
  current: ModelConfig | None = None,
  vocab_size: int = VOCAB_SIZE,
  most_parameters: float | None = None,
  tokens: float | None = None,
  days: float | None = None,
  law: Law | str = CHINCHILLA_BESIROGLU,
  mfu: float = MFU,
  time_limit_s: float = 5.0,
) -> Sized:
  """Find the candidate with the most parameters that fits a fleet's memory.

  Without `current`, more memory anywhere or another host never gives a smaller model. With it, the current
  architecture is kept until one with `HYSTERESIS` times its parameters fits, or it no longer fits itself.

  Args:
    fleet: The machines: a fleet, its file or its name, or the memory of one host in bytes or as "64GB".
    purpose: What the memory is for. "serve" and "train" have the defaults of `purpose.purpose_of`, which
      makes others.
    headroom: Share of each place's free memory that stays free.
    current: The architecture in use.
    vocab_size: Vocabulary of the candidates.
    most_parameters: Candidates with more parameters are left out.
    tokens: Training tokens, for losses and days; the number that suits the size best by `law` if both
      tokens and days are absent.
    days: Days of training on this fleet, instead of tokens; needs its FLOP/s.
    law: Loss as a function of parameters and tokens: a law, its name or its TOML file.
    mfu: Share of the devices' FLOP/s that training reaches.
    time_limit_s: Seconds for the search of the fastest placement.
  Raises: ValueError: nothing fits, with what is missing and what would fit; or contradictory input.

  Example:
    >>> size("8GB").parameters
    24023095296
  """
  fleet = fleet_for(fleet)
  purpose = purpose_of(purpose) if isinstance(purpose, str) else purpose
  law = read_law(law) if isinstance(law, str) else law
  _check(headroom, most_parameters, tokens, days, mfu, fleet)
  places = [place for place in fleet.places() if place.host.layers != 0]
  if not places:
    raise ValueError("layers = 0 keeps every host out: free one")
  allowed = [allowed_bytes(place.free_bytes, headroom) for place in places]
  notes: list[str] = []
  kinds = [place.device.kind for place in places]
  found = fits.largest(purpose, allowed, vocab_size, most_parameters, kinds)
  config, kept = _settle(found, current, purpose, kinds, allowed, notes)
  if config is None and most_parameters is not None:
    least = count.parameters(candidates(vocab_size, purpose.context)[0])
    if most_parameters < least:
      raise ValueError(
        f"most_parameters = {most_parameters:g}: the smallest candidate has {least:,}"
      )
  if config is None:
    raise ValueError(too_small(purpose, places, allowed, vocab_size, headroom))
  needed = needs_of(config, purpose, kinds)
  if isinstance(purpose, ServePurpose):
    stages, speed, lines = serve(
      config, purpose, fleet, places, allowed, needed, headroom, time_limit_s, notes
    )
  else:
    stages, speed, lines = train(config, purpose, fleet, places, allowed, needed, mfu, notes)
  rate = speed.train_tokens_per_s
  if days is not None:
    if rate is None:
      raise ValueError(
        f"days = {days:g}: how fast this trains is unknown: size for training, with a fleet whose devices "
        "all say flops_per_s; or give tokens"
      )
    tokens = days * 86400 * rate
  parameters = count.parameters(config)
  chosen = tokens is None
  tokens = tokens if tokens is not None else optimal_tokens(law, parameters)
  flops = tokens * count.flops_per_token(config, context=purpose.context, mode="train")
  lines.append(Line(what="training FLOPs", how=training_flops(config, purpose, tokens, flops)))
  train_days = None if rate is None else tokens / rate / 86400
  if train_days is not None:
    lines.append(
      Line(what="training days", how=f"{tokens:.4g} tokens / {rate:,.0f}/s = {train_days:.4g}")
    )
  losses = losses_after(parameters, tokens, law)
  lines.append(Line(what="loss", how=loss_line(losses, law, parameters)))
  if chosen:
    notes.append(f"tokens not given: {tokens:.3g} suit this size best by {law.name}")
  elif law.B:
    n, d = compute_optimal(law, flops)
    notes.append(
      f"for {flops:.3g} FLOPs {law.name} prefers {n:.3g} parameters and {d:.3g} tokens; this has "
      f"{parameters / n:.2g} times those parameters"
    )
  if isinstance(purpose, ServePurpose) and (years := _cluster_years(flops)) > 1:
    notes.append(
      f"this is what fits, not what someone has trained: {flops:.3g} FLOPs are {years:,.3g} years of "
      f"{YARDSTICK_GPUS:,} H100 at an MFU of {MFU:g}; --most-parameters leaves larger candidates out"
    )
  used = sum(stage.memory_bytes for stage in stages) / sum(allowed)
  if used < 0.5 and not kept:
    notes.append(
      f"{used:.0%} of the memory is used: a layer of the next candidates is too large for too many places, "
      "or there is no larger candidate"
    )
  notes += caveats(losses, law, parameters)
  lines = [*memory_lines(config, purpose, needed, places, allowed, headroom), *lines]
  lines.append(
    Line(
      what="next larger",
      how=next_larger(config, purpose, allowed, places, headroom, most_parameters),
    )
  )
  return Sized(
    config=config,
    parameters=parameters,
    purpose=purpose,
    stages=stages,
    hosts=_hosts(stages, places),
    speed=speed,
    train_days=train_days,
    losses=losses,
    kept=kept,
    arithmetic=tuple(lines),
    notes=tuple(notes),
  )


def _cluster_years(flops: float) -> float:
  """Years that the cluster of YARDSTICK_GPUS computes for, at MFU of its datasheet's FLOP/s."""
  each = CARDS["h100"].flops_per_s
  assert each is not None
  return flops / (YARDSTICK_GPUS * each * MFU) / 86400 / 365.25


def _check(
  headroom: float,
  most_parameters: float | None,
  tokens: float | None,
  days: float | None,
  mfu: float,
  fleet: Fleet,
) -> None:
  if not 0 <= headroom < 1:
    raise ValueError(f"headroom = {headroom!r}: a share of memory, from 0 to below 1")
  if not 0 < mfu <= 1:
    raise ValueError(f"mfu = {mfu!r}: a share of FLOP/s, above 0 and at most 1")
  for name, value in (("most_parameters", most_parameters), ("tokens", tokens), ("days", days)):
    if value is not None and not 0 < value < float("inf"):
      raise ValueError(f"{name} = {value!r}: it must be positive and finite")
  if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
    raise ValueError(f"tokens = {tokens!r}: from 1 to {MOST_TOKENS:g}")
  if tokens is not None and days is not None:
    raise ValueError(f"tokens = {tokens:g} and days = {days:g} contradict each other: give one")
  pinned = [host.label for host in fleet.hosts if host.layers]
  if pinned:
    raise ValueError(
      f"layers are pinned on {', '.join(pinned)}: pins belong to a known depth; take them out to size, "
      "and put them back to plan"
    )


def _settle(
  found: ModelConfig | None,
  current: ModelConfig | None,
  purpose: Purpose,
  kinds: Sequence[DeviceKind],
  allowed: Sequence[int],
  notes: list[str],
) -> tuple[ModelConfig | None, bool]:
  """The current architecture while it fits and nothing much larger does, else the largest that fits."""
  if current is None:
    return found, False
  if current.layer_kinds:
    raise ValueError(
      "the current architecture has layers of several kinds, and sizing counts layers as alike: leave "
      "--current out, and ask `neurojax plan` whether it fits"
    )
  needs = needs_of(current, purpose, kinds)
  if not fits.fits(needs, allowed):
    missing = fits.missing_bytes(needs, allowed)
    notes.append(f"the current architecture no longer fits: {missing:,} bytes more would do")
    return found, False
  now = count.parameters(current)
  ratio = 0.0 if found is None else count.parameters(found) / now
  if ratio >= HYSTERESIS:
    notes.append(
      f"{ratio:.2f} times the current parameters fit: the current architecture is replaced"
    )
    return found, False
  notes.append(
    f"the current architecture is kept: it fits, and the largest that fits has {ratio:.2f} times its "
    f"parameters, below {HYSTERESIS}"
  )
  return current, True


def _hosts(stages: Sequence[SizedStage], places: Sequence[Place]) -> tuple[HostMemory, ...]:
  taken: dict[str, int] = {}
  free: dict[str, int] = {}
  for stage in stages:
    taken[stage.host] = taken.get(stage.host, 0) + stage.memory_bytes
  for place in places:
    free[place.host.label] = free.get(place.host.label, 0) + place.free_bytes
  return tuple(
    HostMemory(
      host=host,
      memory_bytes=taken.get(host, 0),
      free_bytes=space,
      headroom_bytes=space - taken.get(host, 0),
    )
    for host, space in free.items()
  )


def _large(number: float) -> str:
  for factor, unit in ((1e12, "trillion"), (1e9, "billion")):
    if number >= factor:
      return f"{number / factor:.4g} {unit}"
  return f"{number / 1e6:.4g} million"


def _without_none(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _without_none(item) for key, item in value.items() if item is not None}
  if isinstance(value, list | tuple):
    return [_without_none(item) for item in value]
  return value
