"""What the figures of a run show: the group ``report`` of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError, at_least, listed
from bayesdiff.options.values import plain

# The sum of an image's variances; like in all scores of maps, negative ones count as 0.
SUM = "map.sum"
SUM_IN_WORDS = "summed variance"
SUM_UNIT = "images in [-1, 1]"
# The scores of a cell's images, exact, beside its figures.
SCORES_FILE = "image-scores.npz"
SCALES = ("shared", "own")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Which images are shown, in which order, and how.

    Args:
        chosen_by: score of the most and the least uncertain images, and of the histogram.
        sorted_by: scores; all images are shown in the order of each.
        map_scale: ``shared``, one colour scale for all maps of a figure, or ``own``, each map
            scaled by itself.
        members: posterior trajectories for scores of members.
        likelihood_steps: of the probability-flow equation, for the model's own likelihood.
        pdf: whether every figure is there as PDF as well.
    """

    chosen_by: str = SUM
    sorted_by: Sequence[str] = ()
    map_scale: str = "shared"
    members: int = 5
    likelihood_steps: int = 20
    pdf: bool = True

    def __post_init__(self) -> None:
        """Refuse what no figure could show."""
        if not isinstance(self.chosen_by, str):
            raise UserError(f"report.chosen_by must name a score, got {self.chosen_by!r}; {SUM}")
        if self.sorted_by:
            listed("report.sorted_by", self.sorted_by, f"[{SUM}]")
        elif not isinstance(self.sorted_by, Sequence) or isinstance(self.sorted_by, str):
            raise UserError(
                f"report.sorted_by must be a list of scores such as [{SUM}], got "
                f"{self.sorted_by!r}; [] for none"
            )
        if self.map_scale not in SCALES:
            raise UserError(
                f"unknown report.map_scale {self.map_scale!r}; choose {' or '.join(SCALES)}"
            )
        at_least("report.members", self.members, 2)
        at_least("report.likelihood_steps", self.likelihood_steps)
        if not isinstance(self.pdf, bool):
            raise UserError(f"report.pdf must be true or false, got {self.pdf!r}")

    @property
    def scores(self) -> list[str]:
        """Every score that a figure asks for, each once."""
        return list(dict.fromkeys([self.chosen_by, *self.sorted_by]))


def options_of(cfg: DictConfig) -> ReportOptions:
    """What the figures of a run with this configuration show.

    Raises:
        UserError: for an option that there is not, or a value of no use.
    """
    given = plain(OmegaConf.select(cfg, "report", default={})) or {}
    unknown = set(given) - set(ReportOptions.__dataclass_fields__)
    if unknown:
        raise UserError(
            f"unknown option report.{min(unknown)}; there are "
            f"{', '.join(ReportOptions.__dataclass_fields__)}"
        )
    return ReportOptions(**given)
