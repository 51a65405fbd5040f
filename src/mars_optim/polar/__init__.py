"""The polar factor of a matrix: methods, coefficients, matrix views, update scales."""

from .coefficients import plain as plain_coefficients
from .factor import polar_factor, polar_factors, polar_sketch, polar_work
from .method import PolarMethod
from .minimax import polar_express
from .sketch import Sketch
from .symmetric import use_triton
from .views import (
    UPDATE_SCALES,
    MatrixView,
    check_view,
    matrices,
    matrix_shape,
    parts,
    register_update_scale,
    update_scale,
)

__all__ = [
    "UPDATE_SCALES",
    "MatrixView",
    "PolarMethod",
    "Sketch",
    "check_view",
    "matrices",
    "matrix_shape",
    "parts",
    "plain_coefficients",
    "polar_express",
    "polar_factor",
    "polar_factors",
    "polar_sketch",
    "polar_work",
    "register_update_scale",
    "update_scale",
    "use_triton",
]
