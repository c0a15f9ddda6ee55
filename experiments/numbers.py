"""Collects figures of several experiments in two tables: of the README, and of docs/running.md.

python -m experiments.numbers
"""

import csv
from pathlib import Path

from experiments.readme import DOCS, block

HERE = Path(__file__).parent


def _row(file: str, **wanted: str) -> dict[str, str]:
  """The last row of a results file with these values. Raises ValueError: there is none."""
  with (HERE / file).open(encoding="utf-8") as lines:
    rows = [row for row in csv.DictReader(lines) if wanted.items() <= row.items()]
  if not rows:
    raise ValueError(f"{file} has no row with {wanted}")
  return rows[-1]


def readme_table() -> str:
  """Markdown: one figure of each kind, with its device and what it is beside."""
  out = ["| what | model | device | result | beside |", "|---|---|---|---|---|"]
  for file, weights in (("cpu_ternary", "w2a8"), ("cpu_decode", "int8")):
    row = _row(f"{file}/results.csv", what="decode", weights=weights)
    model = "Llama of 1.1B, random" if file == "cpu_ternary" else "SmolLM2-135M"
    out.append(
      f"| decode, `{weights}` | {model} | {row['cores']} cores of {row['device']}"
      f" | {float(row['tokens_per_s']):.0f} tokens/s"
      f" | llama.cpp, same run: {float(row['llama_tokens_per_s']):.0f} |"
    )
  wanted = {"arch": "bonsai-8b", "batch": "1"}
  row = _row("gpu_decode/results.csv", what="decode", length="128", **wanted)
  out.append(
    f"| decode, `w2a8`, kernels alone | Qwen3 of 8B, random | {row['device']}"
    f" | {float(row['tokens_per_s']):,.0f} tokens/s"
    f" | {float(row['read_fraction']):.0%} of the read bandwidth |"
  )
  for concurrent, who in (("1", "one request"), ("64", "64 requests at once")):
    row = _row("engine_load/results.csv", concurrent=concurrent, sampling="greedy", prompt="128")
    alone = _row("engine_load/kernels.csv", what="decode", batch=concurrent)
    out.append(
      f"| decode, `w2a8`, the engine, {who} | Qwen3 of 8B, random | {row['device']}"
      f" | {float(row['decode_tokens_per_s']):,.0f} tokens/s"
      f" | kernels alone, same card: {float(alone['tokens_per_s']):,.0f} |"
    )
  row = _row("gpu_decode/results.csv", what="prefill", length="2048", **wanted)
  out.append(
    f"| prefill of 2048, `w2a8`, kernels alone | Qwen3 of 8B, random | {row['device']}"
    f" | {float(row['tokens_per_s']):,.0f} tokens/s"
    f" | {float(row['matmul_fraction']):.0%} of XLA's bfloat16 products |"
  )
  wanted = {"arch": "neurollm-1b", "batch": "16", "optimizer": "adamw", "flags": ""}
  row = _row("train_mfu/results.csv", weights="ternary", **wanted)
  out.append(
    f"| training step, ternary | neurollm-1b | {row['device']}"
    f" | {float(row['tokens_per_s']):,.0f} tokens/s"
    f" | {float(row['mfu']):.0%} of the data sheet's FLOP/s; {_as_long(float(row['overhead']))} |"
  )
  ternary, twin = (_row("embedded/results.csv", weights=name) for name in ("ternary", "bf16"))
  out.append(
    f"| held-out loss, ternary | neurollm, 42M | | {float(ternary['valid_loss']):.2f} nats"
    f" | its bfloat16 twin: {float(twin['valid_loss']):.2f} |"
  )
  return "\n".join(out) + "\n"


def _as_long(overhead: float) -> str:
  """A step's time beside that of a bfloat16 step.

  Args:
    overhead: The part by which the step is longer; negative if it is shorter.
  """
  if abs(overhead) < 0.01:
    return "as long as a bfloat16 step, within 1%"
  return f"{abs(overhead):.0%} {'longer' if overhead > 0 else 'shorter'} than a bfloat16 step"


def weights_table() -> str:
  """Markdown: what each choice of --weights costs and changes."""
  small, large = "SmolLM2-135M", "Llama of 1.1B"
  bits = {
    "dense": "32, or 16 with `--dtype bfloat16`",
    "int8": "8, and a scale for each output",
    "w2a16": f"{_row('load/types.csv', type='TQ2_0')['memory_bits']} (TQ2_0)",
  }
  bits["w2a8"] = bits["w2a16"]
  speed = {
    "dense": _row("cpu_decode/results.csv", what="decode", weights="dense float32"),
    "int8": _row("cpu_decode/results.csv", what="decode", weights="int8"),
    "w2a16": _row("cpu_ternary/results.csv", what="decode", weights="w2a16"),
    "w2a8": _row("cpu_ternary/results.csv", what="decode", weights="w2a8"),
  }
  change = {
    "dense": "nothing",
    "int8": "weights, to 8 bits",
    "w2a16": "nothing",
    "w2a8": "activations, to 8 bits (so ternary models are trained)",
  }
  out = [
    "| `--weights` | bits a weight in memory | what is rounded | decode | perplexity of neurollm |",
    "|---|---|---|---|---|",
  ]
  for name, row in speed.items():
    model = large if name.startswith("w2") else small
    perplexity = "not measured"
    if name != "int8":
      found = _row("embedded/perplexity.csv", weights=name, stages="1")
      perplexity = f"{float(found['perplexity']):.3f}"
    out.append(
      f"| `{name}` | {bits[name]} | {change[name]}"
      f" | {float(row['tokens_per_s']):.0f} tokens/s, {model} | {perplexity} |"
    )
  q8 = _row("load/types.csv", type="Q8_0")["memory_bits"]
  q4 = _row("load/types.csv", type="Q4_K")["memory_bits"]
  out.append(
    f"| `stored` | the file's: {q8} (Q8_0), {q4} (Q4_K), ... | nothing | not measured | not measured |"
  )
  row = speed["dense"]
  where = f"{row['cores']} cores of {row['device']}, jax {row['jax']}, {row['date']}"
  return "\n".join(out) + f"\n\nDecode: {where}.\n"


if __name__ == "__main__":
  block("numbers", readme_table())
  block("weights", weights_table(), DOCS / "running.md")
