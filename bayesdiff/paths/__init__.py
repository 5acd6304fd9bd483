from bayesdiff.paths.coefficient import Coefficient
from bayesdiff.paths.per_pixel import VPPerPixel
from bayesdiff.paths.prediction import PREDICTIONS, convert
from bayesdiff.paths.probability_path import (
    CondOT,
    PathCoefficients,
    ProbabilityPath,
    VariancePreserving,
)

__all__ = [
    "PREDICTIONS",
    "Coefficient",
    "CondOT",
    "PathCoefficients",
    "ProbabilityPath",
    "VPPerPixel",
    "VariancePreserving",
    "convert",
]
