"""The MARS family of optimizers for PyTorch: MARS-AdamW, MARS-Lion, MARS-Shampoo and MARS-M, exact and approx."""

from . import schedules
from .groups import param_groups
from .optimizer import MARS
from .polar import polar_factor
from .preconditioners import Preconditioner, register_preconditioner

__all__ = ["MARS", "Preconditioner", "param_groups", "polar_factor", "register_preconditioner", "schedules"]
