"""Asks how much memory is free for a stage."""

import jax

from neurojax.stage.backend import devices


def free_memory_bytes(device: jax.Device | None = None) -> int:
  """Bytes that weights and caches could take now, on a device; the first of this process if absent."""
  stats = (device or devices()[0]).memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  with open("/proc/meminfo", encoding="ascii") as lines:
    fields = dict(line.split(":") for line in lines)
  return int(fields["MemAvailable"].split()[0]) * 1024
