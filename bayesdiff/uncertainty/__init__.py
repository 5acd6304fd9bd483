from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.members.deep_ensemble import DeepEnsemble
from bayesdiff.uncertainty.members.dropout import MCDropout
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.members.snapshots import Snapshots
from bayesdiff.uncertainty.members.subnetwork import Subnetwork
from bayesdiff.uncertainty.members.swag import Checkpoints, Swag
from bayesdiff.uncertainty.recursion.cross_covariance import CrossCovariance
from bayesdiff.uncertainty.recursion.moments import Published, TotalVariance
from bayesdiff.uncertainty.recursion.variance_head import VarianceHead
from bayesdiff.uncertainty.samples import Samples
from bayesdiff.uncertainty.sensitivities.linearised import Linearised
from bayesdiff.uncertainty.sensitivities.refined import Refined
from bayesdiff.uncertainty.start import Start, Starts, starts_of

__all__ = [
    "Checkpoints",
    "CrossCovariance",
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
    "Subnetwork",
    "Swag",
    "TotalVariance",
    "VarianceHead",
    "Start",
    "starts_of",
]
