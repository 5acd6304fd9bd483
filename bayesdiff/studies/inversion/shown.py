"""What figures of round trips are drawn from, and in which units."""

import colorsys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayesdiff.data.spaces import Space
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.paths import ProbabilityPath
from bayesdiff.studies.inversion import results


@dataclass(frozen=True)
class Shown:
    """Numbers and rows of a study.

    Attributes:
        record: numbers, as in results.json.
        rows: see ``RoundTrip``, latents standardised.
        path: of the model.
        space: of the states.
        expected: variances of Gaussian data's latents, of a state's shape.
        times: of the frames there and back.
        conditions: of the run, for the captions.
    """

    record: Mapping[str, Any]
    rows: Rows
    path: ProbabilityPath
    space: Space
    expected: Tensor
    times: tuple[list[float], list[float]]
    conditions: str = ""

    @property
    def points(self) -> bool:
        """Whether data are points, which have figures of their own."""
        return not self.space.pictures

    @property
    def start(self) -> str:
        """What was started from, a sentence for captions."""
        made = self.record["conditions"]
        noised = ", with the noise that the path has at t = 1" if made["start"] == "noised" else ""
        kind = "points" if self.points else "images"
        return f"{made['images']} held-out {kind}{noised}."

    @property
    def coordinates(self) -> str:
        """What a coordinate of a state is."""
        ordered = getattr(self.space, "variances", None) is not None
        return "eigen-dimension" if ordered else "coordinate"

    @property
    def units(self) -> str:
        """What frames show, a sentence for captions."""
        if not hasattr(self.path, "scale"):
            return "States as the solver has them."
        return (
            "States along the data's eigenvectors, scaled as in the paper: to variance 1 along "
            "the first at all times."
        )

    def frames(self, way: int) -> Tensor:
        """States ``(F, N, D)`` there, 0, or back, 1, in the units that are shown."""
        states = self.rows[("there", "back")[way]].double().transpose(0, 1)
        scale = getattr(self.path, "scale", None)
        if scale is None:
            return states
        t = torch.tensor(self.times[way], dtype=torch.float64)
        return states * scale(t).cpu()[:, None]

    @property
    def scaled_variance(self) -> Tensor | None:
        """See ``results.scaled_variance``."""
        return results.scaled_variance(self.path)

    @property
    def hues(self) -> np.ndarray:
        """Colours ``(N, 3)`` that points keep: around their mean, or along a line."""
        values = self.rows["data"].double().flatten(1)
        x = (values - values.mean(0)).numpy()
        if x.shape[1] > 1:
            turn = np.arctan2(x[:, 1], x[:, 0]) / (2 * np.pi) + 0.5
        else:
            turn = 0.8 * np.argsort(np.argsort(x[:, 0])) / len(x)
        return np.array([colorsys.hsv_to_rgb(h, 0.8, 0.85) for h in turn])
