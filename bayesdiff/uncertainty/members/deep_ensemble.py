"""Deep ensembles: other trainings of the same architecture as members."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from bayesdiff.checks import UserError
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.members.base import NetworkMembers
from bayesdiff.uncertainty.members.other_trainings import OtherTrainings
from bayesdiff.uncertainty.start import Starts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DeepEnsemble(NetworkMembers):
    """Variance over networks that were trained apart (Lakshminarayanan et al. 2017).

    This run's own network is one of the members; it shows the images, and all members follow its
    noise. Trained from other seeds, members differ in initialisation and order of the data: the
    reference for what no posterior around one solution sees.

    Args:
        members: run folders or checkpoints of the others, or patterns such as
            ``outputs/digits-flow-*``; the run itself may be among them and counts once.

    Example:
        After the example of ``starts_of``:

        >>> from copy import deepcopy
        >>> other = deepcopy(model)  # in place of one that was trained from another seed
        >>> _ = torch.nn.init.normal_(other.net.head.bias)
        >>> estimator = DeepEnsemble(networks=(model, other))
        >>> samples = estimator.mapped(starts, [0, 1], posterior)
        >>> bool((samples.variance > 0).all())
        True
    """

    members: Sequence[str] | str = ()

    name: ClassVar[str] = "deep_ensemble"

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.members
        listed = [given] if isinstance(given, str) else given
        fits = isinstance(listed, Sequence) and all(isinstance(one, str) for one in listed)
        if not fits:
            raise UserError(
                "uncertainty.members must be a list of run folders or checkpoints, such as "
                f"['outputs/digits-flow-*'], got {given!r}"
            )
        object.__setattr__(self, "members", tuple(listed))

    @property
    def planned(self) -> int:
        """This network and those that the patterns match at the moment."""
        return 1 + self._others.planned

    def check_run(self, run: Training) -> None:
        """Refuse members that are missing, unfinished, alike, or trained on something else.

        Raises:
            UserError: one line that names the member and the cure.
        """
        if not self.members:
            raise UserError(
                "uncertainty=deep_ensemble needs uncertainty.members, run folders of other seeds "
                "such as ['outputs/digits-flow-*']; python sweep.py -m seed=0,1,2,3,4 trains them"
            )
        self._others.check(run)

    def sources(self, run: Training) -> list[Any]:
        """The members' weights: a member that was trained again makes other maps."""
        return [sorted(self._others.networks(run.model, run.folder))]

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With all networks in memory."""
        own = starts([0]).model
        others = self._others.networks(own, folder)
        log.info("deep ensemble: this network and %d others", len(others))
        return replace(self, networks=(own, *others.values()))

    @property
    def _others(self) -> OtherTrainings:
        needs = "a variance needs 2 networks"
        return OtherTrainings(tuple(self.members), "uncertainty.members", needs)
