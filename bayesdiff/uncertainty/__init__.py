from bayesdiff.uncertainty.ensemble import Ensemble
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.linearised import Linearised
from bayesdiff.uncertainty.moments import Published, TotalVariance
from bayesdiff.uncertainty.refined import Refined
from bayesdiff.uncertainty.samples import Samples, Starts, Trajectory, starts_of

__all__ = [
    "Ensemble",
    "Estimator",
    "Linearised",
    "Published",
    "Refined",
    "Samples",
    "Starts",
    "TotalVariance",
    "Trajectory",
    "starts_of",
]
