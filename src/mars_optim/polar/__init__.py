"""The polar factor of a matrix: methods, coefficients, matrix views, update scales."""

from .factor import PolarMethod, polar_factor, polar_factors
from .views import UPDATE_SCALES, MatrixView, check_view, matrices, update_scale

__all__ = [
    "UPDATE_SCALES",
    "MatrixView",
    "PolarMethod",
    "check_view",
    "matrices",
    "polar_factor",
    "polar_factors",
    "update_scale",
]
