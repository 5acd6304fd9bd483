"""Members whose weights differ in a random few of all layers, drawn from a Laplace posterior."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.subnetwork import (
    CURVATURES,
    MOST_DENSE,
    STRUCTURES,
    SubnetworkCurvature,
    Subset,
    check_subnetwork,
    fit_subnetwork,
    weights_of,
)
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import values_of
from bayesdiff.storage.artefacts import Artefact, key_of, weights_key
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.members.base import NetworkMembers, twin
from bayesdiff.uncertainty.start import Starts

_SALT = 6_000_023
# Options of the head's pass over the data, which this one repeats.
_PASS = ("draws", "num_images", "batch_size", "seed")


@dataclass(frozen=True, kw_only=True)
class Subnetwork(NetworkMembers):
    """Variance over whole networks, a random subset of whose weights has a Laplace posterior.

    The posterior of FLARE, the Fisher-Laplace randomised estimator (Gupta et al., "Quantifying
    Epistemic Uncertainty in Diffusion Models", AISTATS 2026, arXiv 2602.09170): k weights are
    drawn uniformly from all layers, and they alone are uncertain, Gaussian around their trained
    values with the precision

        n_eff / N G / sigma_noise^2 + prior_precision I,

    G the Fisher information of these weights over the training data, from the images, times and
    noise of the head's pass; numbers as in the posterior of the head. All other weights keep their
    trained values, and no variance is scaled up for them: the map grows with k.

    Where it departs: the paper maps the weights' covariance to data by the network's Jacobian at
    each step and carries it by a recursion along the trajectory. Here, as for every other
    posterior of this package, weights are drawn once and followed through the whole solver: no
    linearisation, and one draw is one network at all steps. Prior precision, noise and the number
    of images are this package's, not the paper's.

    The networks are not linear in these weights: normalisations ignore some directions, which the
    data then leave to the prior. Weak priors move members far along them.

    Args:
        members: weight draws, at least 2.
        weights: k, those that are uncertain.
        share: of all weights, in place of ``weights``; None for that.
        structure: ``diag``, or ``dense`` for up to 4096 weights, correlations included.
        curvature: ``ggn``, the Fisher information, or ``empirical_fisher`` with the training
            residuals and sigma_noise^4, as in the head's posterior of that name.
        probes: random backward passes per image and draw, ``all`` for one per output: exact. A
            dense matrix needs several times k of them over all images.
        training: the run, see ``for_run``.

    Example:
        After the example of ``starts_of``:

        >>> Subnetwork(weights=512).chosen(model), Subnetwork(share=0.01).chosen(model)
        (512, 119)
    """

    members: int = 16
    weights: int = 512
    share: float | None = None
    structure: str = "diag"
    curvature: str = "ggn"
    probes: int | str = 1
    training: Training | None = None

    name: ClassVar[str] = "subnetwork"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)
        at_least("uncertainty.weights", self.weights)
        if self.share is not None and positive("uncertainty.share", self.share) > 1:
            raise UserError(f"uncertainty.share must be at most 1, all weights; got {self.share}")
        for name, choices in (("structure", STRUCTURES), ("curvature", CURVATURES)):
            if (value := getattr(self, name)) not in choices:
                raise UserError(
                    f"unknown uncertainty.{name} {value!r}; choose from {', '.join(choices)}"
                )
        if self.probes != "all":
            if isinstance(self.probes, str):
                raise UserError(
                    f"uncertainty.probes must be a whole number or all, got {self.probes!r}"
                )
            at_least("uncertainty.probes", self.probes)

    @property
    def planned(self) -> int:
        """The draws."""
        return self.members

    @property
    def described(self) -> str:
        """With the posterior's kind and size."""
        size = (
            f"{self.weights} weights" if self.share is None else f"{self.share:g} of all weights"
        )
        return f"{super().described}, random {size}, {self.structure} {self.curvature}"

    def check_run(self, run: Training) -> None:
        """Refuse what the pass over the data has no law for, and more weights than there are."""
        check_subnetwork(run.model, self.chosen(run.model))
        for name, value in (("sigma_noise", "mle_per_time"), ("objective", "elbo")):
            if run.cfg.laplace.get(name) == value:
                raise UserError(
                    f"laplace.{name}={value} is for maps of the head's posterior; use another, or "
                    "uncertainty=ensemble in place of subnetwork"
                )

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a model without the data it was trained on.

        Raises:
            UserError: before ``fit``.
        """
        if not self.networks:
            raise UserError(
                "uncertainty=subnetwork passes over the data of a training, and there are none "
                "here; use uncertainty=ensemble"
            )

    def for_run(self, run: Training) -> Self:
        """With the run's data."""
        return replace(self, training=run)

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With all networks in memory; the curvature stays in the run folder."""
        model = starts([0]).model
        subset = Subset.at_random(cast(nn.Module, model.net), self.chosen(model), self.seed)
        root = self._curvature(model, subset, posterior, folder).covariance_root(posterior)
        generator = torch.Generator().manual_seed(self.seed + _SALT)
        noise = torch.randn(self.members, len(subset), generator=generator, dtype=torch.float64)
        networks = tuple(moved(model, subset, deviation) for deviation in root(noise))
        return replace(self, networks=networks, training=None)

    def chosen(self, model: GenerativeModel) -> int:
        """How many weights of this model are uncertain.

        Raises:
            UserError: for more than a dense matrix may have.
        """
        there = weights_of(cast(nn.Module, model.net))
        count = self.weights if self.share is None else max(1, round(self.share * there))
        if self.structure == "dense" and count > MOST_DENSE:
            raise UserError(
                f"uncertainty.structure=dense holds {MOST_DENSE} weights, and {count} are asked "
                "for; use uncertainty.structure=diag, or fewer uncertainty.weights"
            )
        return count

    def _curvature(
        self,
        model: GenerativeModel,
        subset: Subset,
        posterior: HeadPosterior,
        folder: Path | None,
    ) -> SubnetworkCurvature:
        """What the run folder holds of this very pass, or a new one, kept."""
        run = self.training
        if run is None:
            raise UserError("uncertainty=subnetwork has no data to pass over; call for_run first")
        data = run.data.data
        passed = {name: run.cfg.laplace.get(name) for name in _PASS}
        kind = {
            "structure": self.structure,
            "curvature": self.curvature,
            "probes": self.probes,
        }
        # Key of weights, data, and of all that the head's pass depends on.
        head = posterior.curvature.source
        options = key_of(*head.split("-")[2:], kind, len(subset), self.seed)
        source = f"{weights_key(model)}-{data.fingerprint}-{options}"

        def make() -> SubnetworkCurvature:
            given, encode = values_of(model.condition, data), space_of(data).encode
            chosen = {**passed, **kind, "encode": encode}
            return fit_subnetwork(model, data.images, given, subset, source=source, **chosen)

        if folder is None:
            return make()
        path = folder / f"subnetwork-{options[:8]}.safetensors"
        return Artefact(path, source).once(
            lambda: SubnetworkCurvature.stored(path, source), make, lambda new: new.save(path)
        )


@torch.no_grad()
def moved(model: GenerativeModel, subset: Subset, deviation: Tensor) -> GenerativeModel:
    """Another model, its chosen weights moved by the deviations ``(k,)``."""
    member = twin(model)
    net = cast(nn.Module, member.net)
    for name, value in subset.moved(net, deviation).items():
        net.get_parameter(name).copy_(value)
    return member
