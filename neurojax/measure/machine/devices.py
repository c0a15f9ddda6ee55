"""Measures the speed of this host's devices by running small stages on them.

python -m neurojax.measure.machine.devices [SIZES]      (the default device of this process, as JSON)

Every device is measured in a process of its own: its memory is free again afterwards, and no two of JAX's
backends share a process. Times are the shortest of many, which other programs disturbed least.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from neurojax import count
from neurojax.config import ModelConfig, Sampling, Span, from_dict
from neurojax.forms import Scales, Weights
from neurojax.kernels import timing
from neurojax.measure.random_model import GROUP, random_model
from neurojax.plan.fleet import DecodeRates, Device
from neurojax.stage.compile import CompiledStage
from neurojax.stage.memory import free_memory_bytes
from neurojax.stage.runtime import StageRuntime
from neurojax.stage.step import Row

FORMS: tuple[Weights, ...] = ("dense", "int8", "w2a16", "w2a8")

_VOCAB, _FEW = 32_768, 512
_CALM, _IDLE_S = 3, 0.005
_LIMIT_S = 1800.0
_SAID = "# "
"""Begins a line in which a measuring process says what it does; its last line is the result."""


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes of what is measured.

  Attributes:
    read_bytes: Bytes of the array that is read; more than any cache holds.
    width: Width of the square matrices that are multiplied.
    wide: Architecture whose layers show the rate of reading weights; its number of layers is not used.
    wide_bytes: Bytes of a stage of such layers: more than a cache holds, but not much more, because other
      programs disturb long steps.
    steps: Steps of each stage in a round.
    rounds: Rounds at most, with the stages in turn.
    forms: Weights whose rate is measured.
  """

  read_bytes: int
  width: int
  wide: ModelConfig
  wide_bytes: int
  steps: int
  rounds: int
  forms: tuple[Weights, ...] = FORMS

  def within(self, free_bytes: int) -> Self:
    """The same sizes, with no array or stage larger than an eighth of the free memory."""
    most = free_bytes // 8
    return dataclasses.replace(
      self, read_bytes=min(self.read_bytes, most), wide_bytes=min(self.wide_bytes, most)
    )


def _config(width: int, ffn: int, layers: int, *, vocab: int = _FEW) -> ModelConfig:
  heads = max(1, width // 128)
  return ModelConfig(
    vocab_size=vocab,
    model_dim=width,
    num_layers=layers,
    num_heads=heads,
    num_kv_heads=max(1, heads // 4),
    head_dim=128,
    ffn_dim=ffn,
  )


QUICK = Sizes(
  read_bytes=1 << 24,
  width=128,
  wide=_config(128, 256, 1),
  wide_bytes=1 << 20,
  steps=10,
  rounds=1,
  forms=("w2a8",),
)
CPU = Sizes(
  read_bytes=1 << 27,
  width=1024,
  wide=_config(512, 2048, 1),
  wide_bytes=1 << 27,
  steps=20,
  rounds=24,
)
GPU = Sizes(
  read_bytes=1 << 31,
  width=8192,
  wide=_config(4096, 12288, 1),
  wide_bytes=3 << 29,
  steps=40,
  rounds=24,
)


def _nothing(_: str) -> None:
  pass


def probe_devices(
  *,
  quick: bool = False,
  layers_of: ModelConfig | None = None,
  forms: Sequence[Weights] = FORMS,
  say: Callable[[str], None] = _nothing,
) -> tuple[Device, ...]:
  """Measure every GPU that JAX sees on this host, then its CPUs. Takes a minute or two for each.

  Args:
    quick: Measure for seconds: shows whether probing works, not what the devices can do.
    layers_of: Architecture whose layers show the rate of decoding; a middling size if absent.
    forms: Weights whose rate of decoding is measured.
    say: Called with a few words before each part of the work.
  Raises: OSError: a measuring process failed.
  """
  # Where JAX is told to use the CPU, or finds nothing else, there is no GPU to a stage server either.
  listed = json.loads(_child(["--list"], {}))
  devices = []
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  names = visible.split(",") if visible else [str(index) for index in range(len(listed))]

  def arguments(sizes: Sizes) -> list[str]:
    sizes = dataclasses.replace(sizes, wide=layers_of or sizes.wide, forms=tuple(forms))
    return [json.dumps(dataclasses.asdict(QUICK if quick else sizes))]

  for index, kind in enumerate(listed):
    if kind == "cuda":
      gpu = names[index]
      one = _child(
        arguments(GPU),
        {"CUDA_VISIBLE_DEVICES": gpu},
        lambda text, gpu=gpu: say(f"GPU {gpu}: {text}"),
      )
      devices.append(one)
  devices.append(
    _child(arguments(CPU), {"JAX_PLATFORMS": "cpu"}, lambda text: say(f"CPUs: {text}"))
  )
  return tuple(from_dict(Device, json.loads(text), where="probe") for text in devices)


def probe_device(sizes: Sizes, say: Callable[[str], None] = _nothing) -> Device:
  """Measure the default device of this process."""
  kind = "cuda" if jax.default_backend() == "gpu" else "cpu"
  dtype = "bfloat16" if kind == "cuda" else "float32"
  total, free = _memory(kind)
  sizes = sizes.within(free)
  say("reading memory")
  read = timing.read_rate(sizes.read_bytes, runs=2 * sizes.rounds, pick=min)
  decode, layer_s, step_s, entry_s = _decode(sizes, dtype, say)
  say("multiplying matrices")
  flops = _matrix_rate(sizes, dtype)
  say("copying into its memory")
  upload = _upload_rate(sizes)
  return Device(
    kind=kind,
    name=timing.device_name(),
    memory_bytes=total,
    used_bytes=total - free,
    read_bytes_per_s=read,
    flops_per_s=flops,
    flops_dtype=dtype,
    upload_bytes_per_s=upload,
    decode_bytes_per_s=decode,
    layer_overhead_s=layer_s,
    step_overhead_s=step_s,
    sample_s_per_entry=entry_s,
  )


def _decode(
  sizes: Sizes, dtype: str, say: Callable[[str], None]
) -> tuple[DecodeRates, float, float, float]:
  """Rates by form of weights, and seconds for each layer, each stage and each entry of the vocabulary.

  For each form three middle stages of a model are timed: two so narrow that their weights cost nothing, with
  different numbers of layers, and a wide one. The time of the wide one beyond the overhead of its layers,
  which the narrow ones show, is reading.
  """
  few, many, forms = 2, 18, sizes.forms
  stages: dict[tuple[Weights, str], _Timed] = {}
  for form in forms:
    say(f"decoding, weights {form}: compiling")
    stages[form, "few"] = _Timed(_config(128, 128, few + 2), form, dtype)
    stages[form, "many"] = _Timed(_config(128, 128, many + 2), form, dtype)
    one = dataclasses.replace(sizes.wide, num_layers=1, vocab_size=_FEW, context_length=128)
    ternary = dict.fromkeys(count.layer_matrices(one), Scales(GROUP, 2))
    per_layer = count.layer_bytes(one, dtype=dtype, weights=form, forms=ternary)
    layers = -(-sizes.wide_bytes // per_layer)
    stages[form, "wide"] = _Timed(dataclasses.replace(one, num_layers=layers + 2), form, dtype)
  # Sampling a token costs the same whatever form the head has: take one that reads little.
  head = forms[-1]
  last = _Timed(_config(128, 128, few + 2, vocab=_VOCAB), head, dtype, last=True)
  _settle([*stages.values(), last], sizes, say)
  per_layer, per_step, rates = [], [], {}
  for form in forms:
    short, long = (stages[form, name].best_s for name in ("few", "many"))
    layer_s = max(0.0, long - short) / (many - few)
    per_layer.append(layer_s)
    per_step.append(max(0.0, short - few * layer_s))
  layer_s, step_s = (float(np.median(values)) for values in (per_layer, per_step))
  for form in forms:
    timed = stages[form, "wide"]
    # At least half of the step is reading, or this width is too small to tell.
    reading_s = max(timed.best_s - timed.layers * layer_s - step_s, timed.best_s / 2)
    rates[form] = timed.weight_bytes / reading_s
  middle = stages[head, "few"]
  head_s = (last.weight_bytes - middle.weight_bytes) / rates[head]
  drawing_s = last.best_s - middle.best_s - head_s
  return DecodeRates(**rates), layer_s, step_s, max(0.0, drawing_s) / _VOCAB


def _settle(stages: Sequence["_Timed"], sizes: Sizes, say: Callable[[str], None]) -> None:
  """Run the stages in turn until none of the shortest times still falls, or `rounds` are over."""
  calm = 0
  for number in range(1, sizes.rounds + 1):
    say(f"decoding: round {number} of at most {sizes.rounds}")
    before = [stage.best_s for stage in stages]
    for stage in stages:
      stage.run(sizes.steps)
    fell = any(stage.best_s < 0.97 * b for stage, b in zip(stages, before, strict=True))
    calm = 0 if fell else calm + 1
    if calm == _CALM:
      return


class _Timed:
  """Times the steps of one compiled stage of random weights, at batch 1.

  It idles before each step, as a stage does while others have the token: threads that went to sleep take
  time to wake.
  """

  def __init__(self, config: ModelConfig, form: Weights, dtype: str, *, last: bool = False):
    number = config.num_layers
    span = Span(
      first_layer=2 if last else 1, last_layer=number - (1 if last else 2), num_layers=number
    )
    model = random_model(config, span, dtype=jnp.dtype(dtype), weights=form)
    self._stage = CompiledStage(model, context_length=128, buckets=(1,))
    self._runtime = StageRuntime(self._stage)
    self.weight_bytes = self._stage.weight_bytes
    self.layers, self.best_s = len(span), float("inf")

  def run(self, steps: int) -> None:
    self._runtime.open(0, Sampling())
    hidden = np.ones((1, self._stage.config.model_dim), self._stage.activations)
    for start in range(steps):
      row = Row(
        slot=0,
        start=start,
        tokens=np.zeros(1, np.int32),
        hidden=hidden,
        role="drawn",
        draws=1,
      )
      time.sleep(_IDLE_S)
      began_s = time.perf_counter()
      self._runtime.step([row])
      if start > 1:
        self.best_s = min(self.best_s, time.perf_counter() - began_s)
    self._runtime.close(0)


def _matrix_rate(sizes: Sizes, dtype: str) -> float:
  width, times = sizes.width, 8
  x, y = (jax.random.normal(jax.random.key(i), (width, width), jnp.dtype(dtype)) for i in range(2))
  y = y * jnp.asarray(width**-0.5, y.dtype)
  product = jax.jit(lambda x, y: lax.fori_loop(0, times, lambda _, x: x @ y, x))
  return times * 2 * width**3 / timing.seconds(product, x, y, runs=sizes.rounds, pick=min)


def _upload_rate(sizes: Sizes) -> float:
  """Bytes per second of a copy into the device's memory. On a CPU JAX is made to copy, too."""
  array = np.ones(sizes.read_bytes // 8, np.float32)
  return array.nbytes / timing.seconds(
    lambda: jnp.array(array, copy=True), runs=2 * sizes.rounds, pick=min
  )


def _memory(kind: str) -> tuple[int, int]:
  """Bytes of the device's memory, and bytes of it that a stage could take now."""
  free = free_memory_bytes()
  if kind == "cpu":
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), free
  # The driver knows the memory that other processes use, JAX the part that it may take.
  program = shutil.which("nvidia-smi")
  if program is None:
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", free)
    return limit, free
  which = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
  wanted = "--query-gpu=memory.total,memory.free"
  command = [program, f"--id={which}", wanted, "--format=csv,noheader,nounits"]
  answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
  total, unused = (int(part) << 20 for part in answer.split(","))
  return total, min(free, unused)


def _child(
  arguments: Sequence[str], environment: dict[str, str], say: Callable[[str], None] = _nothing
) -> str:
  """Run this module in a process of its own.

  Returns: The last line that it prints.
  Raises: OSError: it fails, or takes longer than _LIMIT_S.
  """
  command = [sys.executable, "-m", "neurojax.measure.machine.devices", *arguments]
  what = " ".join(f"{key}={value}" for key, value in environment.items()) or "JAX"
  line, late = "", threading.Event()
  with (
    tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,
    subprocess.Popen(
      command,
      stdout=subprocess.PIPE,
      stderr=errors,
      text=True,
      env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, **environment},
    ) as process,
  ):

    def end() -> None:
      late.set()
      process.kill()

    timer = threading.Timer(_LIMIT_S, end)
    timer.start()
    try:
      assert process.stdout is not None
      for line in process.stdout:
        if line.startswith(_SAID):
          say(line.removeprefix(_SAID).rstrip("\n"))
      process.wait()
    except BaseException:
      process.kill()
      raise
    finally:
      timer.cancel()
    if late.is_set():
      raise OSError(f"measuring with {what} took longer than {_LIMIT_S:.0f} s")
    if process.returncode:
      errors.seek(0)
      raise OSError(f"measuring with {what} failed: {errors.read().strip()[-400:]}")
  return line.rstrip("\n")


def _main(arguments: Sequence[str]) -> None:
  kinds = ["cuda" if device.platform == "gpu" else "cpu" for device in jax.devices()]
  if "--list" in arguments:
    print(json.dumps(kinds))
    return
  own = {"cuda": GPU, "cpu": CPU}[kinds[0]]
  sizes = from_dict(Sizes, json.loads(arguments[0]), where="sizes") if arguments else own
  found = probe_device(sizes, lambda text: print(f"{_SAID}{text}", flush=True))
  device = dataclasses.asdict(found)
  rates = {key: value for key, value in device["decode_bytes_per_s"].items() if value is not None}
  device["decode_bytes_per_s"] = rates
  print(json.dumps({key: value for key, value in device.items() if value is not None}))


if __name__ == "__main__":
  _main(sys.argv[1:])
