"""What a Bayesian pipeline returns."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bayesdiff.storage.artefacts import write_json
from bayesdiff.uncertainty import Samples


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

    def save(self, folder: str | Path) -> None:
        """Every image and every map as a PNG in its folder ``png``, and ``record.json``.

        Maps have one scale, which ``png/scale.json`` states.
        """
        from bayesdiff.report.export import export_samples

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        export_samples(folder / "png", self.samples, (), "record.json")
        scores = {name: values.tolist() for name, values in self.scores.items()}
        write_json(folder / "record.json", self.record | {"scores": scores})
