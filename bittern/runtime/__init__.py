"""Running artifacts: weights that stay packed, attention, generation."""

MOST_THREADS = 256
"""That the native kernels have room for (csrc/pool.h)."""
