"""Writes down the arithmetic behind a sized model, its losses, and what is missing where none fits."""

import dataclasses
import math
from collections.abc import Sequence

from neurojax import count, forms
from neurojax.config import ModelConfig, Span
from neurojax.count.wording import counted
from neurojax.plan.fleet import Place
from neurojax.scaling import fits
from neurojax.scaling.candidates import candidates
from neurojax.scaling.fits import Need
from neurojax.scaling.law import TERNARY_GAPS, TERNARY_SPECTRA11, Law, Loss, ternary_gap
from neurojax.scaling.purpose import Purpose, ServePurpose, TrainPurpose
from neurojax.scaling.stages import Line, needs_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Losses:
  """Predicted losses after `tokens` of training, in nats per token.

  Attributes:
    tokens: Training tokens.
    law: Name of the law for bf16.
    bf16: Loss of a bfloat16 model.
    ternary_law: Name of the law for ternary models.
    ternary: Loss by that law, which is unverified and fitted to other data: do not compare it with bf16.
    ternary_low, ternary_high: Loss of the bfloat16 model plus the least and the greatest published gap near
      its size.
  """

  tokens: float
  law: str
  bf16: Loss
  ternary_law: str
  ternary: Loss
  ternary_low: float
  ternary_high: float


def losses_after(parameters: int, tokens: float, law: Law) -> Losses:
  bf16 = law.loss(parameters, tokens)
  low, high = ternary_gap(parameters)
  return Losses(
    tokens=tokens,
    law=law.name,
    bf16=bf16,
    ternary_law=TERNARY_SPECTRA11.name,
    ternary=TERNARY_SPECTRA11.loss(parameters, tokens),
    ternary_low=bf16.value + low,
    ternary_high=bf16.value + high,
  )


def caveats(losses: Losses, law: Law, parameters: int) -> list[str]:
  found = []
  if losses.bf16.extrapolated:
    found.append(f"{law.name} is extrapolated: {losses.bf16.extrapolated}")
  if not law.verified:
    found.append(f"{law.name} is not verified: {law.source}")
  if parameters > 2 * max(gap.parameters for gap in TERNARY_GAPS):
    found.append("published gaps of ternary weights end at 3 billion parameters: beyond is a guess")
  said = f"{losses.ternary_law} is not verified, and on other data than {law.name}"
  if losses.ternary.extrapolated:
    said += f"; extrapolated: {losses.ternary.extrapolated}"
  return [*found, said]


def memory_lines(
  config: ModelConfig,
  purpose: Purpose,
  needed: Sequence[Need],
  places: Sequence[Place],
  allowed: Sequence[int],
  headroom: float,
) -> list[Line]:
  for_what = " for working memory" if isinstance(purpose, ServePurpose) else ""
  parameters = count.parameters(config)
  outer = config.vocab_size * config.model_dim * (1 if config.tied_embedding else 2)
  outer += config.model_dim
  per_layer = (parameters - outer) // config.num_layers
  lines = [
    Line(
      what="parameters",
      how=f"{config.num_layers} layers x {per_layer:,} + {outer:,} embedding, head and norm = "
      f"{parameters:,}",
    )
  ]
  if isinstance(purpose, ServePurpose):
    load = purpose.load(config)
    weights = count.span_bytes(config, Span.whole(config), **load.form)
    cache = count.cache_bytes(
      config, config.num_layers, capacity=load.capacity, dtype=load.cache_dtype
    )
    bits = 8 * weights / parameters
    lines += [
      Line(what="weights", how=f"{weights:,} bytes, {bits:.3f} bits a parameter"),
      Line(
        what="caches",
        how=f"{counted(purpose.sequences, 'sequence')} x 2 x {config.num_layers} layers x {config.num_kv_heads} heads "
        f"x {load.capacity} positions x {config.head_dim} x {forms.DTYPE_BYTES[load.dtype]} bytes = "
        f"{purpose.sequences * cache:,}",
      ),
    ]
  else:
    step = purpose.train_bytes(config, Span.whole(config))
    parts = ", ".join(
      f"{field.name} {getattr(step, field.name):,}" for field in dataclasses.fields(step)
    )
    lines.append(Line(what="training step", how=f"{parts}; {step.total:,} bytes on one place"))
  for kind in dict.fromkeys(place.device.kind for place in places):
    one = next(n for n, place in zip(needed, places, strict=True) if place.device.kind == kind)
    where = "" if len({place.device.kind for place in places}) == 1 else f", {kind}"
    lines.append(
      Line(
        what=f"stages{where}",
        how=f"{one.layer:,} bytes a layer, {one.base:,} a stage{for_what}, {one.first:,} more for the "
        f"embedding, {one.last:,} for norm and head",
      )
    )
  free = sum(place.free_bytes for place in places)
  lines.append(
    Line(
      what="memory",
      how=f"{free:,} bytes free on {counted(len(places), 'place')}, {sum(allowed):,} of them after {headroom:.0%} "
      "headroom",
    )
  )
  return lines


def training_flops(config: ModelConfig, purpose: Purpose, tokens: float, flops: float) -> str:
  per_token = count.flops_per_token(config, context=purpose.context, mode="train")
  return (
    f"{per_token:,} a token (sequences of {purpose.context}) x {tokens:.4g} tokens = {flops:.4g}"
  )


def loss_line(losses: Losses, law: Law, parameters: int) -> str:
  n = f"{parameters:,}" if law.parameters_unit == 1 else f"({parameters:,}/{law.parameters_unit:g})"
  d = (
    f"{losses.tokens:.4g}" if law.tokens_unit == 1 else f"({losses.tokens:.4g}/{law.tokens_unit:g})"
  )
  return (
    f"{law.E:g} + {law.A:g} / {n}^{law.alpha:g} + {law.B:g} / {d}^{law.beta:g} = "
    f"{losses.bf16.value:.3f}; {law.source}"
  )


def next_larger(
  config: ModelConfig,
  purpose: Purpose,
  allowed: Sequence[int],
  places: Sequence[Place],
  headroom: float,
  most_parameters: float | None,
) -> str:
  """Words for the memory that the next larger candidate lacks."""
  now = count.parameters(config)
  every = candidates(config.vocab_size, purpose.context)
  larger = next((c for c in every if count.parameters(c) > now), None)
  if larger is None:
    return "none: this is the largest candidate, whatever the memory"
  kinds = [place.device.kind for place in places]
  what = f"{count.parameters(larger):,} parameters ({larger.num_layers} x {larger.model_dim})"
  if most_parameters is not None and count.parameters(larger) > most_parameters:
    return f"{what}: above the {most_parameters:.4g} allowed"
  missing = missing_free_bytes(needs_of(larger, purpose, kinds), allowed, headroom)
  if not missing:
    return f"{what} fits, or one after it does: see the notes"
  return f"{what}: {missing:,} bytes more on {_largest(places)} would do"


def too_small(
  purpose: Purpose,
  places: Sequence[Place],
  allowed: Sequence[int],
  vocab_size: int,
  headroom: float,
) -> str:
  """Words for what is missing: how much memory, and the nearest purpose that would fit."""
  smallest = candidates(vocab_size, purpose.context)[0]
  kinds = [place.device.kind for place in places]
  needed = needs_of(smallest, purpose, kinds)
  most = max(range(len(allowed)), key=lambda index: allowed[index])
  missing = missing_free_bytes(needed, allowed, headroom)
  tries: list[tuple[str, Purpose]] = []
  if isinstance(purpose, TrainPurpose) and not purpose.remat:
    tries.append(("layers rematerialized", dataclasses.replace(purpose, remat=True)))
  if purpose.sequences > 1:
    tries.append(("one sequence at a time", purpose.change(sequences=1)))
  for context in (1024, 256):
    if context < purpose.context:
      less = purpose.change(context=context, sequences=1)
      tries.append((f"one sequence of {context}", less))
  if isinstance(purpose, ServePurpose) and purpose.scales is None:
    scales = forms.TERNARY_FORMATS["ternary-g128"]
    tries.append(("ternary weights", ServePurpose(purpose.change(weights="w2a8").serving, scales)))
  instead = next(
    (what for what, other in tries if fits.fits(needs_of(smallest, other, kinds), allowed)), None
  )
  remedy = f"; or {instead} would fit without more memory" if instead else ""
  return (
    f"memory is too small: {sum(allowed):,} bytes are free on {counted(len(places), 'place')} after {headroom:.0%} "
    f"headroom, and the smallest candidate ({smallest.num_layers} layers of {smallest.model_dim}, "
    f"{count.parameters(smallest):,} parameters) takes {needed[most].total:,} on one; {missing:,} bytes more on "
    f"{_largest(places)} would do{remedy}"
  )


def missing_free_bytes(needed: Sequence[Need], allowed: Sequence[int], headroom: float) -> int:
  """Free bytes that the largest place lacks, headroom included; 0 if the model fits."""
  missing = fits.missing_bytes(needed, allowed)
  return missing and math.ceil(missing / (1 - headroom)) + 1


def _largest(places: Sequence[Place]) -> str:
  return max(places, key=lambda place: place.free_bytes).label
