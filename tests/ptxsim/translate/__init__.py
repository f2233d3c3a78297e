"""Translates PTX to C++: one function per .entry and .func, executed once per thread on a ptxsim::Thread.

``context`` has the registry and the operands, ``module`` functions and modules; the other files are the handlers of one
family of instructions each.
"""

from . import control, floating, integer, matrix, memory, synchronisation
from .module import translate

__all__ = ["control", "floating", "integer", "matrix", "memory", "synchronisation", "translate"]
