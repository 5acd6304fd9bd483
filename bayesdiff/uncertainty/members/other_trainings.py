"""Other trainings of the architecture of a run: found by name, checked, and loaded."""

import glob
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from bayesdiff.checks import UserError
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
from bayesdiff.uncertainty.members.base import twin

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OtherTrainings:
    """Those that an option names.

    Attributes:
        patterns: run folders or checkpoints, or patterns such as ``outputs/digits-flow-*``.
        option: whose value they are, for messages.
        needs: what there must be another network for, for messages.
        among: whether the run itself may be named, and then counts for nothing.
    """

    patterns: tuple[str, ...]
    option: str
    needs: str
    among: bool = True

    @property
    def planned(self) -> int:
        """How many the patterns match at the moment."""
        return sum(len(glob.glob(pattern)) for pattern in self.patterns)

    def check(self, run: Training) -> None:
        """Refuse those that are missing, unfinished, alike, or trained on something else.

        Raises:
            UserError: one line that names the training and the cure.
        """  # noqa: DOC502 - raised one level down
        config: Any = OmegaConf.to_container(run.cfg, resolve=True)

        def check(path: Path, checkpoint: dict[str, Any]) -> None:
            require_options(path, checkpoint, config, ("data.name", *kind_of(config), "net"))
            require_guidance(path, checkpoint, config)
            data, here = note_of(checkpoint).get("data"), run.data.data.fingerprint
            if data is not None and data != here:
                raise UserError(
                    f"checkpoint {path} was trained on other images ({data}, not {here}); "
                    f"networks of {self.option} must share their data"
                )
            self._remark(path, checkpoint, config)

        self._load(run.model, self._checkpoints(run.folder), check)

    def networks(self, own: GenerativeModel, folder: Path | None) -> dict[str, GenerativeModel]:
        """Networks beside the run's own trained one, by the keys of their weights.

        Args:
            own: the run's, trained.
            folder: of the run, None for none.

        Raises:
            UserError: if there is no other, or the run is among them and must not be.
        """
        others = self._load(own, self._checkpoints(folder))
        if others.pop(weights_key(own), None) is not None:
            if not self.among:
                raise UserError(self._of_itself)
            log.info("%s: one of them is this run itself", self.option)
        if not others:
            raise UserError(
                f"{self.option}={list(self.patterns)} holds no other network than this run's "
                f"own; {self.needs}, train further seeds"
            )
        return others

    @property
    def _of_itself(self) -> str:
        return (
            f"{self.option}={list(self.patterns)} names this run itself; {self.needs}, give "
            "trainings of other seeds alone"
        )

    def _load(
        self,
        own: GenerativeModel,
        paths: list[Path],
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
                    f"{path} and {read[key]} in {self.option} hold the same weights; "
                    "give every network once"
                )
            found[key], read[key] = model, path
        return found

    def _checkpoints(self, folder: Path | None) -> list[Path]:
        """Checkpoints that the patterns name, without the run of this folder."""
        found: dict[Path, None] = {}
        for pattern in self.patterns:
            matches = sorted(glob.glob(pattern))
            if not matches:
                raise UserError(
                    f"{self.option} names {pattern}, where nothing is; "
                    "give run folders or checkpoints"
                )
            found |= dict.fromkeys(checkpoint_at(m, self.option, folder) for m in matches)
        own = None if folder is None else sampled_checkpoint(folder.resolve())
        if own in found and not self.among:
            raise UserError(self._of_itself)
        others = [path for path in found if path != own]
        if not others:
            raise UserError(
                f"{self.option}={list(self.patterns)} names this run alone; {self.needs}, "
                "train further seeds"
            )
        return others

    def _remark(self, path: Path, checkpoint: Any, config: Any) -> None:
        """Say where one is of a longer or shorter training, as a trial run a pattern met."""
        there = (note_of(checkpoint).get("config") or {}).get("trainer", {}).get("max_epochs")
        here = config["trainer"].get("max_epochs")
        if there is not None and there != here:
            log.warning("%s: %s had %s epochs, this run has %s", self.option, path, there, here)
