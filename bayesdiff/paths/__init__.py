from bayesdiff.paths.prediction import PREDICTIONS, convert
from bayesdiff.paths.probability_path import (
    CondOT,
    PathCoefficients,
    ProbabilityPath,
    VariancePreserving,
)

__all__ = [
    "PREDICTIONS",
    "CondOT",
    "PathCoefficients",
    "ProbabilityPath",
    "VariancePreserving",
    "convert",
]
