"""Helpers for tests and benchmarks: comparison with the reference, seeded inputs."""

from .compare import assert_close_to_reference, reference_error
from .inputs import random_indexes, random_qkv

__all__ = ["assert_close_to_reference", "random_indexes", "random_qkv", "reference_error"]
