"""What a Bayesian pipeline returns."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import read_json, write_json
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.scores.of_maps_and_images import mean, top_mean, total


@dataclass(frozen=True)
class Output:
    """Images of a pipeline with what the posterior says of them.

    Attributes:
        images: ``(N, C, H, W)`` in [0, 1].
        variance: of their pixels, ``(N, C, H, W)``, in squared units of these images.
        latent_variance: of the states they are decoded from; None where states are images.
        scores: one number per image, ``(N,)``, by name.
        record: what all this was made with.
        samples: images and variances in full, with their course over time.
    """

    images: Tensor
    variance: Tensor
    latent_variance: Tensor | None
    scores: dict[str, Tensor]
    record: dict[str, Any]
    samples: Samples

    @classmethod
    def of(cls, samples: Samples, record: dict[str, Any]) -> "Output":
        """Images in [0, 1] with their variance and scores.

        Args:
            samples: of a pipeline.
            record: see the class.
        """
        unit = samples.in_unit_range()
        scores = {"map.sum": total(unit.variance), "map.mean": mean(unit.variance)}
        scores["map.top_mean"] = top_mean(unit.variance)
        images = unit.images.clamp(0, 1)
        return cls(images, unit.variance, samples.latent_variance, scores, record, samples)

    def save(self, folder: str | Path) -> None:
        """Every image and every map as a PNG in its folder ``png``, and ``record.json``.

        Maps have one scale, which ``png/scale.json`` states.

        Raises:
            UserError: for a folder that has other images already.
        """
        from bayesdiff.report.export import export_samples

        folder = Path(folder)
        pictures, path = folder / "png", folder / "record.json"
        scores = {name: values.tolist() for name, values in self.scores.items()}
        record = self.record | {"scores": scores}
        same = read_json(path) == json.loads(json.dumps(record, default=str))
        if (pictures.exists() or path.exists()) and not same:
            raise UserError(
                f"{folder} has other images already; give another folder, or delete it"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, record)
        export_samples(pictures, self.samples, (), path.name)


def record_of(
    samples: Samples, solver: Solver, seed: int, asked: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """What samples were made with.

    Args:
        samples: of a pipeline.
        solver: of them.
        seed: of their noise.
        asked: arguments of the pipeline, for one image each.
    """
    decoded = "none" if samples.latents is None else "once per image, and per member or direction"
    return {
        "solver": getattr(solver, "called", solver.name),
        "steps": solver.num_steps,
        "guidance": solver.guidance,
        "estimator": samples.estimator,
        "nfe": samples.nfe,
        "seed": seed,
        "asked": [{name: str(value) for name, value in each.items()} for each in asked],
        "decoder": decoded,
    }
