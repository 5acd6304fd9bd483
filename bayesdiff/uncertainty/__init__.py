from bayesdiff.uncertainty.ensemble import Ensemble
from bayesdiff.uncertainty.published import Published
from bayesdiff.uncertainty.samples import Estimator, Samples, Trajectory

__all__ = ["Ensemble", "Estimator", "Published", "Samples", "Trajectory"]
