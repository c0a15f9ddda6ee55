"""`neurojax serve`: OpenAI's interface over HTTP."""

import asyncio
import dataclasses
import ipaddress
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from neurojax.cli.options import EngineOptions, ModelOptions, open_engine, open_tokenizer
from neurojax.cli.text import read_text

if TYPE_CHECKING:
  from neurojax.files.model_file import ModelFile
  from neurojax.tokenizer import Tokenizer

_MOST_QUEUED = 256  # as many as an engine lets wait
_KEYS = "NEUROJAX_API_KEY"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve(ModelOptions, EngineOptions):
  """Serve a model over HTTP with OpenAI's interface: chat completions, completions, models and more.

  Clients use http://127.0.0.1:8000/v1 as their base URL. SIGTERM and Ctrl-C end the server once the
  requests under way are answered.

  Example: neurojax serve --model neurollm --port 8000

  Example: neurojax serve --model smollm2 --stages 2 --sequences 8 --api-key-file keys.txt
  """

  port: int = 8000
  """Port to listen on; 0 takes a free one, which is printed."""
  bind: Annotated[str, tyro.conf.arg(metavar="ADDRESS")] = "127.0.0.1"
  """Address to listen on. Connections are not encrypted: beyond this machine, use a network you trust,
  or a proxy with TLS in front."""
  name: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME"), tyro.conf.UseAppendAction] = ()
  """Name by which clients ask for the model, in place of MODEL. May be given several times."""
  sequences: Annotated[int, tyro.conf.arg(metavar="N")] = 8
  """Answers that are computed at the same time; memory for their caches is reserved."""
  api_key_file: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """Let only requests in that bring a key of this file, which has one in each line. The environment
  variable NEUROJAX_API_KEY can hold one too."""
  allow_origin: Annotated[
    tuple[str, ...], tyro.conf.arg(metavar="ORIGIN"), tyro.conf.UseAppendAction
  ] = ()
  """Let pages of this origin ask from a browser, such as https://example.org; "*" lets all. May be
  given several times."""
  chat_template: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
  """A chat template (Jinja) in place of the model's own."""
  queue: Annotated[int, tyro.conf.arg(metavar="N")] = 256
  """Requests that may wait; more are told to come later (429)."""
  timeout: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 600.0
  """Longest time for one answer."""
  drain: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 30.0
  """Time that requests under way get when the server is told to end."""
  json: bool = False
  """Print the address as one line of JSON."""

  def run(self) -> int:
    self._check()
    try:
      import neurojax.serve.server  # noqa: F401
    except ImportError as error:
      raise ValueError(
        f"{error}: install what serving needs (pip install 'neurojax[serve]', or make setup EXTRA=serve)"
      ) from error
    keys = self._keys()
    with self.open() as file:
      tokenizer = self._tokenizer(file)
      return asyncio.run(self._serve(file, tokenizer, keys))

  def _check(self) -> None:
    """Raises: ValueError: an option is out of range."""
    if not 0 <= self.port < 65536:
      raise ValueError(f"--port {self.port}: between 0 and 65535")
    if not 0 <= self.queue <= _MOST_QUEUED:
      raise ValueError(f"--queue {self.queue}: between 0 and {_MOST_QUEUED}")
    for name in ("timeout", "drain"):
      if not 0 < (value := getattr(self, name)) < 1e6:
        raise ValueError(f"--{name} {value}: a positive number of seconds, below 1,000,000")
    self.serving()

  def _keys(self) -> list[str]:
    """Raises: ValueError, OSError: the file of keys cannot be read, or has none."""
    from neurojax.serve.server import read_keys

    keys = read_keys(self.api_key_file) if self.api_key_file is not None else []
    return keys + ([os.environ[_KEYS]] if os.environ.get(_KEYS) else [])

  def _tokenizer(self, file: "ModelFile") -> "Tokenizer":
    """Raises: ValueError: the model has none, or the template does not parse."""
    from neurojax.tokenizer import ChatTemplate, Tokenizer

    tokenizer = open_tokenizer(file)
    if self.chat_template is None:
      return tokenizer
    template = read_text(self.chat_template, "--chat-template")
    ChatTemplate(template)
    return Tokenizer(dataclasses.replace(tokenizer.spec, chat_template=template))

  async def _serve(self, file: "ModelFile", tokenizer: "Tokenizer", keys: list[str]) -> int:
    from neurojax.api.opening import resolve
    from neurojax.serve import app, served, server

    # The port is taken before the model is read: that takes long, and a wrong port shows at once.
    with server.listen(self.bind, self.port) as listening:
      port = listening.getsockname()[1]
      _warn(self.bind, bool(keys))
      async with open_engine(file, self) as engine:
        limits = served.ServeLimits(queued=self.queue, request_s=self.timeout, drain_s=self.drain)
        held = (
          f"{file.sha256()} {resolve(file, self.serving())} {self.stages} {self.hosts} {self.plan}"
        )
        names = self.name or (self.model,)
        model = served.Served(engine, tokenizer, names=names, held=held, limits=limits)
        door = app.make_app(model, keys=keys, origins=self.allow_origin)
        await server.run(
          door, listening, drain_s=self.drain, started=lambda: self._started(names[0], port)
        )
    return 0

  def _started(self, name: str, port: int) -> None:
    host = f"[{self.bind}]" if ":" in self.bind else self.bind
    address = f"http://{host}:{port}/v1"
    line = json.dumps({"listening": address}) if self.json else f"serving {name} at {address}"
    print(line, flush=True)


def _warn(address: str, has_keys: bool) -> None:
  try:
    is_here = ipaddress.ip_address(address).is_loopback
  except ValueError:
    is_here = address == "localhost"
  if not is_here and not has_keys:
    logging.getLogger(__name__).warning(
      "whoever reaches %s can use the model: there is no API key", address
    )
