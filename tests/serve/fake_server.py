"""A server over a fake engine, in a process of its own: `python -m tests.serve.fake_server '{...}'`."""

import asyncio
import json
import sys

from neurojax.engine.fake import FakeEngine
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


async def main(
  *, engine: dict, limits: dict | None = None, keys: tuple[str, ...] = (), origins: tuple = ()
) -> None:
  fake = FakeEngine(vocab_size=len(VOCAB), **{"context_length": 512, **engine})
  served = Served(
    fake, Tokenizer(SPEC), names=("fake", "alias"), limits=ServeLimits(**(limits or {}))
  )
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
