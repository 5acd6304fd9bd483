"""Deep ensembles: other trainings of the same architecture as members."""

import glob
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from omegaconf import OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.storage.checkpoints import (
    checkpoint_at,
    load_weights,
    note_of,
    read_checkpoint,
    sampled_checkpoint,
)
from bayesdiff.storage.same_kind import kind_of, require_guidance, require_options
from bayesdiff.uncertainty.estimator import Training
from bayesdiff.uncertainty.members.base import NetworkMembers, twin
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
        return 1 + sum(len(glob.glob(pattern)) for pattern in self.members)

    def check_run(self, run: Training) -> None:
        """Refuse members that are missing, unfinished, alike, or trained on something else.

        Raises:
            UserError: one line that names the member and the cure.
        """  # noqa: DOC502 - raised one level down
        config: Any = OmegaConf.to_container(run.cfg, resolve=True)

        def check(path: Path, checkpoint: dict[str, Any]) -> None:
            require_options(path, checkpoint, config, ("data.name", *kind_of(config), "net"))
            require_guidance(path, checkpoint, config)
            data, here = note_of(checkpoint).get("data"), run.data.data.fingerprint
            if data is not None and data != here:
                raise UserError(
                    f"checkpoint {path} was trained on other images ({data}, not {here}); "
                    "members of an ensemble must share their data"
                )
            _remark(path, checkpoint, config)

        self._load(run.model, self._checkpoints(run.folder), check)

    def sources(self, run: Training) -> list[Any]:
        """The members' weights: a member that was trained again makes other maps."""
        return [sorted(self._others(run.model, run.folder))]

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With all networks in memory."""
        own = starts([0]).model
        others = self._others(own, folder)
        log.info("deep ensemble: this network and %d others", len(others))
        return replace(self, networks=(own, *others.values()))

    def _others(self, own: GenerativeModel, folder: Path | None) -> dict[str, GenerativeModel]:
        """Members beside the run's own trained network, by the keys of their weights."""
        others = self._load(own, self._checkpoints(folder))
        if others.pop(weights_key(own), None) is not None:
            log.info("deep ensemble: one of the members is this run itself")
        if not others:
            raise UserError(
                f"uncertainty.members={list(self.members)} holds no other network than this run's "
                "own; a variance needs 2, train further seeds"
            )
        return others

    def _load(
        self,
        own: GenerativeModel,
        paths: Sequence[Path],
        check: Callable[[Path, dict[str, Any]], None] = lambda *_: None,
    ) -> dict[str, GenerativeModel]:
        """Networks of the checkpoints, by the keys of their weights.

        Args:
            own: the run's own network.
            paths: of the others.
            check: refuses one.

        Raises:
            UserError: if two of them are the same.
        """
        found: dict[str, GenerativeModel] = {}
        read: dict[str, Path] = {}
        for path in paths:
            model, checkpoint = twin(own), read_checkpoint(path)
            check(path, checkpoint)
            key = load_weights(model, path, checkpoint)
            if key in found:
                raise UserError(
                    f"{path} and {read[key]} in uncertainty.members hold the same weights; "
                    "give every network once"
                )
            found[key], read[key] = model, path
        return found

    def _checkpoints(self, folder: Path | None) -> list[Path]:
        """Checkpoints that the patterns name, without the run of this folder."""
        if not self.members:
            raise UserError(
                "uncertainty=deep_ensemble needs uncertainty.members, run folders of other seeds "
                "such as ['outputs/digits-flow-*']; python sweep.py -m seed=0,1,2,3,4 trains them"
            )
        found: dict[Path, None] = {}
        for pattern in self.members:
            matches = sorted(glob.glob(pattern))
            if not matches:
                raise UserError(
                    f"uncertainty.members names {pattern}, where nothing is; "
                    "give run folders or checkpoints"
                )
            found |= dict.fromkeys(
                checkpoint_at(m, "uncertainty.members", folder) for m in matches
            )
        own = None if folder is None else sampled_checkpoint(folder.resolve())
        others = [path for path in found if path != own]
        if not others:
            raise UserError(
                f"uncertainty.members={list(self.members)} names this run alone; a variance needs "
                "2 networks, train further seeds"
            )
        return others


def _remark(path: Path, checkpoint: Any, config: Any) -> None:
    """Say where a member is of a longer or shorter training, as a trial run that a pattern met."""
    there = (note_of(checkpoint).get("config") or {}).get("trainer", {}).get("max_epochs")
    here = config["trainer"].get("max_epochs")
    if there is not None and there != here:
        log.warning("deep ensemble: %s had %s epochs, this run has %s", path, there, here)
