from bayesdiff.paths.bayesian_flow import (
    AccuracyPath,
    BayesianFlow,
    GeometricAccuracy,
    QuadraticAccuracy,
)
from bayesdiff.paths.coefficient import Coefficient
from bayesdiff.paths.inflation import Inflation
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
    "AccuracyPath",
    "BayesianFlow",
    "Coefficient",
    "CondOT",
    "GeometricAccuracy",
    "Inflation",
    "PathCoefficients",
    "ProbabilityPath",
    "QuadraticAccuracy",
    "VPPerPixel",
    "VariancePreserving",
    "convert",
]
