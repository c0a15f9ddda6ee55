"""Writes a sized model as the configuration of a training run."""

import math
import tomllib
from typing import Any

from neurojax.config import to_toml
from neurojax.forms import Scales
from neurojax.scaling.purpose import TrainPurpose
from neurojax.scaling.size import Sized

PEAK_LR = 3e-4
"""Peak of the learning rate, for a start. Source: Llama 3 8B, arXiv:2407.21783, table 3. Doubt: the best one
depends on size, batch and quantization, and nothing is known of them here."""

DATA_FOLDER = "data/prepared"
"""Folder of the token shards, for a start: `neurojax data prepare --out` makes one."""

NOTE = f"""Complete as it stands, but two values are only a start: data.folder, which `neurojax data prepare --out`
makes, and optimizer.peak_lr = {PEAK_LR:g}, which is to be tuned. `neurojax train --config FILE --show`
prints every key.
"""


def train_table(found: Sized, scales: Scales | None = None) -> dict[str, Any]:
  """The keys of `train.config.TrainConfig` for a model that was sized for training.

  Keys that are left out have their defaults.

  Args:
    scales: Scales of the ternary weights to train; None trains plain weights.
  Raises: ValueError: the model was sized for serving, or for an optimizer that training does not have.
  """
  purpose = found.purpose
  if not isinstance(purpose, TrainPurpose):
    raise ValueError("the model was sized for serving: size it for training (--for train)")
  if purpose.optimizer == "sgd":
    raise ValueError(
      "optimizer sgd: `neurojax train` has adamw and muon: size for one of these (--optimizer)"
    )
  quantization: dict[str, Any] = {"weights": "none"}
  if scales is not None:
    quantization = {"weights": "ternary", "activations": "int8"}
    if scales.group_size is not None:
      quantization["group_size"] = scales.group_size
  return {
    "steps": math.ceil(found.losses.tokens / (purpose.sequences * purpose.context)),
    "compute_dtype": purpose.compute_dtype,
    "remat": "full" if purpose.remat else "none",
    "model": tomllib.loads(to_toml(found.config)),
    "quantization": quantization,
    "optimizer": {"name": purpose.optimizer, "peak_lr": PEAK_LR},
    "data": {
      "folder": DATA_FOLDER,
      "batch_size": purpose.sequences,
      "seq_len": purpose.context,
    },
  }


def train_toml(found: Sized, scales: Scales | None = None) -> str:
  """TOML that `neurojax train --config` takes. Arguments and errors as for `train_table`."""
  import tomli_w

  return tomli_w.dumps(train_table(found, scales))
