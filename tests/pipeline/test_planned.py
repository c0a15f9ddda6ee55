"""Stage servers that hold what a plan says: the same tokens, or a refusal that names what does not fit."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from neurojax.cli import main
from neurojax.cli.options import EngineOptions, open_engine
from neurojax.config import Serving, Span
from neurojax.config.serving import DEFAULT_PREFIX
from neurojax.count.serving import Load, stage_bytes, stage_working
from neurojax.engine.local import LocalEngine
from neurojax.files.load import load_span
from neurojax.files.open import open_model
from neurojax.plan.plan_file import read_plan, servers
from neurojax.plan.proportional import as_planned
from neurojax.stage.compile import CompiledStage
from tests import tinymodel
from tests.pipeline.servers import Cluster, collect, request, run

DEVICE = """
[[hosts.devices]]
kind = "cpu"
memory_bytes = 1_000_000_000
read_bytes_per_s = {rate}
"""


def fleet(path: Path, addresses: list[str | None], rates: list[float]) -> Path:
  text = ""
  for number, (address, rate) in enumerate(zip(addresses, rates, strict=True)):
    text += f'[[hosts]]\nname = "h{number}"\n'
    text += f'address = "{address}"\n' if address else ""
    text += DEVICE.format(rate=rate)
  path.write_text(text)
  return path


def planned(capsys, tmp_path: Path, model: Path, addresses: list[str | None], *more: str) -> Path:
  machines = fleet(tmp_path / "fleet.toml", addresses, [1e9, 3e9, 2e9])
  arguments = ("--model", str(model), "--fleet", str(machines), "--context", "256", "--toml")
  assert main(["plan", *arguments, *more]) == 0
  path = tmp_path / "plan.toml"
  path.write_text(capsys.readouterr().out)
  return path


def test_servers_hold_what_the_plan_says_and_give_the_local_tokens(
  three: Cluster, tiny_path: Path, tmp_path: Path, capsys
):
  # The fleet's order is not the plan's, nor does memory have a say in it.
  pins = ("--pin", "h0=1", "--pin", "h1=3", "--pin", "h2=2")
  path = planned(capsys, tmp_path, tiny_path, list(three.addresses), *pins)
  stages = read_plan(path).stages

  async def work():
    with open_model(tiny_path) as file:
      engine = LocalEngine(
        CompiledStage(load_span(file, dtype=jnp.dtype("float32")), context_length=256, slots=4)
      )
      alone = await collect(engine, request())
      async with open_engine(file, EngineOptions(plan=path, context=256)) as pipeline:
        reports = await pipeline.reports()
        return alone, await collect(pipeline, request()), reports

  alone, found, reports = run(work())
  assert found == alone
  assert [(r.address, r.first_layer, r.last_layer) for r in reports] == [
    (s.address, s.first_layer, s.last_layer) for s in stages
  ]
  assert sorted(r.last_layer - r.first_layer + 1 for r in reports) == [1, 2, 3]


def test_a_plan_that_does_not_fit_is_refused_with_the_reason(
  three: Cluster, tiny_path: Path, tmp_path: Path, capsys
):
  config = tinymodel.CONFIG
  pins = ("--pin", "h0=1", "--pin", "h1=3", "--pin", "h2=2")
  text = planned(capsys, tmp_path, tiny_path, list(three.addresses), *pins).read_text()
  path = tmp_path / "other.toml"

  def refused(changed: str) -> str:
    path.write_text(changed)
    with pytest.raises(ValueError) as caught:
      servers(read_plan(path), config)
    return str(caught.value)

  servers(read_plan(planned(capsys, tmp_path, tiny_path, list(three.addresses), *pins)), config)
  assert "the model has 6" in refused(text.replace("last_layer = 5", "last_layer = 4"))
  assert "is the next to be placed" in refused(text.replace("first_layer = 0", "first_layer = 1"))
  assert "--replicas 1" in refused(text.replace("share = 1.0", "share = 0.5", 1))
  assert "runs one" in refused(text.replace(three.addresses[1], three.addresses[0]))
  assert "unknown key" in refused(text + "\ncolour = 1\n")
  assert "not valid TOML" in refused("hello there")
  nowhere = planned(capsys, tmp_path, tiny_path, [*three.addresses[:2], None], *pins)
  with pytest.raises(ValueError, match=r"h2 has no address: write the host:port"):
    servers(read_plan(nowhere), config)
  with pytest.raises(SystemExit):
    main(["generate", "--model", str(tiny_path), "--plan", str(path), "--stages", "2"])
  assert "leave --hosts and --stages out" in " ".join(capsys.readouterr().err.split())
  path.write_text(text)

  async def work():
    with open_model(tiny_path) as file:
      # Caches of more sequences than were planned for: what is free is asked of the servers.
      options = EngineOptions(plan=path, context=256, sequences=4096)
      few = {address: 10**6 for address in three.addresses}
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
          "neurojax.pipeline.stages.as_planned",
          lambda c, s, free, *rest: as_planned(c, s, few, *rest),
        )
        async with open_engine(file, options):
          pass

  with pytest.raises(ValueError, match=r"the plan gives 127.*bytes with 4096 caches.*are free"):
    run(work())


def test_hosts_without_a_plan_have_room_for_what_programs_work_in(
  three: Cluster, tiny_path: Path, tmp_path: Path
):
  serving = Serving(weights="dense", context=256, sequences=4, prefix=DEFAULT_PREFIX)
  load = Load(serving=serving, working=False)
  thirds = [Span(first_layer=2 * i, last_layer=2 * i + 1, num_layers=6) for i in range(3)]
  most = max(stage_bytes(tinymodel.CONFIG, span, load) for span in thirds)
  working = stage_working(tinymodel.CONFIG, dataclasses.replace(load, working=True), "cpu")
  # The last stage draws tokens.
  needs, last = working.base, working.base + working.last

  def connect(memory_bytes: int) -> list[int]:
    text = "".join(
      f'[[hosts]]\naddress = "{address}"\nmemory_bytes = {memory_bytes}\n'
      for address in three.addresses
    )
    path = tmp_path / "fleet.toml"
    path.write_text(text)

    async def work() -> list[int]:
      with open_model(tiny_path) as file:
        async with open_engine(file, EngineOptions(hosts=str(path), context=256)) as engine:
          return [placement.memory_bytes for placement in engine.placements]

    return run(work())

  with pytest.raises(ValueError, match=rf"too small.*{needs:,} for the working memory"):
    connect(most + needs // 2)
  assert all(needs < taken <= most + last for taken in connect(most + last))
