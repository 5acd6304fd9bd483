"""What one pass over the data leaves, and its file."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesdiff.artefacts import write_atomic
from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry

_FORMAT = "bayesdiff-curvature-1"


@dataclass(frozen=True)
class Curvature:
    """What one pass over the data leaves: enough for every sigma_noise and prior_precision.

    Attributes:
        gram: ``(P, P)`` float64, sum over images and pixels, divided by ``draws``.
        num_images: N, images in the pass, each counted once whatever ``draws`` is.
        draws: (t, noise) draws per image.
        squared_error: sum of squared residuals over all outputs, divided by ``draws``.
        num_outputs: residuals per draw, images * pixels * channels.
        mean: ``(C_out, P)`` float64, the trained weights of the head.
        source: hash of the checkpoint and data this came from.
        geometry: how the head reads its features.
    """

    gram: Tensor
    num_images: int
    draws: int
    squared_error: float
    num_outputs: int
    mean: Tensor
    source: str
    geometry: HeadGeometry

    def __post_init__(self) -> None:
        size, (channels, width) = self.geometry.size, self.mean.shape
        if self.gram.shape != (size, size) or width != size:
            raise UserError(
                f"a curvature of {channels} outputs needs a {size} x {size} Gram matrix and"
                f" {size} weights each, got {tuple(self.gram.shape)} and {width}"
            )
        if not (self.gram.isfinite().all() and self.mean.isfinite().all()):
            raise UserError(
                "the features or the head hold values that are not finite; train again"
            )

    @property
    def sigma_mle(self) -> float:
        """The noise level that maximises the likelihood: root mean squared residual."""
        return math.sqrt(self.squared_error / self.num_outputs)

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Ascending eigenvalues ``(P,)``, never negative, and eigenvectors ``(P, P)`` of G."""
        values, vectors = torch.linalg.eigh(self.gram)
        # G is a sum of squares; a negative value is rounding.
        return values.clamp(min=0), vectors

    def require_source(self, source: str) -> None:
        """Refuse to pair this curvature with another checkpoint.

        Raises:
            UserError: if ``source`` is not the one this curvature was computed from.
        """
        if source != self.source:
            raise UserError(
                f"the curvature was computed from {self.source}, not from {source}; delete"
                " the file to compute it again, or give another run_dir"
            )

    def save(self, path: str | Path) -> None:
        """Write the record as safetensors; a crash leaves the old file or none, never half."""
        tensors = {"gram": self.gram.cpu().contiguous(), "mean": self.mean.cpu().contiguous()}
        counts = json.dumps(
            {
                "num_images": self.num_images,
                "draws": self.draws,
                "squared_error": self.squared_error,
                "num_outputs": self.num_outputs,
                "source": self.source,
                "geometry": asdict(self.geometry),
            }
        )
        metadata = {"format": _FORMAT, "record": counts, "checksum": _checksum(tensors, counts)}
        write_atomic(Path(path), lambda file: save_file(tensors, file, metadata))

    @classmethod
    def load(cls, path: str | Path) -> "Curvature":
        """Read what ``save`` wrote; nothing in the file is ever run.

        Raises:
            UserError: if the file is missing, truncated, changed, or something else.
        """
        cure = "delete it and compute the curvature again"
        if not Path(path).is_file():
            raise UserError(f"no curvature at {path}; run the curvature stage first")
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    found = metadata.get("format", "no format")
                    raise UserError(f"{path} is not a {_FORMAT} file (has {found}); {cure}")
                tensors = {name: file.get_tensor(name) for name in ("gram", "mean")}
            if _checksum(tensors, metadata["record"]) != metadata["checksum"]:
                raise UserError(f"{path} is damaged (its checksum differs); {cure}")
            record = json.loads(metadata["record"])
            geometry = HeadGeometry(**record.pop("geometry"))
            return cls(**tensors, **record, geometry=geometry)
        except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} cannot be read as a curvature ({reason}); {cure}") from error


def _checksum(tensors: dict[str, Tensor], record: str) -> str:
    """SHA-256 over the bytes of the tensors, in order of their names, and the record."""
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
