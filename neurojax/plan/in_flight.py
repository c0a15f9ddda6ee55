"""Plans a model over a fleet, and how many sequences are to be in flight."""

import math
import time
import typing
from collections.abc import Mapping

from neurojax import count
from neurojax.config import MOST_SEQUENCES, ModelConfig, Serving
from neurojax.config.serving import check_choice
from neurojax.count.serving import Load, layer_bytes
from neurojax.forms import Forms
from neurojax.plan.best import best
from neurojax.plan.fleet import Fleet
from neurojax.plan.plan import Objective, Plan

_NEAR, _NEAR_SHARED = 0.99, 0.96
"""Shares of the throughput that unlimited caches would give. A plan that reaches its share is taken, and no
fewer sequences are tried. The second is for layers on several places, where every try is a longer search."""

_FEWER = 8
"""Each next try plans caches for so many times fewer sequences."""


def planned(
  config: ModelConfig,
  fleet: Fleet,
  serving: Serving = Serving(),
  forms: Forms | None = None,
  *,
  objective: Objective = "latency",
  replicas: int | None = 1,
  batch: int = 1,
  pins: Mapping[str, int] | None = None,
  choose_sequences: bool = False,
  time_limit_s: float = 5.0,
) -> Plan:
  """Say which place of a fleet holds which layers, with predicted times and the reason for each place.

  The plan is for the least time of a decoded token, or for the most tokens a second; `Plan.gap` says how
  far from the best it can be.

  Args:
    serving: How the model is held and run: weights, dtype, context and sequences. Memory is planned for
      the caches of `serving.sequences` sequences in each pipeline.
    forms: Forms of the model file's matrices (`files.kept.stored_forms`); needed for any weights but
      "dense" and "int8".
    objective: "latency" of one decoded token, or "throughput" of many sequences.
    replicas: 1 gives every layer one place. A larger number plans so many whole pipelines side by side.
      None, for throughput, gives the same layers to several places wherever that brings more.
    batch: Sequences that each decode step computes together.
    pins: Number of layers that a host or place has to hold, by label; 0 keeps it out.
    choose_sequences: For throughput, plan for as many sequences as the plan gains by and memory has room
      for, at least `serving.sequences`; `Plan.sequences` says how many.
    time_limit_s: Seconds for the search, where the best plan cannot be computed.
  Raises: ValueError: nothing fits, a pin cannot be kept, or the fleet lacks a speed; the message says
    which limit is missed, by how much, and what would fit.

  Example:
    >>> from neurojax.plan.fleet import read_fleet
    >>> plan = planned(ModelConfig.named("llama-8b"), read_fleet("lab"), Serving(weights="int8"))
    >>> [stage.layers for stage in plan.stages]
    [32]
  """
  check_choice("objective", objective, typing.get_args(Objective))
  if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
    raise ValueError(f"batch = {batch!r}: a whole number, at least 1")
  if not 0 < time_limit_s < math.inf:
    raise ValueError(f"time_limit_s = {time_limit_s!r}: a positive number of seconds")
  load = Load(serving=serving.resolve(config, forms), forms=forms)

  def plan(load: Load, in_flight: int | None) -> Plan:
    return best(
      config,
      fleet,
      load,
      objective=objective,
      context=load.serving.context,
      batch=batch,
      pins=pins,
      replicas=replicas,
      in_flight=in_flight,
      time_limit_s=time_limit_s,
    )

  if not choose_sequences or objective == "latency":
    return plan(load, _batches(load, batch))
  load = load.serve(sequences=max(batch, load.sequences))
  deadline_s = time.monotonic() + time_limit_s
  unlimited = plan(load, None)
  needed = min(unlimited.batches * batch, MOST_SEQUENCES)
  if needed <= load.sequences:
    return unlimited
  if replicas is None:
    # Every place has caches for all that its pipeline may have in flight: where these take far more
    # memory than a layer, shorter pipelines side by side give more.
    cache = count.cache_bytes(config, 1, capacity=load.capacity, dtype=load.cache_dtype)
    while needed // _FEWER > load.sequences and needed * cache > 2 * layer_bytes(config, load):
      needed //= _FEWER
  # Caches for all of them take memory that layers then lack: fewer may give more.
  enough = unlimited.throughput * (_NEAR_SHARED if replicas is None else _NEAR)
  found: Plan | None = None
  while found is None or found.throughput < enough:
    if found and time.monotonic() > deadline_s:
      break
    few = load.serve(sequences=max(needed, load.sequences))
    try:
      made = plan(few, _batches(few, batch))
    except ValueError:
      made = None
    if found and made and made.value() >= found.value():
      break
    found = made or found
    if few.sequences == load.sequences:
      break
    needed //= _FEWER
  return found or unlimited


def _batches(load: Load, batch: int) -> int:
  """Batches that the load's sequences make. Raises: ValueError: not even one."""
  if load.sequences < batch:
    raise ValueError(
      f"batch = {batch} and sequences = {load.sequences}: a batch has more sequences than are in flight: "
      "plan for more sequences or make the batch smaller"
    )
  return load.sequences // batch
