"""Keeps compiled programs between runs."""

import logging
import os
import pathlib
import zlib

import jax

log = logging.getLogger(__name__)


def use_compilation_cache(folder: str | os.PathLike[str]) -> None:
  """Keep compiled programs in `folder` between runs, unless JAX_COMPILATION_CACHE_DIR names one.

  The folder must belong to this user alone: whoever can write there can run code here.
  """
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    try:
      os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
      log.warning("compiled programs are not kept: %s", error)
      return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
  if kept := jax.config.jax_compilation_cache_dir:
    _remove_cut_entries(pathlib.Path(kept))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


_CHECKED = "neurojax-checked"
"""A file in the folder, as old as its newest entry that is known to be whole."""


def _remove_cut_entries(folder: pathlib.Path) -> None:
  """Remove entries of XLA's cache that a crash or a full disk cut short.

  JAX warns of such an entry in every run and never writes it anew. Each entry is read once: only
  those written since the last look are.
  """
  try:
    stamp = folder / _CHECKED
    since_ns = stamp.stat().st_mtime_ns if stamp.exists() else 0
    newest_ns, cut = since_ns, []
    for entry in folder.glob("*-cache"):
      written_ns = entry.stat().st_mtime_ns
      newest_ns = max(newest_ns, written_ns)
      if written_ns >= since_ns and not _is_whole(entry.read_bytes()):
        cut.append(entry)
    for entry in cut:
      entry.unlink(missing_ok=True)
    if newest_ns > since_ns:
      stamp.touch()
      os.utime(stamp, ns=(newest_ns, newest_ns))
  except OSError as error:
    log.debug("%s: its entries are not checked: %s", folder, error)
    return
  if cut:
    log.info("%s: %d entries were cut short and are removed", folder, len(cut))


def _is_whole(entry: bytes) -> bool:
  """Whether the compressed content of an entry is complete; of another format, whether there is any."""
  if entry[:1] != b"\x78":
    return len(entry) > 0
  stream = zlib.decompressobj()
  try:
    # A MiB of output at a time: an entry may expand to hundreds.
    while entry and not stream.eof:
      stream.decompress(entry, 1 << 20)
      entry = stream.unconsumed_tail
  except zlib.error:
    return False
  return stream.eof
