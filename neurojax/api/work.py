"""Functions of the face: sizing, planning, training, and files."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from neurojax.config import Dtype, ModelConfig, Serving
from neurojax.config.serving import check_choice
from neurojax.forms import TERNARY_FORMATS, Weights
from neurojax.plan.fleet import Fleet, read_fleet
from neurojax.plan.plan import Objective, Plan

if TYPE_CHECKING:
  from jax import Array

  from neurojax.files.write.gguf import Converted
  from neurojax.plan.simulate import Failure, Result
  from neurojax.scaling.size import Sized
  from neurojax.train.config import TrainConfig
  from neurojax.train.exported import Exported
  from neurojax.train.loop import Outcome
  from neurojax.weights.ternary import Mode, TernaryArray

OnTensor = Callable[[int, int], None]
"""Called with the tensors that are written, and all of them."""


def size(
  memory: int | str | Fleet,
  *,
  purpose: Literal["serve", "train"] = "serve",
  form: str = "ternary-g128",
  context: int = 2048,
  sequences: int = 1,
  headroom: float = 0.1,
  current: ModelConfig | None = None,
  most_parameters: float | None = None,
  tokens: float | None = None,
  days: float | None = None,
  time_limit_s: float = 5.0,
) -> "Sized":
  """The largest architecture that fits the machines at hand, with a placement and predicted speed and loss.

  Args:
    memory: Bytes of one device, words such as "64GB", the name or file of a fleet, or a `Fleet`.
    purpose: "serve" counts weights and caches, "train" master weights, gradients and optimizer.
    form: Form of the weights when serving: "bf16", "float32", "int8", or a ternary one such as
      "ternary-g128" or "TQ2_0". Training holds float32 master weights.
    context: Positions of a sequence.
    sequences: Sequences in memory at the same time.
    headroom: Part of each place's free memory that stays free.
    current: The architecture in use: it stays while it fits and nothing 1.3 times as large does.
    most_parameters: Largest architecture to consider.
    tokens: Tokens of training, for the predicted loss; None: as many as suit the size.
    days: Days of training on these machines, in place of tokens.
    time_limit_s: Seconds for the search of a placement.
  Raises: ValueError: nothing fits; says what is missing and what would fit.

  Example:
    >>> import neurojax as nj
    >>> found = nj.size("8GB", context=4096)
    >>> found.config.num_layers > 10 and found.parameters > 1e9
    True
  """
  from neurojax.scaling.purpose import purpose_of
  from neurojax.scaling.size import size as largest

  wanted = purpose_of(purpose, form=form, context=context, sequences=sequences)
  return largest(
    memory,
    wanted,
    headroom=headroom,
    current=current,
    most_parameters=most_parameters,
    tokens=tokens,
    days=days,
    time_limit_s=time_limit_s,
  )


def plan(
  model: str | Path | ModelConfig,
  fleet: str | Path | Fleet,
  *,
  weights: Weights | Literal["auto"] = "auto",
  dtype: Dtype = "float32",
  context: int | None = None,
  sequences: int | None = None,
  objective: Objective = "latency",
  form: str = "ternary-g128",
  batch: int = 1,
  pins: Mapping[str, int] | None = None,
  replicas: int | None = 1,
  time_limit_s: float = 5.0,
) -> Plan:
  """Which machine should hold which layers of a model, with the time a token takes and why.

  Args:
    model: A model file, a name, or an architecture (its name in configs/model, or a `ModelConfig`).
    fleet: The name or file of a fleet, "host:port,...", or a `Fleet`.
    weights, dtype, context: As for `load`.
    sequences: Sequences at the same time; None: 4, or for throughput as many as help.
    objective: "latency" for the least time a token, "throughput" for the most tokens.
    form: Form of ternary matrices, for an architecture without a file.
    batch: Sequences that each decode step computes together.
    pins: Number of layers that a host or place has to hold, by its label; 0 keeps it out.
    replicas: 1 gives every layer one place, a larger number that many whole pipelines side by side; None,
      for throughput, gives the same layers to several places wherever that brings more.
    time_limit_s: Seconds for the search, where the best plan cannot be computed.
  Raises: ValueError: the model does not fit; which limit, by how much, what would fit.

  Example:
    >>> import neurojax as nj
    >>> [stage.host for stage in nj.plan("llama-8b", "lab", weights="w2a8").stages]
    ['rack']
  """
  from neurojax.count import uniform_ternary
  from neurojax.files.described import Described, described
  from neurojax.plan.in_flight import planned

  if isinstance(model, ModelConfig):
    check_choice("form", form, tuple(TERNARY_FORMATS))
    forms = uniform_ternary(model, TERNARY_FORMATS[form]) if weights in ("w2a8", "w2a16") else None
    found = Described(model, forms)
  else:
    found = described(model, weights=weights, ternary=form)
  serving = Serving(dtype=dtype, weights=weights, context=context)
  if sequences is not None:
    serving = dataclasses.replace(serving, sequences=sequences)
  return planned(
    found.config,
    fleet if isinstance(fleet, Fleet) else read_fleet(str(fleet)),
    serving.resolve(found.config, found.forms, found.activations),
    found.forms,
    objective=objective,
    choose_sequences=sequences is None,
    batch=batch,
    pins=pins,
    replicas=replicas,
    time_limit_s=time_limit_s,
  )


def simulate(
  plan: Plan,
  *,
  requests: int = 64,
  concurrency: int = 4,
  prompt: int = 128,
  answer: int = 128,
  failures: "Sequence[Failure]" = (),
  failures_per_hour: float = 0.0,
  repair_s: float = 60.0,
  retry: bool = True,
  seed: int = 0,
) -> "Result":
  """Send requests, and failures if you like, through a plan on paper.

  Args:
    plan: What `neurojax.plan` gave.
    requests: Requests in all.
    concurrency: Requests at the same time.
    prompt, answer: Tokens of each request.
    failures: Hosts that fail, each a `neurojax.plan.simulate.Failure(host=..., at_s=...)`.
    failures_per_hour: Failures of each host in an hour while it is up, at random times.
    repair_s: Seconds from a failure until a replacement serves the same layers.
    retry: Whether a request whose attempt failed is sent again.
    seed: Seed of the times of random failures.
  Returns: Tokens per second, and how long first tokens, later tokens and requests took.

  Example:
    >>> import neurojax as nj
    >>> made = nj.plan("llama-8b", "lab", weights="w2a8")
    >>> nj.simulate(made, requests=8, concurrency=2).failed
    0
  """
  from neurojax.plan.simulate import simulate as run

  return run(
    plan,
    requests=requests,
    concurrency=concurrency,
    prompt=prompt,
    answer=answer,
    within_plan=True,
    failures=failures,
    failures_per_hour=failures_per_hour,
    repair_s=repair_s,
    retry=retry,
    seed=seed,
  )


def convert(
  model: str | Path,
  out: str | Path,
  *,
  type: str | None = None,
  outer_type: str | None = None,
  name: str | None = None,
  license: str | None = None,
  tokenizer: str | Path | None = None,
  progress: OnTensor | None = None,
) -> "Converted":
  """Write a model file as GGUF, or as a folder that transformers reads. Nothing is replaced.

  Args:
    model: A model file, or a name as for `load`.
    out: A path that ends in ".gguf", or a new folder.
    type: Type of the layers' matrices ("TQ2_0", "Q2_0", "Q8_0", "F16", ...); None keeps each as it is.
    outer_type: Type of embedding and head in GGUF.
    name, license: What the file says of itself.
  Returns: Architecture, types written, and how much the numbers changed (not at all without a type).
  Raises: ValueError: the place is taken, or a type that cannot hold the numbers.

  Example:
    >>> import tempfile, neurojax as nj
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   made = nj.convert("neurollm", f"{folder}/copy.gguf")
    >>> made.architecture
    'bitnet'
  """
  from neurojax.api.opening import open_file
  from neurojax.files.write.folder import to_folder
  from neurojax.files.write.gguf import to_gguf

  said = {"general.name": name, "general.license": license}
  general = {key: value for key, value in said.items() if value is not None}
  path = Path(out)
  with open_file(model, tokenizer) as file:
    if path.suffix.lower() == ".gguf":
      return to_gguf(file, path, kind=type, outer=outer_type, general=general, progress=progress)
    if outer_type is not None:
      raise ValueError("outer_type belongs to GGUF: let out end in .gguf, or leave it out")
    return to_folder(file, path, kind=type, general=general, progress=progress)


def train(
  config: "TrainConfig | str | Path",
  workdir: str | Path,
  *,
  overrides: Mapping[str, Any] | None = None,
  overwrite: bool = False,
  say: Callable[[str], None] = print,
) -> "Outcome":
  """Train a model, or go on with the training run in a folder from its newest checkpoint.

  Args:
    config: A `TrainConfig`, its TOML file, or a name in configs/train such as "tiny".
    workdir: Folder of the run: configuration, metrics and checkpoints.
    overrides: Keys of the configuration by dotted name, such as {"data.folder": "books", "steps": 100}.
    overwrite: Remove the run in the folder and begin anew.
    say: Called with a line for each report.
  Returns: The last step, its losses, and the signal that ended the run early, if one did.
  Raises: ValueError: settings that cannot be, or a run in the folder that was begun with others.

  Example:
    >>> import tempfile, neurojax as nj
    >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +IGNORE_EXCEPTION_DETAIL
    ...   nj.train("tiny", folder, overrides={"data.folder": "no-such-data"})
    Traceback (most recent call last):
    FileNotFoundError: no-such-data: no prepared data here
  """
  from neurojax.folders import cache_dir
  from neurojax.stage.compilation_cache import use_compilation_cache
  from neurojax.train.config import TrainConfig
  from neurojax.train.run import train as run
  from neurojax.train.settings import change_config, read_config

  use_compilation_cache(cache_dir() / "xla")
  read = config if isinstance(config, TrainConfig) else read_config(config)
  return run(change_config(read, overrides or {}), Path(workdir), overwrite=overwrite, say=say)


def export(
  workdir: str | Path,
  out: str | Path,
  *,
  step: int | None = None,
  type: str | None = None,
  dtype: Literal["float32", "bfloat16"] | None = None,
  tokenizer: str | Path | None = None,
  name: str | None = None,
  license: str | None = None,
  description: str | None = None,
  author: str | None = None,
  url: str | None = None,
  overwrite: bool = False,
  progress: OnTensor | None = None,
) -> "Exported":
  """Write a checkpoint of a training run as GGUF, or as a folder that transformers reads.

  Ternary matrices keep the very codes and scales that training multiplied by.

  Args:
    workdir: Folder of the run.
    out: A path that ends in ".gguf", or a new folder.
    step: The checkpoint; the newest if absent.
    type: Type of ternary matrices in GGUF, or of all matrices of a model that is not ternary.
    dtype: Dtype of all tensors in a folder.
    tokenizer: A model file, a tokenizer.json or prepared data, where the run's own data are not at hand.
    name, license, description, author, url: What the file says of the model.
    overwrite: Replace what an earlier export left there.
    progress: Called with the tensors that are written, and all of them.
  Raises: ValueError: no run, a place that is taken, or a type that cannot hold the numbers.

  Example:
    >>> import neurojax as nj
    >>> nj.export("no-such-run", "out.gguf")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    FileNotFoundError: no-such-run: no such folder
  """
  from neurojax.train.exported import export as write

  return write(
    Path(workdir), Path(out), step=step, type=type, dtype=dtype,
    tokenizer=None if tokenizer is None else Path(tokenizer),
    said={
      "name": name, "license": license, "description": description, "author": author, "url": url,
    },
    overwrite=overwrite, progress=progress,
  )  # fmt: skip


def inspect(model: str | Path, *, tokenizer: str | Path | None = None) -> "Description":
  """What a model file says of itself: architecture, sizes, types, tokenizer, and what would not run.

  Args:
    model: A model file, or a name as for `load`.
  Returns: A mapping of plain values that shows itself well in a notebook.

  Example:
    >>> import neurojax as nj
    >>> nj.inspect("neurollm")["format"]
    'gguf'
  """
  from neurojax.api.opening import open_file
  from neurojax.files.inspect import describe

  with open_file(model, tokenizer) as file:
    return Description(describe(file))


class Description(dict[str, Any]):
  """Plain values about a model file."""

  def _repr_html_(self) -> str:
    import io

    from rich.console import Console

    from neurojax.files.inspect import render

    console = Console(record=True, width=100, file=io.StringIO())
    console.print(render(self))
    return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")


def quantize(
  w: "np.ndarray | Array",
  *,
  contracted_axes: int = 1,
  group_size: int | None = 128,
  exact: bool = False,
  mode: "Mode" = "w2a16",
  scale_dtype: Literal["float16", "bfloat16", "float32"] = "float16",
) -> "TernaryArray":
  """Turn a float matrix into a packed ternary one, about two bits a weight.

  Args:
    w: Finite real numbers, not empty; they are read as float32. For y = x @ w, w is [K, N] and its
      first axis is contracted.
    contracted_axes: c > 0: products sum over the first c axes; c < 0: over the last -c.
    group_size: Contracted elements that share a scale, a multiple of 64; None: one for the matrix.
    exact: Whether w must hold ternary values already; else every weight is rounded to the nearest of
      -s, 0 and s, where s is the mean magnitude of its group.
    mode: "w2a16" multiplies activations as they are, "w2a8" rounds them to int8.
    scale_dtype: Dtype in which scales are kept. float16, as model files have it, holds scales from
      2**-17 (7.6e-6) to 65504; bfloat16 and float32 hold smaller and larger ones.
  Raises:
    ValueError: w is empty, not of real numbers, or not finite; a scale is beyond the range of
      `scale_dtype`; w is not ternary, with `exact`; an argument is none of its choices.
  Source: BitNet b1.58, arXiv:2402.17764, equations 1 to 3.

  Example:
    >>> import numpy as np, neurojax as nj
    >>> w = nj.quantize(np.ones((128, 64), np.float32))
    >>> w.nbytes < 128 * 64 * 4 / 10
    True
  """
  import jax.numpy as jnp

  from neurojax.weights import quantize as by

  values = np.asarray(w)
  if not any(jnp.issubdtype(values.dtype, kind) for kind in (np.floating, np.integer, np.bool_)):
    raise ValueError(f"w is {values.dtype}: pass real numbers, such as float32")
  make = by.exact if exact else by.absmean
  return make(
    values.astype(np.float32, copy=False),
    contracted_axes,
    group_size=group_size,
    scale_dtype=scale_dtype,
    mode=mode,
  )


def ternary_matmul(x: "Array", w: "TernaryArray") -> "Array":
  """Multiply activations by a packed ternary matrix, by the fastest kernel for the device.

  The product has no gradient and no batching rule: `jax.grad` and `jax.vmap` do not go through it.
  Put further batch axes in front of x instead; to train, use `neurojax.weights.aware`.

  Args:
    x: Floats [..., K]: batch axes, or none, then the axes that w contracts, in w's order. A matrix
      made with contracted_axes=2 from [A, B, N] takes [..., A, B].
    w: A matrix from `quantize`.
  Returns: float32 [..., N]: the batch axes of x, then all axes of w that are not contracted. A
    matrix made from [K, N, H] gives [..., N, H]. Empty if a batch axis is.
  Raises:
    TypeError: w is no `TernaryArray`.
    ValueError: shapes do not fit, or x holds no floats.

  Example:
    >>> import numpy as np, neurojax as nj
    >>> w = nj.quantize(np.ones((128, 64), np.float32))
    >>> float(nj.ternary_matmul(np.ones((1, 128), np.float32), w)[0, 0])
    128.0
  """
  import math

  import jax.numpy as jnp

  from neurojax.kernels.gemm.api import matmul
  from neurojax.weights.ternary import TernaryArray

  if not isinstance(w, TernaryArray):
    raise TypeError(
      f"w is a {type(w).__name__}: pass a TernaryArray, which neurojax.quantize makes"
    )
  w.check_single()
  values = jnp.asarray(x)
  contraction = w.contraction
  contracted = contraction.contracted_shape
  batch, last = values.shape[: -len(contracted)], values.shape[-len(contracted) :]
  if last != contracted:
    raise ValueError(
      f"x has shape {values.shape} and ends in {last}: w, of shape {w.weight_shape}, contracts"
      f" {contracted}"
    )
  y_MxN = matmul(values.reshape(math.prod(batch), contraction.k), w)
  return y_MxN.reshape(*batch, *contraction.kept_shape)
