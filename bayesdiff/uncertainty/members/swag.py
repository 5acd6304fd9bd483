"""Members from one training: its snapshots themselves, or draws of a Gaussian fitted to them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from omegaconf import OmegaConf
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.storage.checkpoints import load_state
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.members.base import NetworkMembers, twin
from bayesdiff.uncertainty.members.snapshots import (
    planned_snapshots,
    read_snapshot,
    snapshots_of,
    train_again,
)
from bayesdiff.uncertainty.start import Starts

_SALT = 3_000_017


@dataclass(frozen=True, kw_only=True)
class Checkpoints(NetworkMembers):
    """Variance over the snapshots of this run's training, see ``Snapshots``.

    The trained network itself, whose weights are averaged, is no member.

    Example:
        >>> snapshots = [{"weight": torch.tensor([w])} for w in (0.0, 1.0, 2.0)]
        >>> Checkpoints().states(snapshots) == snapshots  # each is a member
        True
    """

    name: ClassVar[str] = "checkpoints"

    @property
    def planned(self) -> int:
        """As few as a variance needs; the snapshots are counted once they are there."""
        return 2

    def check_run(self, run: Training) -> None:
        """Refuse a run that has no snapshots and will not make any.

        Raises:
            UserError: one line that says how to get them.
        """
        there, folder = len(snapshots_of(run.folder)), run.folder
        if there > 1:
            return
        trained = not run.cfg.fit or (folder / "fit.json").is_file()
        options: Any = OmegaConf.to_container(run.cfg, resolve=True)
        will_be = planned_snapshots(options["callbacks"], run.cfg.trainer.get("max_epochs"))
        if trained:
            raise UserError(
                f"uncertainty={self.name} needs 2 or more snapshots and {folder} has {there} of a "
                f"finished training; {train_again(folder)}"
            )
        if not will_be:
            raise UserError(
                f"uncertainty={self.name} needs snapshots of the training; add callbacks=snapshots"
            )
        if will_be < 2:
            raise UserError(
                f"uncertainty={self.name} needs 2 or more snapshots, this training will keep "
                f"{will_be}; raise trainer.max_epochs, or lower callbacks.snapshots.every"
            )

    def sources(self, run: Training) -> list[Any]:
        """The snapshots' content."""
        files = self._files(run.folder)
        return [[hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in files]]

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With all networks in memory."""
        model, snapshots, networks = starts([0]).model, [], []
        for path in self._files(folder):
            snapshots.append(read_snapshot(path))
            load_state(twin(model), snapshots[-1], path)  # or refuse those of another network
        for state in self.states(snapshots):
            networks.append(twin(model))
            networks[-1].load_state_dict(state)
        return replace(self, networks=tuple(networks))

    def states(self, snapshots: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The members' weights."""
        return list(snapshots)

    def _files(self, folder: Path | None) -> list[Path]:
        """The run's snapshots."""
        found = [] if folder is None else snapshots_of(folder)
        if len(found) < 2:
            raise UserError(
                f"uncertainty={self.name} needs 2 or more snapshots, {folder} has {len(found)}; "
                "train with callbacks=snapshots"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class Swag(Checkpoints):
    """Variance over whole networks drawn from a Gaussian around the mean of the snapshots.

    Stochastic weight averaging, Gaussian (Maddox et al. 2019, section 3 and algorithm 1): with
    mean m, per-weight variance s^2 and the K columns of deviations D,

        w = m + s o z / sqrt(2) + D u / sqrt(2 (K - 1)),    z, u standard normal,

    half of the covariance diagonal and half of rank K - 1. Two departures, as all K snapshots are
    at hand: deviations are from their final mean, not from the running one, and s^2 is unbiased,
    so that the variance of every weight is that of the snapshots.

    Args:
        members: draws, at least 2.

    Example:
        >>> snapshots = [{"weight": torch.tensor([w])} for w in (0.0, 1.0, 2.0)]
        >>> drawn = torch.stack([each["weight"] for each in Swag(members=4000).states(snapshots)])
        >>> drawn.mean().round(decimals=1), drawn.var().round(decimals=1)  # the snapshots' own
        (tensor(1.), tensor(1.))
    """

    members: int = 16

    name: ClassVar[str] = "swag"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("uncertainty.members", self.members, 2)

    @property
    def planned(self) -> int:
        """The draws."""
        return self.members

    def states(self, snapshots: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Draws of the weights."""
        return swag_draws(snapshots, self.members, self.seed)


def swag_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean ``(n,)``, variance ``(n,)`` and deviations ``(K, n)`` of K snapshots ``(K, n)``."""
    # Around the first one: the mean of equal numbers is then exactly that number.
    mean = values[0] + (values - values[0]).mean(0)
    deviations = values - mean
    return mean, deviations.square().sum(0) / (len(values) - 1), deviations


def swag_draws(
    snapshots: Sequence[dict[str, Tensor]], count: int, seed: int
) -> list[dict[str, Tensor]]:
    """Whole networks drawn from the Gaussian of ``Swag``.

    Args:
        snapshots: K >= 2 sets of weights; what is not a floating-point number stays as in the
            last.
        count: M.
        seed: of the draws.

    Returns:
        M sets of weights.
    """
    generator = torch.Generator().manual_seed(seed + _SALT)
    rank = len(snapshots)
    # One u per network: its tensors move together.
    low_rank = torch.randn(count, rank, generator=generator, dtype=torch.float64)
    drawn: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, last in snapshots[-1].items():
        if not last.is_floating_point():
            for state in drawn:
                state[name] = last
            continue
        values = torch.stack([snapshot[name].flatten().double() for snapshot in snapshots])
        mean, variance, deviations = swag_moments(values)
        diagonal = torch.randn(count, len(mean), generator=generator, dtype=torch.float64)
        found = mean + (variance / 2).sqrt() * diagonal
        found += low_rank @ deviations / (2 * (rank - 1)) ** 0.5
        for state, value in zip(drawn, found, strict=True):
            state[name] = value.view_as(last).to(last.dtype)
    return drawn
