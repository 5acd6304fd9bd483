from bayesdiff.uncertainty.deep_ensemble import DeepEnsemble
from bayesdiff.uncertainty.dropout import MCDropout
from bayesdiff.uncertainty.ensemble import Ensemble
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.linearised import Linearised
from bayesdiff.uncertainty.moments import Published, TotalVariance
from bayesdiff.uncertainty.refined import Refined
from bayesdiff.uncertainty.samples import Samples, Starts, Trajectory, starts_of
from bayesdiff.uncertainty.snapshots import Snapshots
from bayesdiff.uncertainty.swag import Checkpoints, Swag

__all__ = [
    "Checkpoints",
    "DeepEnsemble",
    "Ensemble",
    "Estimator",
    "Linearised",
    "MCDropout",
    "Published",
    "Refined",
    "Samples",
    "Snapshots",
    "Starts",
    "Swag",
    "TotalVariance",
    "Trajectory",
    "starts_of",
]
