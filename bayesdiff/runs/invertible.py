"""A trained run as an invertible map: data to latents, latents to data."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict, read_write
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import Space
from bayesdiff.models import GenerativeModel
from bayesdiff.options.local_paths import settle
from bayesdiff.runs.build import build
from bayesdiff.runs.training import chosen, require_same_kind
from bayesdiff.solvers import Solver, decode, encode
from bayesdiff.storage.checked_file import load_checked, save_checked
from bayesdiff.storage.checkpoints import load_weights, read_checkpoint

_KIND = "bayesdiff-latents-1"
_AT_ONCE = 256


@dataclass(frozen=True)
class InvertibleFlow:
    """Both ways along the deterministic solver of a trained model.

        flow = InvertibleFlow.of("outputs/circles-inflation-...")
        latents = flow.encode(data)
        again = flow.decode(latents)

    Latents are the states at t = 0, standard normal where the model is right; those of a flow, of
    probability-flow diffusion and of an inflationary flow alike. Of the latter, coordinates lie in
    the order of the data's eigenvectors, and ``model.path.latent_variance`` is what each has in
    the units of the paper.

    Attributes:
        model: with its trained weights.
        space: of its states.
        solver: deterministic.
        weights: key of the weights, which saved latents must share.
        stored: one of the data as they are stored, ``(1, ...)``; others must be like it.

    Example:
        Of an untrained network, without a folder:

        >>> from bayesdiff.data.toys import circles
        >>> from bayesdiff.networks import MLP
        >>> from bayesdiff.paths import CondOT
        >>> from bayesdiff.solvers import RK4
        >>> data = circles(points=20)
        >>> net = MLP(shape=(2,), width=16)
        >>> model = GenerativeModel(net, CondOT(), "velocity", torch.optim.Adam)
        >>> flow = InvertibleFlow(model, data.space, RK4(num_steps=10), weights="")
        >>> latents = flow.encode(data.images)
        >>> torch.allclose(flow.decode(latents), data.images, atol=0.01)
        True
    """

    model: GenerativeModel
    space: Space
    solver: Solver
    weights: str
    stored: Tensor | None = None

    @classmethod
    def of(cls, folder: str | Path, solver: Solver | None = None) -> Self:
        """The model of a run folder.

        Args:
            folder: with a finished training.
            solver: None for the run's own.

        Raises:
            UserError: for a folder without a training, or a solver that draws noise.
        """
        file = Path(folder) / ".hydra" / "config.yaml"
        if not file.is_file():
            raise UserError(f"{folder} is no run folder, it has no .hydra/config.yaml; give one")
        cfg: Any = OmegaConf.load(file)
        with read_write(cfg), open_dict(cfg):
            cfg.merge_with(
                {"fit": False, "ckpt_path": "last", "run_dir": str(folder), "init_from": None}
            )
        settle(cfg)
        run = build(cfg)
        path = Path(folder) / "checkpoints" / chosen(run)
        if not path.is_file():
            raise UserError(f"{folder} has no finished training; train it, then call again")
        checkpoint = read_checkpoint(path)
        require_same_kind(run, path, checkpoint)
        weights = load_weights(run.model, path, checkpoint)
        solver = solver or instantiate(cfg.solver)
        if solver.stochastic:
            raise UserError(
                f"solver={solver.name} draws noise and is no map; give another, such as Heun(50)"
            )
        # A last prediction is no way back.
        solver = replace(solver, denoise=False)
        model, data = run.model.to(run.device).eval(), run.data
        return cls(model, data.space, solver, weights, data.data.images[:1])

    def encode(self, data: Tensor, condition: Tensor | None = None) -> Tensor:
        """Latents ``(N, *shape)`` of data as they are stored, ``(N, ...)``.

        Args:
            data: uint8 images, or float32 points.
            condition: values ``(N, ...)`` that the network is given, as labels; None for none.

        Raises:
            UserError: for data of another type or shape, such as the floats of ``decode``.
        """
        like = self.stored
        if like is not None and (data.dtype, data.shape[1:]) != (like.dtype, like.shape[1:]):
            raise UserError(
                f"encode takes data as they are stored, {_kind(like)}, got {_kind(data)}; "
                "space.decode makes them of states, to_uint8 of images in [-1, 1]"
            )

        def there(part: Tensor, given: Tensor | None) -> Tensor:
            return encode(self.model, self.solver, self.space.encode(part), given)

        return self._in_parts(there, data, condition)

    def decode(self, latents: Tensor, condition: Tensor | None = None) -> Tensor:
        """Values of latents, ``(N, ...)`` in the units of maps: images in [-1, 1], not clipped.

        Args:
            latents: ``(N, *shape)``, as of ``encode``.
            condition: values ``(N, ...)`` that the network is given, as labels; None for none.

        Raises:
            UserError: for latents of another shape.
        """
        if tuple(latents.shape[1:]) != tuple(self.space.shape):
            raise UserError(
                f"decode takes latents (N, {', '.join(map(str, self.space.shape))}), got "
                f"{tuple(latents.shape)}; give those of encode"
            )

        def back(part: Tensor, given: Tensor | None) -> Tensor:
            return self.space.values(decode(self.model, self.solver, part, given))

        return self._in_parts(back, latents, condition)

    def save(self, path: str | Path, latents: Tensor) -> None:
        """Write latents, with the key of the weights that they belong to."""
        save_latents(path, latents, self.weights, self.solver)

    def load(self, path: str | Path) -> Tensor:
        """Latents that ``save`` wrote.

        Raises:
            UserError: for a file that cannot be read, or latents of another model or solver.
        """  # noqa: DOC502 - raised one level down

        def built(kind: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> Tensor:
            for name, value in _facts(self.weights, self.solver).items():
                if facts[name] != value:
                    raise UserError(
                        f"{path} has latents of {name} {facts[name]}, this flow has {value}; "
                        "encode the data again"
                    )
            return tensors["latents"]

        return load_checked(path, [_KIND], "latents", "encode the data again", built)

    def _in_parts(
        self,
        function: Callable[[Tensor, Tensor | None], Tensor],
        values: Tensor,
        condition: Tensor | None,
    ) -> Tensor:
        if not len(values):
            raise UserError("there is nothing to encode or decode, got a batch of 0; give some")
        device = next(self.model.parameters()).device
        parts = []
        for start in range(0, len(values), _AT_ONCE):
            rows = slice(start, start + _AT_ONCE)
            given = None if condition is None else condition[rows].to(device)
            parts.append(function(values[rows].to(device), given).cpu())
        return torch.cat(parts)


def _kind(data: Tensor) -> str:
    return f"{str(data.dtype).removeprefix('torch.')} (N, {', '.join(map(str, data.shape[1:]))})"


def save_latents(path: str | Path, latents: Tensor, weights: str, solver: Solver) -> None:
    """Write latents as ``InvertibleFlow.load`` reads them.

    Args:
        path: of the safetensors file.
        latents: ``(N, *shape)``.
        weights: key of the model's.
        solver: that they were found with.
    """
    save_checked(path, _KIND, {"latents": latents}, _facts(weights, solver))


def _facts(weights: str, solver: Solver) -> dict[str, str]:
    """What the latents of one set of data depend on."""
    return {"weights": weights, "solver": repr(replace(solver, denoise=False))}
