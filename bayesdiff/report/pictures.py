"""Which figures a set of samples has: those of images here, others in modules beside this one."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hydra.utils import get_object
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import Space
from bayesdiff.report import figures
from bayesdiff.report.apart import epistemic_and_aleatoric
from bayesdiff.report.layout import conditions, image_range
from bayesdiff.report.options import SUM, SUM_IN_WORDS, SUM_UNIT, ReportOptions
from bayesdiff.report.sorted_sheet import Block, sorted_images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bayesdiff.laplace.posterior import HeadPosterior
    from bayesdiff.uncertainty import Estimator, Samples, Starts


@dataclass(frozen=True)
class Seen:
    """What figures are drawn from.

    Attributes:
        samples: with their variance.
        classes: class names.
        scores: ``(B,)`` of each sample by name.
        shown: options of the report.
        settings: of the run, for the captions.
        measured: what ``Figures.measure`` gave.
    """

    samples: "Samples"
    classes: Sequence[str]
    scores: Mapping[str, Tensor]
    shown: ReportOptions
    settings: Mapping[str, Any]
    measured: Mapping[str, Tensor]

    @property
    def conditions(self) -> str:
        """What made the samples and their maps."""
        return conditions(self.samples, self.settings)


class Figures(Protocol):
    """How samples of a space and their maps are drawn; ``Space.figures`` names one.

    Attributes:
        measures: whether figures need more than the samples, see ``measure``.
    """

    measures: bool

    def check(self, shown: ReportOptions) -> None:
        """Refuse, before any work, options that these figures do not have."""
        ...

    def grid(
        self,
        states: Tensor,
        labels: Tensor | None,
        classes: Sequence[str],
        columns: int,
        conditions: str,
    ) -> "Figure":
        """A few samples while the model trains; values ``(B, ...)``."""
        ...

    def measure(
        self,
        starts: "Starts",
        estimator: "Estimator",
        posterior: "HeadPosterior",
        seen: "Samples",
        folder: Path,
    ) -> dict[str, Tensor]:
        """What figures need beside samples; made once for all cells that share their maps."""
        ...

    def every(self, seen: Seen) -> Iterator[tuple[str, "Figure"]]:
        """Tags and figures, made when asked for: large figures are not kept."""
        ...


def figures_of(space: Space) -> Figures:
    """The figures that a space asks for."""
    return get_object(space.figures)()


class Pictures:
    """Images, each with the map of its pixels."""

    measures = False
    frames = True  # whether states on the way are images as well

    def check(self, shown: ReportOptions) -> None:
        """Every option is served."""

    def grid(
        self,
        states: Tensor,
        labels: Tensor | None,
        classes: Sequence[str],
        columns: int,
        conditions: str,
    ) -> "Figure":
        """Images in rows of their classes."""
        return figures.sample_grid(states, labels, classes, columns, conditions)

    def measure(
        self,
        starts: "Starts",
        estimator: "Estimator",
        posterior: "HeadPosterior",
        seen: "Samples",
        folder: Path,
    ) -> dict[str, Tensor]:
        """Nothing: maps are of the samples."""
        return {}

    def every(self, seen: Seen) -> Iterator[tuple[str, "Figure"]]:
        """The figures of a set of images.

        Yields:
            Tag and figure.
        """
        samples, classes, shown, settings = seen.samples, seen.classes, seen.shown, seen.settings
        made, values = seen.conditions, seen.scores[shown.chosen_by]
        summed = shown.chosen_by == SUM
        name, unit = (SUM_IN_WORDS, SUM_UNIT) if summed else (shown.chosen_by, "")
        look: dict[str, Any] = {"settings": settings, "own_scale": shown.map_scale == "own"}
        grid = samples.images, samples.labels, classes, 10, made, samples.units
        yield "samples/samples", figures.sample_grid(*grid)
        yield "uncertainty/image_and_map", figures.image_and_map(samples, classes, **look)
        if samples.aleatoric is not None:
            figure = epistemic_and_aleatoric(samples, classes, settings=settings)
            yield "uncertainty/epistemic_and_aleatoric", figure
        if self.frames:
            yield "uncertainty/over_time", figures.over_time(samples, classes, settings=settings)
        yield (
            "uncertainty/summed_over_time",
            figures.summed_over_time(samples, classes, settings, self._units(samples)),
        )
        along = f"{name} ({unit})" if unit else name
        histogram = values, samples.labels, classes, made, along
        yield "uncertainty/scores", figures.score_histogram(*histogram)
        ends = figures.extremes(samples, classes, values, name=name, unit=unit, **look)
        yield "uncertainty/extremes", ends
        if shown.sorted_by:
            blocks = [
                Block(n, samples.images, seen.scores[n], samples.units) for n in shown.sorted_by
            ]
            yield "uncertainty/sorted", sorted_images(blocks, made)

    def _units(self, samples: "Samples") -> str:
        """Of what is summed on the way."""
        return f"images in {image_range(samples)}"


class DecodedPictures(Pictures):
    """Images that are decoded from states of another kind, which no figure could show."""

    frames = False

    def check(self, shown: ReportOptions) -> None:
        """Refuse a score of the pixels' density.

        Raises:
            UserError: for the likelihood.
        """
        of_pixels = [name for name in shown.scores if name.startswith("likelihood.")]
        if of_pixels:
            raise UserError(
                f"report: {of_pixels[0]} is of models of pixels, this one's states are decoded; "
                "choose another score"
            )

    def _units(self, samples: "Samples") -> str:
        """Of what is summed on the way."""
        return "latent units"


PICTURES = Pictures()
