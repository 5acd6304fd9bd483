from bayesdiff.uncertainty.ensemble import Ensemble
from bayesdiff.uncertainty.moments import Published, TotalVariance
from bayesdiff.uncertainty.samples import Estimator, Samples, Trajectory

__all__ = ["Ensemble", "Estimator", "Published", "Samples", "TotalVariance", "Trajectory"]
