"""A server over a fake engine, in a process of its own: `python -m tests.serve.fake_server '{...}'`."""

import asyncio
import dataclasses
import json
import sys

from neurojax.engine.batch import Batch
from neurojax.engine.fake import FakeEngine, FakeSlot, FakeSteps
from neurojax.serve.app import make_app
from neurojax.serve.served import Served, ServeLimits
from neurojax.serve.server import listen, run
from neurojax.tokenizer import Tokenizer, TokenizerSpec

VOCAB = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<end>", "▁"]
TEMPLATE = (
  "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant: {% endif %}"
)
SPEC = TokenizerSpec(
  kind="spm",
  tokens=tuple(VOCAB),
  types=("unknown", "control", "control", *["byte"] * 256, "control", "normal"),
  scores=(0.0,) * len(VOCAB),
  bos_id=1,
  eos_id=2,
  unknown_id=0,
  stop_ids=frozenset([2]),
  add_bos=True,
  chat_template=TEMPLATE,
)


BY_TURN = 99
"""The seed with which the model calls tools at first, and speaks once one has answered."""
CALLS_THEN_TEXT = (1, 2)


@dataclasses.dataclass(frozen=True)
class Bounds:
  vocab_size: int
  context_length: int = 1024
  longest_context: int = 1024


class Scripted(FakeSteps):
  """The steps of a model that says by heart the script whose number is the seed."""

  def __init__(self, scripts: list[list[int]], **sizes):
    super().__init__(most_draws=1, ahead=1, chunks=(1024,), **sizes)
    self._scripts = scripts

  def draw(self, slot: FakeSlot) -> tuple[int, float]:
    number = slot.sampling.seed
    if number == BY_TURN:
      number = CALLS_THEN_TEXT[
        bytes(max(0, id - 3) % 256 for id in slot.tokens).count(b"tool:") > 0
      ]
    script = self._scripts[number % len(self._scripts)]
    at = len(slot.drawn)
    return (script[at] if at < len(script) else 2), -1.0


class ScriptedEngine:
  """An engine over such steps."""

  def __init__(self, tokenizer: Tokenizer, scripts: list[str]):
    bounds = Bounds(tokenizer.vocab_size)
    self.vocab_size, self.context_length = bounds.vocab_size, bounds.context_length
    self.longest_context = bounds.longest_context
    ids = [tokenizer.encode(script, parse_special=True) for script in scripts]
    batch = Batch(Scripted(ids, vocab_size=bounds.vocab_size), bounds)
    self.generate, self.score, self.load = batch.generate, batch.score, batch.load
    self.close = batch.close

  async def reports(self) -> tuple:
    return ()


async def main(
  *,
  engine: dict,
  limits: dict | None = None,
  keys: tuple[str, ...] = (),
  origins: tuple = (),
  scripts: list[str] | None = None,
  marks: tuple[str, ...] = (),
  template: str = TEMPLATE,
) -> None:
  """
  Args:
    engine: Options of the fake engine.
    scripts: What the model says, by the seed; None: it counts.
    marks: Further control tokens.
  """
  spec = dataclasses.replace(
    SPEC,
    tokens=(*SPEC.tokens, *marks),
    types=(*SPEC.types, *["control"] * len(marks)),
    scores=(0.0,) * (len(VOCAB) + len(marks)),
    chat_template=template,
    add_space_prefix=False,
  )
  tokenizer = Tokenizer(spec)
  if scripts is not None:
    fake = ScriptedEngine(tokenizer, scripts)
  else:
    fake = FakeEngine(vocab_size=len(VOCAB), **{"context_length": 512, **engine})
  served = Served(fake, tokenizer, names=("fake", "alias"), limits=ServeLimits(**(limits or {})))
  door = make_app(served, keys=keys, origins=origins)
  # What the engine is busy with, for tests that look whether slots are free.
  inner = door._inner

  async def watched(scope, receive, send):
    if scope["path"] != "/busy":
      return await inner(scope, receive, send)
    load = fake.load()
    body = json.dumps({"running": load.running, "queued": load.queued}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})

  door._inner = watched
  with listen("127.0.0.1", 0) as listening:
    port = listening.getsockname()[1]
    await run(
      door,
      listening,
      drain_s=served.limits.drain_s,
      started=lambda: print(json.dumps({"listening": f"http://127.0.0.1:{port}"}), flush=True),
    )
  await fake.close()


if __name__ == "__main__":
  asyncio.run(main(**json.loads(sys.argv[1])))
