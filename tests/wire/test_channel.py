"""Channels refuse what is too large, and nothing that a peer writes reaches a terminal raw."""

import asyncio
import subprocess
import sys
from types import SimpleNamespace

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurojax.wire.channel import brief, listen, make_server, open_channel
from neurojax.wire.identity import disagreement, printable

ECHO = "/test/Echo"


class Echo(grpc.GenericRpcHandler):
  def service(self, details):
    async def echo(message: bytes, context) -> bytes:
      return message

    return grpc.unary_unary_rpc_method_handler(echo) if details.method == ECHO else None


async def echoed(message: bytes, *, ours: int, theirs: int) -> bytes:
  server = make_server(limit=theirs)
  server.add_generic_rpc_handlers((Echo(),))
  address = listen(server, "127.0.0.1:0")
  await server.start()
  try:
    async with open_channel(address, limit=ours) as channel:
      return await channel.unary_unary(ECHO)(message, timeout=10)
  finally:
    await server.stop(None)


def test_both_ends_bound_messages():
  assert asyncio.run(echoed(bytes(1000), ours=1000, theirs=1000)) == bytes(1000)
  for ours, theirs in ((1000, 2000), (2000, 1000)):
    with pytest.raises(grpc.aio.AioRpcError, match="larger than max") as caught:
      asyncio.run(echoed(bytes(1001), ours=ours, theirs=theirs))
    assert brief(caught.value).startswith("RESOURCE_EXHAUSTED: ")


def test_an_address_that_is_taken_is_one_error_and_no_line_of_grpcs_own():
  program = """
import asyncio
from neurojax.wire.channel import listen, make_server

async def work():
  address = listen(make_server(limit=1), "127.0.0.1:0")
  try:
    listen(make_server(limit=1), address)
  except OSError as error:
    print(error)

asyncio.run(work())
"""
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
  )
  assert "the address is taken" in done.stdout and done.stderr == ""


@given(st.text())
def test_printable_text_holds_no_control_characters_and_keeps_what_has_none(text: str):
  found = printable(text)
  assert found.isprintable()
  assert found == text or not text.isprintable()


def test_printable_escapes_and_bounds():
  assert printable("a\x1b[31m\r\nb\x9bé") == r"a\x1b[31m\r\nb\x9bé"
  assert len(printable("x" * 9999)) == 2000


def test_a_disagreement_names_both_sides_and_prints_neither_raw():
  here, there = SimpleNamespace(name="a", sha256="f" * 64), SimpleNamespace(name="a", sha256="")
  assert disagreement(here, there, fields=("name",)) is None
  found = disagreement(here, there, fields=("name", "sha256"))
  assert found == f"sha256 is {'f' * 12} here and none there"
  there.name = "\x1b"
  assert disagreement(here, there, fields=("name",)) == r"name is a here and \x1b there"
