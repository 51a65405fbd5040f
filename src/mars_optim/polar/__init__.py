"""The polar factor of a matrix: methods, coefficients, matrix views, update scales."""

from .coefficients import plain as plain_coefficients
from .factor import polar_factor, polar_factors, polar_sketch
from .method import PolarMethod
from .minimax import polar_express
from .sketch import Sketch
from .symmetric import use_triton
from .views import UPDATE_SCALES, MatrixView, check_view, matrices, register_update_scale, update_scale

__all__ = [
    "UPDATE_SCALES",
    "MatrixView",
    "PolarMethod",
    "Sketch",
    "check_view",
    "matrices",
    "plain_coefficients",
    "polar_express",
    "polar_factor",
    "polar_factors",
    "polar_sketch",
    "register_update_scale",
    "update_scale",
    "use_triton",
]
