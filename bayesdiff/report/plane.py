"""Points in the plane: what points have, and the variance over the plane."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.report.figures import ceiling
from bayesdiff.report.layout import chart, class_name, map_conditions
from bayesdiff.report.points import PointFigures, square
from bayesdiff.report.style import MAP_COLOURS, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bayesdiff.laplace.posterior import HeadPosterior
    from bayesdiff.report.pictures import Seen
    from bayesdiff.uncertainty import Estimator, Samples, Starts

# Of a map over the plane: its cells along each side, times of the network's output, and rows.
CELLS = 40
TIMES = (0.0, 0.25, 0.5, 0.75, 0.95)
_MOST_CLASSES = 3
_REACH = 3.0  # standard deviations of the starting noise, from 0 to an edge
_AT_ONCE = 400


class PlaneFigures(PointFigures):
    """Points as points; maps are pictures over the plane."""

    measures = True

    @torch.no_grad()
    def measure(
        self,
        starts: "Starts",
        estimator: "Estimator",
        posterior: "HeadPosterior",
        seen: "Samples",
        folder: Path,
    ) -> dict[str, Tensor]:
        """Variance over the plane: of the network's output, and of what starts there.

        Args:
            starts: of the run's own samples.
            estimator: of their maps.
            posterior: of the head.
            seen: the samples, which say how far the plane reaches.
            folder: the run folder.

        Returns:
            ``output_variance (R, T, n, n)`` of each coordinate of the network's output at the
            ``times (T,)`` and places ``output_x``, ``output_y (n,)``, for R classes;
            ``start_variance (R, n, n)``, summed over coordinates, of samples that start at the
            places ``start_x``, ``start_y``; ``kinds (R,)``, the classes, -1 for none.
        """
        model = starts([0]).model
        most = min(model.num_classes or 0, _MOST_CLASSES)
        kinds = list(range(most)) or [-1]
        span = torch.cat([seen.images.double(), torch.tensor([[-2.0, -2.0], [2.0, 2.0]])])
        x, y = (_axis(span[:, i].min() - 0.4, span[:, i].max() + 0.4) for i in (0, 1))
        a = _axis(-_REACH, _REACH)
        last = float(model.path.last_time)
        outputs = [_output_variance(starts, posterior, x, y, kind, last) for kind in kinds]
        ready = estimator.fit(starts, posterior, folder)
        begun = [_start_variance(starts, ready, posterior, a, kind) for kind in kinds]
        return {
            "output_variance": torch.stack(outputs),
            "times": last * torch.tensor(TIMES),
            "output_x": x,
            "output_y": y,
            "start_variance": torch.stack(begun),
            "start_x": a,
            "start_y": a,
            "kinds": torch.tensor(kinds),
        }

    def every(self, seen: "Seen") -> Iterator[tuple[str, "Figure"]]:
        """The figures of a set of points, and the maps.

        Yields:
            Tag and figure.
        """
        yield from super().every(seen)
        yield "uncertainty/variance_of_output", variance_of_output(seen)
        yield "uncertainty/variance_over_starts", variance_over_starts(seen)


@style()
def variance_of_output(seen: "Seen") -> "Figure":
    """Predictive standard deviation of the network's output over the plane, at five times."""
    found, samples = seen.measured, seen.samples
    maps = found["output_variance"].clamp(min=0).sqrt().numpy()
    what = seen.settings.get("prediction", "output")
    caption = (
        f"Standard deviation of each coordinate of the predicted {what} at states all over the "
        "plane, due to the head's weights; times from noise, t = 0, to data, t = 1. One scale for "
        f"all. {_own_size(seen)}Conditions: {map_conditions(samples, seen.settings)}."
    )
    rows, columns = maps.shape[:2]
    size, shared = (180 * columns + 110, 190 * rows + 40), {"sharex": True, "sharey": True}
    figure, panels = chart(*size, _OUTPUT, caption, rows, columns, **shared)
    box = found["output_x"], found["output_y"]
    for row in range(rows):
        for column in range(columns):
            drawn = _map(panels[row, column], maps[row, column], *box, ceiling(maps))
            if not row:
                panels[row, column].set_title(f"t = {float(found['times'][column]):.3g}")
            panels[row, column].label_outer()
        panels[row, 0].set_ylabel(_of_kind(found["kinds"][row], seen.classes) + "$x_2$")
    figure.colorbar(drawn, ax=panels, label="standard deviation", fraction=0.03)
    return figure


_OUTPUT = "Uncertainty of the network's output over the plane"


@style()
def variance_over_starts(seen: "Seen") -> "Figure":
    """Standard deviation of the samples over the plane of their starting noise."""
    found, samples = seen.measured, seen.samples
    maps = (found["start_variance"].clamp(min=0) / 2).sqrt().numpy()
    caption = (
        "Each place is a starting noise, its colour the standard deviation of the sample that "
        "starts there, root of its variance's mean over both coordinates. One scale for all. "
        f"{_own_size(seen)}Conditions: {map_conditions(samples, seen.settings)}."
    )
    title = "Uncertainty of samples over the plane of their noise"
    figure, panels = chart(400 * len(maps) + 160, 400, title, caption, 1, len(maps))
    box = found["start_x"], found["start_y"]
    for column, values in enumerate(maps):
        drawn = _map(panels[0, column], values, *box, ceiling(maps))
        name = _of_kind(found["kinds"][column], seen.classes)
        panels[0, column].set(ylabel="starting noise, second coordinate", title=name.strip(", "))
        panels[0, column].set(xlabel="starting noise, first coordinate")
    figure.colorbar(drawn, ax=panels, label="standard deviation", fraction=0.05)
    return figure


def _of_kind(kind: Tensor, classes: Sequence[str]) -> str:
    return "" if int(kind) < 0 else f"{class_name(kind, classes)}, "


def _map(axes: "Axes", values: np.ndarray, x: Tensor, y: Tensor, top: float) -> Any:
    """A picture over the plane; rows of ``values`` go up."""
    half = [float(each[1] - each[0]) / 2 for each in (x, y)]
    across = float(x[0]) - half[0], float(x[-1]) + half[0]
    extent = *across, float(y[0]) - half[1], float(y[-1]) + half[1]
    square(axes, "$x_1$", "$x_2$")
    axes.grid(visible=False)
    how: dict[str, Any] = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": top, "interpolation": "none"}
    return axes.imshow(values, origin="lower", extent=extent, **how)


def _axis(low: float | Tensor, high: float | Tensor) -> Tensor:
    return torch.linspace(float(low), float(high), CELLS)


def _places(x: Tensor, y: Tensor) -> Tensor:
    """All places ``(n n, 2)``, row by row from below."""
    rows, columns = torch.meshgrid(y, x, indexing="ij")
    return torch.stack([columns.flatten(), rows.flatten()], 1)


def _own_size(seen: "Seen") -> str:
    """A sentence about maps that are shown in another size than this; nothing where none are."""
    calibrated = seen.settings.get("uncertainty.calibrate") is not None
    return "In the posterior's own size, not calibrated. " if calibrated else ""


def _output_variance(
    starts: "Starts", posterior: "HeadPosterior", x: Tensor, y: Tensor, kind: int, last: float
) -> Tensor:
    """Mean over both coordinates, ``(T, n, n)``."""
    start = _of_class(starts, range(CELLS**2), kind)
    field, places = start.field(), _places(x, y).to(next(start.model.parameters()))
    maps = []
    for time in TIMES:
        features = field.features(places, last * time)
        maps.append(posterior.predictive_variance(features).mean(-1).reshape(len(y), len(x)))
    return torch.stack(maps).cpu()


def _start_variance(
    starts: "Starts", estimator: "Estimator", posterior: "HeadPosterior", a: Tensor, kind: int
) -> Tensor:
    """Summed variance of what starts at each place, ``(n, n)``."""
    from bayesdiff.uncertainty.restart import with_state

    places, found = _places(a, a), []
    for numbers in torch.arange(len(places)).split(_AT_ONCE):
        start = _of_class(starts, numbers.tolist(), kind)
        begun = with_state(start, places[numbers].to(start.draw()))
        found.append(estimator(begun, posterior).variance.sum(1))
    return torch.cat(found).reshape(len(a), len(a))


def _of_class(starts: "Starts", numbers: Sequence[int], kind: int) -> Any:
    """Starts of samples of one class, of an unconditional model's where that is -1."""
    start = starts(numbers)
    labels = torch.full((len(numbers),), kind, device=start.device)
    return start if kind < 0 else replace(start, condition=labels)
