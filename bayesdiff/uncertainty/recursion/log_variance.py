"""A second linear head for the log-variance of the training target, fitted after the training."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.coupled import patches
from bayesdiff.laplace.gradients import unfolded
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.training_draws import Draw, Encode, draws_of
from bayesdiff.machine.ranks import gather_rows, rank, world_size
from bayesdiff.models import GenerativeModel
from bayesdiff.models.exact import ExactPrediction
from bayesdiff.networks.network import Network
from bayesdiff.storage.checked_file import load_checked, save_checked

TARGETS = ("conditional", "marginal")
_FORMAT = "bayesdiff-variance-head-1"
_SALT = 8_000_009
_BATCH = 256
# A share of the mean square that is added to all: a residual of 0 has no log-variance.
_FLOOR = 1e-9
# A share of the mean variance of the features, without which constant ones have no inverse.
_JITTER = 1e-6


@dataclass(frozen=True)
class LogVarianceHead:
    """eta = W phi + b, phi what the trained head sees; the variance of an output is e^eta.

    Attributes:
        weight: W, float64 ``(C_out, D k k)``, in the order of the trained head's own.
        bias: b, ``(C_out,)``.
        lowest: smallest eta among the rows of the fit, ``(C_out,)``.
        highest: largest; eta is kept between both, as features of a sampler may lie outside those
            of the data and an exponential goes on for ever.
        source: key of weights, data and options.
    """

    weight: Tensor
    bias: Tensor
    lowest: Tensor
    highest: Tensor
    source: str = ""

    def __call__(self, net: Network, features: Tensor) -> Tensor:
        """Variance of the network's outputs, ``(B, D, h, w) -> (B, C, H, W)``.

        Args:
            net: whose features they are.
            features: input of its head.
        """
        geometry, read = HeadGeometry.of(net.head), HeadGeometry.of(net.head).read(features)
        weight, bias, low, high = (
            value.to(features) for value in (self.weight, self.bias, self.lowest, self.highest)
        )
        if k := geometry.kernel_size:
            eta = F.conv2d(read, weight.view(len(weight), -1, k, k), bias, padding=k // 2)
            low, high = low[:, None, None], high[:, None, None]
        else:
            eta = F.linear(read, weight, bias)
        return net.fold(eta.clamp(low, high)).exp()

    def save(self, path: str | Path) -> None:
        """Write it, whole or not at all."""
        names = ("weight", "bias", "lowest", "highest")
        save_checked(path, _FORMAT, {n: getattr(self, n) for n in names}, {"source": self.source})

    @classmethod
    def stored(cls, path: Path, source: str) -> "LogVarianceHead | None":
        """What the file holds of this very fit, None for nothing; a damaged one is refused."""
        if not path.is_file():
            return None
        cure, build = "delete it and run again", lambda _, tensors, facts: cls(**tensors, **facts)
        found = load_checked(path, [_FORMAT], "a variance head", cure, build)
        return found if found.source == source else None


@torch.no_grad()
def fit_log_variance(
    model: GenerativeModel,
    images: Tensor,
    given: Tensor | None,
    *,
    source: str = "",
    target: str = "conditional",
    num_images: int | None = None,
    rows: int = 32_768,
    seed: int = 0,
    encode: Encode = to_model_range,
) -> LogVarianceHead:
    """The head that makes the squared residuals of the trained network most likely.

    Args:
        model: with its trained weights; left as it is.
        images: ``(N, ...)``, of the training.
        given: values of the model's condition, ``(N, ...)``, or None.
        source: key, kept with the result.
        target: what residuals are taken from, see ``VarianceHead``.
        num_images: a random subset of this size, one draw of time and noise each; None for all.
        rows: positions of the head's input that enter, at most, or one per image: a random few of
            each.
        seed: of images, draws and positions.
        encode: of the images' space, see ``draws_of``.
    """
    net, training = cast(nn.Module, model.net), model.training
    generator = torch.Generator().manual_seed(seed + _SALT)
    chosen = torch.randperm(len(images), generator=generator)[:num_images]
    images, given = images[chosen], None if given is None else given[chosen]
    references = encode(images).to(next(net.parameters()).device)
    model.eval()
    found: list[tuple[Tensor, Tensor]] = []
    for seen in draws_of(
        model, images, given, batch_size=_BATCH, seed=seed, what="variance head", encode=encode
    ):
        if target == "marginal":
            seen = replace(seen, target=marginal_targets(model, seen, references, given))
        found.append(_rows_of(model, seen, max(1, rows // len(images))))
    model.train(training)
    phi, squares = (_together(list(parts), len(images)) for parts in zip(*found, strict=True))
    return replace(most_likely(phi, squares), source=source)


def _rows_of(model: GenerativeModel, seen: Draw, each: int) -> tuple[Tensor, Tensor]:
    """Features ``(B, n, P)`` and squared residuals ``(B, n, C_out)`` at n random positions."""
    net, geometry = model.net, HeadGeometry.of(model.net.head)
    features = net.features(seen.x_t, seen.time, seen.y)
    output = net.head(features)
    residual = unfolded(net, output, net.fold(output) - seen.target)
    squares = residual.double().square().movedim(geometry.axis, -1)
    phi, kept = [], []
    for one, square in zip(features, squares, strict=True):
        # Of one image at a time: the patches of a whole batch would take gigabytes.
        all_rows = patches(one[None], geometry)[:, : geometry.size - geometry.bias]
        order = torch.randperm(len(all_rows), generator=seen.generator)[:each].to(one.device)
        phi.append(all_rows[order])
        kept.append(square.reshape(len(all_rows), -1)[order])
    return torch.stack(phi), torch.stack(kept)


def _together(parts: list[Tensor], images: int) -> Tensor:
    """Rows of all batches of all processes, each where it belongs, ``(N, ...)``."""
    own = torch.arange(images).split(_BATCH)[rank() :: world_size()]
    return gather_rows(torch.cat(parts), torch.cat(own), images).flatten(0, 1).cpu()


def marginal_targets(
    model: GenerativeModel, seen: Draw, references: Tensor, given: Tensor | None
) -> Tensor:
    """Mean of the training target over which of the references a state came from.

    Args:
        model: gives path and prediction.
        seen: the states, with their times and conditions.
        references: states of data, those behind ``seen`` among them, ``(N, ...)``.
        given: their conditions; only those of the same one count. None for none.
    """
    found = []
    for number, (x, time) in enumerate(zip(seen.x_t, seen.time, strict=True)):
        own = references
        if given is not None and seen.y is not None:
            same = given.to(seen.y.device) == seen.y[number]
            own = references[same.reshape(len(given), -1).all(1)]
        exact = ExactPrediction(model.path, model.prediction, own)
        found.append(exact.features(x[None], time[None]))
    return torch.cat(found)


def most_likely(phi: Tensor, squares: Tensor) -> LogVarianceHead:
    """The minimum of the mean of (eta + e^-eta r^2) / 2 over the rows, for every output alone.

    That is convex in the weights. Features are made uncorrelated, with a variance of 1, which
    makes the Fisher information of the weights a multiple of the identity; there quasi-Newton
    steps take a few dozen passes. A standard normal prior on these weights, not on the bias,
    counts as one row: it decides what no row tells.

    Args:
        phi: float64 ``(N, P)``, without a constant.
        squares: r^2, float64 ``(N, C_out)``.
    """
    count, size = phi.shape
    squares = squares + (_FLOOR * squares.mean(0)).clamp(min=torch.finfo(torch.float64).tiny)
    mean = phi.mean(0)
    white = phi - mean
    covariance = white.T @ white / count
    jitter = _JITTER * covariance.diagonal().mean() + 1e-12
    root = torch.linalg.cholesky(covariance + jitter * torch.eye(size).to(covariance))
    white = torch.linalg.solve_triangular(root, white.T, upper=False).T
    bias = squares.mean(0).log()
    change = _minimum(white, squares / squares.mean(0))
    eta = white @ change[:-1] + change[-1] + bias
    weight = torch.linalg.solve_triangular(root.T, change[:-1], upper=True).T
    bias = bias + change[-1] - weight @ mean
    return LogVarianceHead(weight, bias, eta.amin(0), eta.amax(0))


def _minimum(white: Tensor, squares: Tensor) -> Tensor:
    """Weights of the columns and a constant, ``(P + 1, C_out)``, from 0 on."""
    count = len(white)
    weights = nn.Parameter(white.new_zeros(white.shape[1] + 1, squares.shape[1]))
    options: dict[str, Any] = {"tolerance_grad": 1e-9, "tolerance_change": 1e-15}
    optimizer = torch.optim.LBFGS(
        [weights], 1.0, max_iter=300, history_size=20, line_search_fn="strong_wolfe", **options
    )

    def closure() -> Tensor:
        columns = weights.detach()[:-1]
        eta = white @ columns + weights.detach()[-1]
        ratio = squares * (-eta).exp()
        slope = (1 - ratio) / (2 * count)
        weights.grad = torch.cat([white.T @ slope + columns / count, slope.sum(0, keepdim=True)])
        return (eta + ratio).sum() / (2 * count) + columns.square().sum() / (2 * count)

    optimizer.step(closure)
    return weights.detach()


@torch.no_grad()
def check_fold(model: GenerativeModel, shape: Any) -> None:
    """Refuse a network that mixes its head's outputs: they have a variance each, not their sums.

    Args:
        model: trained or not; left in the mode it was in.
        shape: of a state, ``(C, ...)``.

    Raises:
        UserError: for such a network.
    """
    net, weight, training = model.net, next(model.parameters()), model.training
    x = torch.zeros(1, *shape, dtype=weight.dtype, device=weight.device)
    y = None if model.condition is None else model.condition.of_samples([0]).to(x.device)
    model.eval()
    output = net.head(net.features(x, x.new_zeros(1), y))
    numbers = torch.arange(output.numel(), device=x.device).to(output)
    folded = net.fold(numbers.view_as(output)).flatten()
    model.train(training)
    if len(folded) != len(numbers) or not torch.equal(folded.sort().values, numbers):
        raise UserError(
            "uncertainty=variance_head gives every output of the head a variance of its own, and "
            f"{type(net).__name__}.fold mixes them; use uncertainty=ensemble"
        )
