import asyncio
import dataclasses
import math

import pytest

from neurojax.measure.machine import handover
from neurojax.measure.machine.links import Measured
from neurojax.plan.fleet import Device

CPU = Device(kind="cpu", memory_bytes=10**9, step_overhead_s=1e-4)
LOCAL = Measured(latency_s=2e-4, bytes_per_s=1e9)


@pytest.mark.parametrize("more_s, left_s", [(1e-3, 1e-3 - 2e-4 - 2048e-9 - 1e-4), (2e-4, 0.0)])
def test_hand_over_is_the_time_of_an_extra_stage_without_overhead_and_hop(
  more_s: float, left_s: float, monkeypatch: pytest.MonkeyPatch
):
  async def measured(say) -> float:
    return more_s

  monkeypatch.setattr(handover, "extra_stage_s", measured)
  gpu = dataclasses.replace(CPU, kind="cuda")
  found = asyncio.run(handover.with_handover([gpu, CPU], LOCAL))
  assert found[0] == gpu
  assert found[1] == dataclasses.replace(CPU, handover_s=pytest.approx(left_s))


def test_an_extra_stage_is_measured_on_stage_servers():
  tiny = dataclasses.replace(
    handover.MIDDLING, model_dim=128, num_layers=3, num_heads=2, num_kv_heads=1, ffn_dim=128
  )
  # Sign and size are the machine's: of so few tokens even less than nothing may come out.
  more_s = asyncio.run(handover.extra_stage_s(tiny, tokens=6, rounds=1))
  assert more_s != 0 and math.isfinite(more_s) and abs(more_s) < 60
