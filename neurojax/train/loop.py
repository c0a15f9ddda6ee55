"""The training loop: runs the pure step, and deals with files, clocks and signals."""

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from neurojax.data.batches import Batches, Rows, open_dataset
from neurojax.train.checkpoint import Checkpoints
from neurojax.train.config import TrainConfig
from neurojax.train.guard import Guard
from neurojax.train.metrics import Log, MetricsFile
from neurojax.train.run_folder import CHECKPOINTS, METRICS, RunFolder


@runtime_checkable
class Program(Protocol):
  """State and compiled functions of one configuration on one mesh.

  Attributes:
    flops_per_token: FLOPs of a training step for each token, forward and backward.
    peak_flops_per_s: Peak of all devices together in the compute dtype; None where it is unknown.
  """

  flops_per_token: float
  peak_flops_per_s: float | None

  def init_state(self) -> Any: ...

  def abstract_state(self) -> Any: ...

  def rows(self, batch_size: int) -> Rows:
    """The rows of a global batch that this process feeds."""
    ...

  def put(self, rows: Rows, local: np.ndarray, batch_size: int) -> jax.Array:
    """Makes the global batch of which this process has these rows."""
    ...

  def train_step(self, state: Any, tokens: jax.Array) -> tuple[Any, Mapping[str, jax.Array]]: ...

  def eval_step(self, state: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of nats, and the number of tokens."""
    ...


class TrainingError(Exception):
  """Training went wrong in a way that going back to a checkpoint does not mend."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
  """The end of a run.

  Attributes:
    step: The last step.
    loss: Loss of that step.
    valid_loss: Loss of the last evaluation.
    stopped_by: The signal that ended the run early.
  """

  step: int
  loss: float
  valid_loss: float | None
  stopped_by: int | None


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A step that was started and whose metrics were not read yet."""

  step: int
  metrics: Mapping[str, jax.Array]
  position: dict[str, Any]


class Loop:
  """A run from its newest checkpoint, or its beginning, to its last step.

  The metrics of a step are read while the next step runs, except before a checkpoint or an evaluation.
  Decisions depend on those metrics alone, so that a run that was ended at any moment goes on to the same
  losses.
  """

  def __init__(
    self,
    config: TrainConfig,
    program: Program,
    folder: RunFolder,
    *,
    trackers: tuple[Log, ...] = (),
    say: Callable[[str], None] = print,
  ):
    self._config, self._program, self._trackers, self._say = config, program, trackers, say
    self._first = jax.process_index() == 0
    self._batch_size = config.data.batch_size * config.accumulation
    self._rows = program.rows(self._batch_size)
    self._data = open_dataset(
      config.data, "train", accumulation=config.accumulation, rows=self._rows
    )
    self._guard = Guard(config.guard)
    self._checkpoints = Checkpoints(folder.path / CHECKPOINTS, keep=config.keep)
    # One process writes metrics: checkpoints must say the same for all processes.
    self._metrics = MetricsFile(folder.path / METRICS) if self._first else None
    self._stop = _Stop()
    self._clock = _Clock()
    if config.eval_batches:
      # Refused now rather than after an hour.
      held_out(config, program)
    self._losses: list[float] = []
    self._valid_loss: float | None = None

  def latest(self) -> int | None:
    """The step of the newest checkpoint; None: there is none."""
    return self._checkpoints.latest()

  def run(self) -> Outcome:
    """Runs to the last step or to a signal.

    Raises: TrainingError: the run went back too often. ValueError: a damaged checkpoint.
    """
    config = self._config
    with self._stop:
      state, step = self._restored()
      pending: _Pending | None = None
      loss, saved = math.nan, step
      while step < config.steps and not self._stop.at(step):
        tokens = self._next()
        state, metrics = self._program.train_step(state, tokens)
        step += 1
        started = _Pending(step, metrics, self._data.get_state())
        due = step == config.steps or _due(step, config.checkpoint_every)
        asked = step == config.steps or _due(step, config.eval_every)
        # At these steps nothing may be left in flight.
        waiting = [pending, started] if due or asked or self._stop.asked else [pending]
        pending = None if waiting[-1] is started else started
        for each in waiting:
          if each is None:
            continue
          loss, back = self._settle(each)
          if back:
            state, step, pending = self._back(each)
            due = asked = False
            break
        if asked:
          self._evaluate(state, step)
        if due:
          self._save(step, state)
          saved = step
      if pending is not None:
        loss, back = self._settle(pending)
        if back:
          state, step, _ = self._back(pending)
          saved = step
      if step != saved:
        self._save(step, state)
      self._checkpoints.close()
    stopped = self._stop.signal if step < config.steps else None
    return Outcome(step=step, loss=loss, valid_loss=self._valid_loss, stopped_by=stopped)

  def close(self) -> None:
    for tracker in self._trackers:
      tracker.close()
    if self._metrics:
      self._metrics.close()

  def _next(self) -> jax.Array:
    return self._program.put(self._rows, next(self._data), self._batch_size)

  def _restored(self) -> tuple[Any, int]:
    step = self._checkpoints.latest()
    if step is None:
      state = self._program.init_state()
      if self._metrics:
        self._metrics.cut(0)
      # Something to go back to from the first step on; and a full disk is met now, not in an hour.
      self._save(0, state)
      return state, 0
    state, rest = self._load(step)
    if self._metrics:
      self._metrics.cut(rest["metrics_offset"])
    self._data.set_state(rest["data"])
    return state, step

  def _load(self, step: int) -> tuple[Any, dict[str, Any]]:
    state, rest = self._checkpoints.restore(step, self._program.abstract_state())
    self._guard.set_state(rest["guard"])
    return state, rest

  def _save(self, step: int, state: Any) -> None:
    began = time.monotonic()
    if self._metrics:
      self._metrics.sync()
    self._checkpoints.save(
      step,
      state,
      {
        "data": self._data.get_state(),
        "guard": self._guard.get_state(),
        "metrics_offset": self._metrics.offset if self._metrics else 0,
      },
    )
    self._clock.pause(time.monotonic() - began)

  def _settle(self, pending: _Pending) -> tuple[float, bool]:
    """Reads the metrics of a step: returns its loss, and whether the run has to go back."""
    values = {name: float(value) for name, value in jax.device_get(dict(pending.metrics)).items()}
    loss, finite = values["loss"], bool(values.pop("finite", 1.0))
    verdict = self._guard.observe(loss, finite)
    record: dict[str, Any] = {"step": pending.step, **values}
    if verdict != "fine":
      record |= {"finite": finite, "verdict": verdict, "reason": self._guard.reason}
      self._say(f"step {pending.step}: {verdict}: {self._guard.reason}")
    else:
      self._losses.append(loss)
    self._clock.step()
    logged = _due(pending.step, self._config.log_every) or pending.step == self._config.steps
    if logged:
      speed = self._speed()
      record |= speed
      self._say_progress(pending.step, loss, speed)
    if self._metrics:
      self._metrics.write(record)
    if logged:
      self._track(pending.step, {**values, **speed})
    return loss, verdict == "back"

  def _back(self, bad: _Pending) -> tuple[Any, int, None]:
    """Goes back to the newest checkpoint, and on with the batches after the bad one."""
    returns, reason = self._guard.returns + 1, self._guard.reason
    if returns > self._config.guard.returns:
      raise TrainingError(
        f"step {bad.step}: {reason}; the run already went back {returns - 1} times, which is what"
        " guard.returns allows: lower optimizer.peak_lr, look at the data, or raise guard.returns"
      )
    self._checkpoints.wait()
    step = self._checkpoints.latest()
    assert step is not None, "a checkpoint is made before the first step"
    state, _ = self._load(step)
    self._guard.returns = returns
    self._data.set_state(bad.position)
    self._say(
      f"step {bad.step}: {reason}: back to step {step}, and on with the batches after it"
      f" (return {returns} of {self._config.guard.returns})"
    )
    if self._metrics:
      self._metrics.write(
        {"event": "back", "step": bad.step, "to_step": step, "reason": reason, "returns": returns,
         "next_batch": bad.position.get("next_index")}
      )  # fmt: skip
    self._clock.restart()
    return state, step, None

  def _evaluate(self, state: Any, step: int) -> None:
    if not self._config.eval_batches:
      return
    began = time.monotonic()
    valid = held_out(self._config, self._program)
    nats, count = 0.0, 0
    for _, batch in zip(range(valid.batches), valid.data, strict=False):
      tokens = self._program.put(valid.rows, batch, self._config.data.batch_size)
      each_nats, each_count = jax.device_get(self._program.eval_step(state, tokens))
      nats, count = nats + float(each_nats), count + int(each_count)
    self._valid_loss = loss = nats / count
    values = {"valid_loss": loss, "valid_perplexity": math.exp(min(loss, 700.0))}
    if self._metrics:
      self._metrics.write({"event": "evaluation", "step": step, **values, "valid_tokens": count})
    self._track(step, values)
    self._say(f"step {step}: held-out loss {loss:.4f}, perplexity {values['valid_perplexity']:.2f}")
    self._clock.pause(time.monotonic() - began)

  def _track(self, step: int, values: Mapping[str, float]) -> None:
    for tracker in self._trackers:
      tracker.log(step, values)

  def _speed(self) -> dict[str, float]:
    seconds = self._clock.seconds_per_step()
    if seconds is None:
      return {}
    rate = self._batch_size * self._config.data.seq_len / seconds
    speed = {"seconds_per_step": seconds, "tokens_per_s": rate}
    peak = self._program.peak_flops_per_s
    if peak:
      speed["mfu"] = rate * self._program.flops_per_token / peak
    return speed

  def _say_progress(self, step: int, loss: float, speed: Mapping[str, float]) -> None:
    mean = sum(self._losses) / len(self._losses) if self._losses else loss
    self._losses.clear()
    parts = [f"step {step}/{self._config.steps}", f"loss {mean:.4f}"]
    if "tokens_per_s" in speed:
      parts.append(f"{speed['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in speed:
      parts.append(f"MFU {speed['mfu']:.1%}")
    if "seconds_per_step" in speed:
      parts.append(f"{_duration((self._config.steps - step) * speed['seconds_per_step'])} left")
    self._say("  ".join(parts))


def check_data(config: TrainConfig, program: Program) -> None:
  """Refuses data that the loop would refuse, before the run has a folder.

  Raises: ValueError: a split is missing, or is less than a batch.
  """
  rows = program.rows(config.data.batch_size * config.accumulation)
  open_dataset(config.data, "train", accumulation=config.accumulation, rows=rows)
  if config.eval_batches:
    held_out(config, program)


@dataclasses.dataclass(frozen=True)
class _HeldOut:
  data: Batches
  rows: Rows
  batches: int


def held_out(config: TrainConfig, program: Program) -> _HeldOut:
  """Opens the held-out windows, the same at every evaluation: the first batches of a shuffled epoch.

  Raises: ValueError: there is no held-out split, or less than a batch of it.
  """
  rows = program.rows(config.data.batch_size)
  # Not by the run's seed: runs that differ in it are compared on the same windows.
  data = open_dataset(dataclasses.replace(config.data, seed=0), "valid", rows=rows)
  return _HeldOut(data, rows, min(config.eval_batches, int(data.epoch_batches)))


def _due(step: int, every: int) -> bool:
  return step % every == 0


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class _Clock:
  """Measures seconds per step since the last call, without pauses and without the first step's compiling."""

  def __init__(self) -> None:
    self.restart()

  def restart(self) -> None:
    self._since: float | None = None
    self._steps, self._paused = 0, 0.0

  def pause(self, seconds: float) -> None:
    self._paused += seconds

  def step(self) -> None:
    if self._since is None:
      self._since, self._steps, self._paused = time.monotonic(), 0, 0.0
    else:
      self._steps += 1

  def seconds_per_step(self) -> float | None:
    if self._since is None or not self._steps:
      return None
    now = time.monotonic()
    seconds = (now - self._since - self._paused) / self._steps
    self._since, self._steps, self._paused = now, 0, 0.0
    return max(seconds, 1e-9)


class _Stop:
  """Notes whether someone asked the run to end: SIGTERM (Slurm, Kubernetes) or Ctrl-C, once.

  With several processes, JAX's coordination service passes SIGTERM on, so that all stop at one step.
  """

  def __init__(self) -> None:
    self.signal: int | None = None
    self._before: dict[int, Any] = {}

  @property
  def asked(self) -> bool:
    return self.signal is not None

  def __enter__(self) -> None:
    # One process alone must not stop: the others would wait for it.
    signals = () if jax.process_count() > 1 else (signal.SIGINT, signal.SIGTERM)
    for number in signals:
      try:
        self._before[number] = signal.signal(number, self._note)
      except ValueError:
        # Not the main thread: whoever runs the loop there stops it another way.
        return

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: object) -> None:
    self.signal = number
    # The second one is obeyed at once.
    signal.signal(number, self._before[number])

  def at(self, step: int) -> bool:
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      if multihost_utils.reached_preemption_sync_point(step):
        self.signal = signal.SIGTERM
    return self.asked
