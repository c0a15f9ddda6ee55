"""How the decode kernel is cut: numbers that were timed on an H200, none of which changes a result."""

WARPS = 8
"""Warps of a program. Few, so that each thread has many registers: they hold what is read ahead."""

ROWS = 16
"""Outputs of a unit of work: two for each warp."""

AHEAD_BYTES = 3 << 14
"""Bytes of codes that a program reads ahead. More would spill registers."""

AHEAD_QKV_BYTES = 2 << 14
"""Bytes of codes of q, k and v that a program reads ahead: fewer, as sums of the layer before are
added meanwhile."""

KEYS = 64
"""Keys that attention reads at once."""

LEAST_KEYS = 64
"""Fewest keys of a program's share, if there are so many."""

SHARE_KEYS = 16
"""Keys are dealt out to programs in multiples of this."""
