"""Helpers for tests and benchmarks: comparison with the reference, seeded inputs."""

from .compare import assert_close_to_reference, reference_error
from .inputs import random_indexes, random_qkv
from .timing import Timing, interleaved

__all__ = [
    "Timing",
    "assert_close_to_reference",
    "interleaved",
    "random_indexes",
    "random_qkv",
    "reference_error",
]
