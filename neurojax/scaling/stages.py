"""Places the stages of a sized model, and predicts how fast they are."""

import dataclasses
import itertools
from collections.abc import Sequence

from neurojax import count
from neurojax.config import ModelConfig, Span
from neurojax.count.wording import counted, short
from neurojax.count.working import DeviceKind
from neurojax.plan.best import best
from neurojax.plan.fleet import Device, Fleet, Place
from neurojax.plan.problem import MOST_PLACES
from neurojax.scaling import fits
from neurojax.scaling.fits import Need
from neurojax.scaling.purpose import Purpose, ServePurpose, TrainPurpose


@dataclasses.dataclass(frozen=True, kw_only=True)
class SizedStage:
  """A span of layers of a sized model on one place.

  Attributes:
    host: Label of the host.
    label: Label of the place.
    memory_bytes: Bytes that the layers take for the purpose.
    free_bytes: Bytes that the place has free.
    step_s: Seconds of a decode step (serving) or of one trained token (training); None if not known.
  """

  host: str
  label: str
  first_layer: int
  last_layer: int
  memory_bytes: int
  free_bytes: int
  step_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
  """Predicted speeds; None where the fleet lacks a rate to predict them from.

  Attributes:
    decode_tokens_per_s: Tokens a second of all sequences in flight together.
    prefill_tokens_per_s: Tokens a second of one prompt.
    train_tokens_per_s: Tokens a second of training at the stated MFU.
  """

  decode_tokens_per_s: float | None = None
  prefill_tokens_per_s: float | None = None
  train_tokens_per_s: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
  """One number and the arithmetic behind it."""

  what: str
  how: str


def serve(
  config: ModelConfig,
  purpose: ServePurpose,
  fleet: Fleet,
  places: Sequence[Place],
  allowed: Sequence[int],
  needed: Sequence[Need],
  headroom: float,
  time_limit_s: float,
  notes: list[str],
) -> tuple[tuple[SizedStage, ...], Speed, list[Line]]:
  """Place a model for serving: the fastest placement where speeds are known, else any."""
  load = purpose.load(config)
  unknown = [place.label for place in places if place.device.decode_rate(load.weights) is None]
  if unknown:
    notes.append(f"no tokens/s: read_bytes_per_s of {_some(unknown)} is unknown (`neurojax probe`)")
    return _by_memory(needed, places, allowed), Speed(), []
  if len(places) > MOST_PLACES:
    notes.append(
      f"no tokens/s: {len(places)} places, and at most {MOST_PLACES} are planned together"
    )
    return _by_memory(needed, places, allowed), Speed(), []
  batch = purpose.sequences
  plan = best(
    config,
    reserved(fleet, headroom),
    load,
    context=min(purpose.context, load.capacity),
    batch=batch,
    time_limit_s=time_limit_s,
  )
  free = {place.label: place.free_bytes for place in places}
  stages = tuple(
    SizedStage(
      host=stage.host,
      label=stage.label,
      first_layer=stage.first_layer,
      last_layer=stage.last_layer,
      memory_bytes=stage.memory_bytes,
      free_bytes=free[stage.label],
      step_s=stage.step_s,
    )
    for stage in plan.stages
  )
  decode = batch / plan.latency_s
  passes_s = sum(stage.step_s for stage in plan.stages)
  lines = [
    Line(
      what="decode",
      how=f"{counted(batch, 'sequence')} of {purpose.context} / ({short(passes_s * 1e3, 4)} ms in {counted(len(stages), 'stage')} + "
      f"{short((plan.latency_s - passes_s) * 1e3, 4)} ms on the way) = {short(decode, 4)} tokens/s; {plan.method}",
    )
  ]
  used = {stage.label for stage in stages}
  slow = [p.label for p in places if p.label in used and p.device.flops_per_s is None]
  prefill = None
  if slow:
    notes.append(f"no prefill tokens/s: flops_per_s of {_some(slow)} is unknown")
  else:
    seconds = sum(stage.prefill_s for stage in plan.stages)
    hops_s = sum(hop.latency_s + hop.prefill_s for hop in plan.hops)
    prefill = plan.prefill_tokens / (seconds + hops_s)
    lines.append(
      Line(
        what="prefill",
        how=f"{plan.prefill_tokens} tokens / ({short(seconds * 1e3, 4)} ms in stages + {short(hops_s * 1e3, 4)} ms "
        f"on the way) = {short(prefill, 4)} tokens/s",
      )
    )
  return stages, Speed(decode_tokens_per_s=decode, prefill_tokens_per_s=prefill), lines


def train(
  config: ModelConfig,
  purpose: TrainPurpose,
  fleet: Fleet,
  places: Sequence[Place],
  allowed: Sequence[int],
  needed: Sequence[Need],
  mfu: float,
  notes: list[str],
) -> tuple[tuple[SizedStage, ...], Speed, list[Line]]:
  """Place a model for training, with the least time of the slowest stage where speeds are known."""
  unknown = [place.label for place in places if place.device.flops_per_s is None]
  if unknown:
    notes.append(f"no training days: flops_per_s of {_some(unknown)} is unknown (`neurojax probe`)")
    return _by_memory(needed, places, allowed), Speed(), []
  speeds = {place.label: place.device.flops_per_s or 0.0 for place in places}
  layer = Span(first_layer=0, last_layer=0, num_layers=config.num_layers + 1)
  flops = count.flops_per_token(config, context=purpose.context, mode="train", span=layer)
  head = 3 * count.head_flops(config) / flops
  rates = [speeds[place.label] / flops for place in places]
  stages = _by_memory(needed, places, allowed, rates, head)
  timed = []
  for stage in stages:
    span = _span(config, stage)
    flops = count.flops_per_token(config, context=purpose.context, mode="train", span=span)
    timed.append(dataclasses.replace(stage, step_s=flops / (mfu * speeds[stage.label])))
  slowest = max(timed, key=lambda stage: stage.step_s or 0.0)
  assert slowest.step_s
  lines = [
    Line(
      what="training rate",
      how=f"slowest stage {slowest.label}: 1 / ({slowest.step_s:.3g} s a token at MFU {mfu:g} of "
      f"{speeds[slowest.label]:.3g} FLOP/s) = {1 / slowest.step_s:,.0f} tokens/s, other stages at the "
      "same time",
    )
  ]
  per_token_s = slowest.step_s
  # bfloat16 activations one way and their gradients the other, links being full duplex.
  token_bytes = 2 * config.model_dim
  hops = itertools.pairwise(timed)
  slow = max(
    ((token_bytes / fleet.link(a.host, b.host).bytes_per_s, a.host, b.host) for a, b in hops),
    default=None,
  )
  if slow and slow[0] > per_token_s:
    per_token_s = slow[0]
    lines.append(
      Line(
        what="slowest link",
        how=f"{slow[1]} - {slow[2]}: {token_bytes:,} bytes a token each way, {1 / slow[0]:,.0f} tokens/s: "
        "it sets the pace",
      )
    )
  notes.append(
    f"training days assume an MFU of {mfu:g}, enough micro-batches in flight to hide the pipeline's ends, "
    "and no failures"
  )
  return tuple(timed), Speed(train_tokens_per_s=1 / per_token_s), lines


def needs_of(config: ModelConfig, purpose: Purpose, kinds: Sequence[DeviceKind]) -> list[Need]:
  """The need of the model on each place, by the kind of its device."""
  by_kind = {kind: fits.need(config, purpose, kind) for kind in set(kinds)}
  return [by_kind[kind] for kind in kinds]


def _by_memory(
  needed: Sequence[Need],
  places: Sequence[Place],
  allowed: Sequence[int],
  speeds: Sequence[float] | None = None,
  head: float = 0.0,
) -> tuple[SizedStage, ...]:
  placed = fits.place(needed, allowed, speeds, head)
  assert placed is not None
  stages, first = [], 0
  for order, (index, layers) in enumerate(placed):
    place = places[index]
    memory = needed[index].stage(layers, first=order == 0, last=order == len(placed) - 1)
    stages.append(
      SizedStage(
        host=place.host.label,
        label=place.label,
        first_layer=first,
        last_layer=first + layers - 1,
        memory_bytes=memory,
        free_bytes=place.free_bytes,
      )
    )
    first += layers
  return tuple(stages)


def reserved(fleet: Fleet, headroom: float) -> Fleet:
  """The same fleet with the headroom taken off the free memory of each place."""

  def device(given: Device) -> Device:
    taken = given.free_bytes - allowed_bytes(given.free_bytes, headroom)
    return dataclasses.replace(given, used_bytes=given.used_bytes + taken)

  return dataclasses.replace(
    fleet,
    hosts=tuple(
      dataclasses.replace(
        host,
        devices=tuple(device(given) for given in host.devices),
        memory_bytes=host.memory_bytes and max(1, allowed_bytes(host.memory_bytes, headroom)),
      )
      for host in fleet.hosts
    ),
  )


def _span(config: ModelConfig, stage: SizedStage) -> Span:
  return Span(
    first_layer=stage.first_layer, last_layer=stage.last_layer, num_layers=config.num_layers
  )


def allowed_bytes(free_bytes: int, headroom: float) -> int:
  return int(free_bytes * (1 - headroom))


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
