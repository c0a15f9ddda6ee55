"""How much memory loading takes: little more than the file. A process of its own is measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from neurojax.config import ModelConfig
from neurojax.files.dummy import write_dummy

CONFIG = ModelConfig(
  vocab_size=1024, model_dim=2048, num_layers=4, num_heads=16, num_kv_heads=16, head_dim=128,
  ffn_dim=8192, rope_style="interleaved",
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells a process's memory")
def test_a_packed_file_loads_into_little_more_memory_than_its_size(tmp_path: Path):
  path = tmp_path / "m.gguf"
  write_dummy(path, CONFIG, "Q2_0 (group 128)")
  file_mb = path.stat().st_size / 1e6
  assert file_mb > 64
  command = [sys.executable, "-m", "experiments.load.child", str(path), "w2a16"]
  found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
  assert found["peak_mb"] - found["before_mb"] < 1.3 * file_mb
