"""Curvature of a random subset of all weights of a network, from one pass over the data."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.training_draws import Draw, Encode, draws_of
from bayesdiff.machine.ranks import total
from bayesdiff.models import GenerativeModel
from bayesdiff.storage.checked_file import load_checked, save_checked

STRUCTURES = ("diag", "dense")
CURVATURES = ("ggn", "empirical_fisher")
# Weights of a dense matrix, 128 MiB.
MOST_DENSE = 4096
# Floats of gradients of single images that are held at once.
_AT_ONCE = 2**25
_FORMAT = "bayesdiff-subnetwork-1"
_SALT = 5_000_039


@dataclass(frozen=True)
class Subset:
    """Which weights of a network: places in each of its parameters, by name.

    Attributes:
        places: ascending places in the flattened parameter.
    """

    places: Mapping[str, Tensor]

    @classmethod
    def at_random(cls, net: nn.Module, count: int, seed: int) -> "Subset":
        """So many of all weights, each set as likely as any other."""
        generator = torch.Generator().manual_seed(seed + _SALT)
        chosen = torch.randperm(weights_of(net), generator=generator)[:count].sort().values
        places, first = {}, 0
        for name, parameter in net.named_parameters():
            last = first + parameter.numel()
            own = chosen[(first <= chosen) & (chosen < last)] - first
            if len(own):
                places[name] = own
            first = last
        return cls(places)

    def __len__(self) -> int:
        return sum(len(own) for own in self.places.values())

    def moved(self, net: nn.Module, deviation: Tensor) -> dict[str, Tensor]:
        """Parameters that hold chosen weights, with the deviations ``(k,)`` added to these."""
        parameters = dict(net.named_parameters())
        found = {}
        parts = deviation.split([len(own) for own in self.places.values()])
        for (name, own), part in zip(self.places.items(), parts, strict=True):
            value = parameters[name].detach()
            at = (own.to(value.device),)
            step = torch.zeros_like(value).flatten().index_put(at, part.to(value))
            found[name] = value + step.view_as(value)
        return found


@dataclass(frozen=True)
class SubnetworkCurvature:
    """What the pass leaves.

    Attributes:
        matrix: ``(k,)`` of structure ``diag``, else ``(k, k)``, float64: a sum over images, each
            counted once whatever its draws, of half the squared error's curvature.
        power: of 1 / sigma_noise that it is multiplied with: 2 of a GGN, 4 of an empirical Fisher.
        num_images: N, of the pass.
        source: key of weights, data and options.
    """

    matrix: Tensor
    power: int
    num_images: int
    source: str

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        facts = {"power": self.power, "num_images": self.num_images, "source": self.source}
        save_checked(path, _FORMAT, {"matrix": self.matrix}, facts)

    @classmethod
    def stored(cls, path: Path, source: str) -> "SubnetworkCurvature | None":
        """What the file holds of this very pass, None for nothing; a damaged one is refused."""
        if not path.is_file():
            return None
        what, build = "a subnetwork's curvature", lambda _, t, f: cls(t["matrix"], **f)
        found = load_checked(path, [_FORMAT], what, "delete it and run again", build)
        return found if found.source == source else None

    def covariance_root(self, posterior: HeadPosterior) -> Callable[[Tensor], Tensor]:
        """Turns standard noise ``(n, k)`` into draws around the trained weights.

        Precision: ``n_eff / N * matrix / sigma_noise^power + prior_precision``, with the numbers
        of the head's posterior.
        """
        weight = posterior.n_eff / self.num_images / posterior.sigma_noise**self.power
        tau = posterior.prior_precision
        if self.matrix.ndim == 1:
            return lambda noise: noise / (weight * self.matrix + tau).sqrt()
        values, vectors = torch.linalg.eigh(self.matrix)
        # Second moments; a negative value is rounding.
        sizes = (weight * values.clamp(min=0) + tau).rsqrt()
        return lambda noise: (noise @ vectors * sizes) @ vectors.T


def weights_of(net: nn.Module) -> int:
    """All weights of a network."""
    return sum(parameter.numel() for parameter in net.parameters())


def fit_subnetwork(
    model: GenerativeModel,
    images: Tensor,
    given: Tensor | None,
    subset: Subset,
    *,
    source: str,
    structure: str = "diag",
    curvature: str = "ggn",
    probes: int | str = 1,
    draws: int = 1,
    num_images: int | None = None,
    batch_size: int = 256,
    seed: int = 0,
    encode: Encode = to_model_range,
) -> SubnetworkCurvature:
    """Sum of g g^T over images, g the gradient of ``z . output`` in the chosen weights.

    For a Gaussian likelihood the GGN is the Fisher information: z standard normal has it on
    average, z all outputs in turn exactly. An empirical Fisher has the residual in the place of z.

    Args:
        model: with its trained weights; left as it is.
        images: ``(N, C, H, W)`` uint8.
        given: values of the model's condition, ``(N, ...)``, or None.
        subset: of k weights.
        source: key, kept with the result.
        structure: ``diag`` or ``dense``.
        curvature: ``ggn`` or ``empirical_fisher``.
        probes: z of every image and draw, for a GGN, or ``all``.
        draws: (t, noise) draws per image.
        num_images: a random subset of this size; None for all.
        batch_size: images of a draw of times and noise.
        seed: fixes images, draws and z.
        encode: of the images' space, see ``draws_of``.
    """
    net, count = cast(nn.Module, model.net), num_images or len(images)
    training, device = net.training, next(net.parameters()).device
    size = (len(subset),) if structure == "diag" else (len(subset), len(subset))
    matrix = torch.zeros(size, dtype=torch.float64, device=device)
    net.eval()
    for seen in draws_of(
        model, images, given, draws=draws, num_images=count, batch_size=batch_size, seed=seed,
        what="subnetwork", encode=encode,
    ):  # fmt: skip
        for g in gradients_of(net, subset, seen, curvature, probes):
            matrix += g.square().sum(0) if structure == "diag" else g.T @ g
    net.train(training)
    power = 2 if curvature == "ggn" else 4
    return SubnetworkCurvature((total(matrix) / draws).cpu(), power, count, source)


def gradients_of(
    net: nn.Module, subset: Subset, seen: Draw, curvature: str, probes: int | str
) -> Iterator[Tensor]:
    """Rows whose outer products, summed, are the batch's curvature.

    Yields:
        Float64 ``(n, k)`` of some images at a time.
    """
    outputs = seen.target[0].numel()
    rows = outputs if probes == "all" else int(probes)
    if curvature == "empirical_fisher":
        rows = 1
    at_once = max(1, _AT_ONCE // weights_of(net))
    each = max(1, at_once // rows)
    chance = curvature == "ggn" and probes != "all"
    z = None
    if chance:
        shape = len(seen.target), rows, outputs
        z = torch.randn(shape, generator=seen.generator).to(seen.target)
    for part in torch.arange(len(seen.target)).split(each):
        y = None if seen.y is None else seen.y[part]
        own = None if z is None else z[part]
        with torch.inference_mode(False), torch.enable_grad():
            # Clones are ordinary tensors, whatever mode these were made in.
            x, time, target = (each[part].clone() for each in (seen.x_t, seen.time, seen.target))
            g = _of_images(net, subset, x, time, target, y, own, curvature, at_once)
        yield g.double().flatten(0, 1) / (rows if chance else 1) ** 0.5


def _of_images(
    net: nn.Module,
    subset: Subset,
    x: Tensor,
    time: Tensor,
    target: Tensor,
    y: Tensor | None,
    z: Tensor | None,
    curvature: str,
    at_once: int,
) -> Tensor:
    """Gradients of every image, ``(B, n, k)``; z None stands for all outputs, or the residual."""
    certain = {name: parameter.detach() for name, parameter in net.named_parameters()}
    kind = certain[next(iter(subset.places))].dtype
    still = torch.zeros(len(subset), dtype=kind, device=x.device)

    def of_image(x: Tensor, t: Tensor, target: Tensor, y: Any, z: Any) -> Tensor:
        def output(deviation: Tensor) -> Tensor:
            given = None if y is None else y[None]
            weights = certain | subset.moved(net, deviation)
            return torch.func.functional_call(net, weights, (x[None], t[None], given)).flatten()

        said, pull = torch.func.vjp(output, still)[:2]
        if curvature == "empirical_fisher":
            rows = (said - target.flatten())[None]
        else:
            rows = torch.eye(len(said)).to(said) if z is None else z.to(said)
        return torch.func.vmap(lambda row: pull(row)[0], chunk_size=at_once)(rows)

    given = (0, 0, 0, None if y is None else 0, None if z is None else 0)
    return torch.func.vmap(of_image, in_dims=given)(x, time, target, y, z)


def check_subnetwork(model: GenerativeModel, count: int) -> None:
    """Refuse a likelihood without a plain GGN, or more weights than there are.

    Raises:
        UserError: one line with the cure.
    """
    if not (model.likelihood.scaled and model.likelihood.linear):
        raise UserError(
            f"uncertainty=subnetwork is for a Gaussian likelihood, and this is "
            f"{model.likelihood.name}; use uncertainty=ensemble"
        )
    there = weights_of(cast(nn.Module, model.net))
    if count > there:
        raise UserError(
            f"uncertainty.weights={count} is more than the {there} of the network; "
            "give fewer, or uncertainty.share=1"
        )
