"""A small network that turns a noisy variance map into the map it is a sample of.

It reads what the sampler has computed anyway: the image, the features of the network at a few
evaluations, and the map of a few sensitivities. It learns from images whose target is another,
independent sample of the same variance: with d ~ N(0, V) the likelihood of d alone tells V, and no
clean map is ever needed (the argument of Lehtinen et al. 2018, "Noise2Noise", for a variance).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bayesdiff.machine.progress import track

# Of standardised columns, as shares of the number of images: the live level speaks for itself, the
# many pooled features must say the same in many images.
_PENALTY, _FEATURE_PENALTY = 1e-3, 4.0
FLOOR = 1e-30  # a variance of exactly zero has no logarithm


@dataclass(frozen=True)
class Evidence:
    """What is known of N images before refinement.

    Attributes:
        images: ``(N, C, H, W)``.
        features: ``(N, D, h, w)``, of several evaluations, side by side.
        variance: ``(N, C, H, W)``, mean of the squared sensitivities.
        overlap: ``(N,)``, mean squared cosine between sensitivities: near 1 if one direction
            carries all variance, and the map then is the noisier.
    """

    images: Tensor
    features: Tensor
    variance: Tensor
    overlap: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Evidence":
        return Evidence(*(getattr(self, f.name)[index] for f in fields(self)))

    @classmethod
    def join(cls, parts: "Sequence[Evidence]") -> "Evidence":
        """Several batches as one."""
        return cls(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(cls)))


def overlap(d: Tensor) -> Tensor:
    """Mean squared cosine between different sensitivities ``(M, B, ...)``, per image ``(B,)``."""
    if len(d) < 2:
        return d.new_zeros(d.shape[1])
    flat = F.normalize(d.transpose(0, 1).flatten(2), dim=-1)
    cosines = (flat @ flat.mT).square()
    off = cosines.sum((1, 2)) - cosines.diagonal(dim1=1, dim2=2).sum(1)
    return off / (len(d) * (len(d) - 1))


def evidence(images: Tensor, features: Sequence[Tensor], d: Tensor) -> Evidence:
    """What the refiner reads of a batch with live sensitivities ``d (M, B, C, H, W)``."""
    return Evidence(
        images=images,
        features=torch.cat(list(features), 1).half(),  # precise enough, and small
        variance=d.square().mean(0),
        overlap=overlap(d),
    )


class Level(nn.Module):
    """Logarithm of an image's mean variance, by ridge regression on a summary of the evidence.

    What ranks images is one number of each, and a thousand targets say little about it: closed
    form and a strong penalty on the features use them better than training does.

    Args:
        features: D of the stored features.
    """

    center: Tensor
    weights: Tensor
    constant: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        count = 3 + 2 * features
        self.register_buffer("center", torch.zeros(count))
        self.register_buffer("weights", torch.zeros(count))
        self.register_buffer("constant", torch.tensor(torch.nan))  # not fitted: nothing is missing

    def forward(self, seen: Evidence) -> Tensor:
        """Predictions ``(N,)``."""
        return (summary(seen) - self.center) @ self.weights + self.constant

    def missing(self, refined: Tensor, seen: Evidence) -> Tensor:
        """What a log-variance map ``(N, C, H, W)`` lacks to have this level."""
        if self.constant.isnan():
            return refined.new_zeros(())
        return (self(seen).to(refined.dtype) - level_of(refined))[:, None, None, None]

    @torch.no_grad()
    def fit(self, seen: Evidence, target: Tensor, mean: Tensor) -> None:
        """To sensitivities ``(N, M, C, H, W)``, but for the ``mean`` over images, which is given.

        A few targets of very large variance would decide the mean; ranks do not need it.
        """
        x, total = summary(seen).double(), target.square().flatten(1).mean(1).double()
        y = total.clamp(min=FLOOR).log()
        center, scale = x.mean(0), x.std(0) + 1e-2
        x = (x - center) / scale
        penalty = x.new_full((x.shape[1],), _FEATURE_PENALTY * len(x))
        penalty[:3] = _PENALTY * len(x)
        weights = torch.linalg.solve(x.T @ x + penalty.diag(), x.T @ (y - y.mean()))
        self.center.copy_(center)
        self.weights.copy_(weights / scale)
        self.constant.copy_(mean)


def level_of(log_variance: Tensor) -> Tensor:
    """Logarithm of the mean variance of maps ``(N, C, H, W)``, ``(N,)``."""
    return log_variance.flatten(1).logsumexp(1) - math.log(log_variance[0].numel())


def summary(seen: Evidence) -> Tensor:
    """Numbers of every image ``(N, 3 + 2 D)``: level, unevenness, overlap, pooled features."""
    level = seen.variance.mean((1, 2, 3)).clamp(min=FLOOR)
    uneven = (seen.variance / level[:, None, None, None]).square().mean((1, 2, 3))
    numbers = [level.log(), uneven.clamp(min=1e-6).log(), seen.overlap.clamp(min=1e-6).log()]
    features = seen.features.float()
    return torch.cat([torch.stack(numbers, 1), features.mean((2, 3)), features.std((2, 3))], 1)


class Refiner(nn.Module):
    """Log-variance map from ``Evidence``; untrained, it smooths the live map a little.

    Args:
        channels: C of the images.
        features: D of the stored features.
        patch: pixels per side of one position of the features, H / h.
        width: hidden channels.
    """

    def __init__(self, channels: int, features: int, patch: int, width: int = 32) -> None:
        super().__init__()
        self.patch, pixels = patch, channels * patch**2
        self.normalise = nn.GroupNorm(1, features)
        self.read_features = nn.Conv2d(features, width, 1)
        self.read_maps = nn.Conv2d(4 * pixels, width, 3, padding=1)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.whole = nn.Sequential(
            nn.Linear(2 * features + width + 2, 2 * width),
            nn.SiLU(),
            nn.Linear(2 * width, width + 1),
        )
        self.out = nn.Conv2d(width, 2 * pixels, 1)
        for parameter in [*self.out.parameters(), *self.whole[-1].parameters()]:
            nn.init.zeros_(parameter)
        self.level = Level(features)
        self.register_buffer("helps", torch.ones(()))  # 0: refused, the live map stays as it is
        self.register_buffer("scale", torch.tensor([0.0, 1.0]))  # mean and sd of the log-variance

    def forward(self, seen: Evidence) -> Tensor:
        """Log-variance ``(N, C, H, W)``."""
        if not self.helps:
            return seen.variance.clamp(min=FLOOR).log()
        mean, sd = self.scale.unbind()  # type: ignore[operator]
        log = (seen.variance.clamp(min=FLOOR).log() - mean) / sd
        level = seen.variance.mean((1, 2, 3), keepdim=True).clamp(min=FLOOR)
        level = ((level.log() - mean) / sd).expand_as(log)
        near, far = (_pooled_log(seen.variance, size, mean, sd) for size in (3, 7))
        maps = torch.cat([seen.images, log, near, far], 1)
        features = self.normalise(seen.features.to(log.dtype))
        hidden = self.read_maps(F.pixel_unshuffle(maps, self.patch)) + self.read_features(features)
        hidden = F.silu(hidden)
        hidden = hidden + F.silu(self.first(hidden))
        summary = [features.mean((2, 3)), features.std((2, 3)), hidden.mean((2, 3))]
        numbers = torch.stack([level[:, 0, 0, 0], seen.overlap.clamp(min=1e-6).log()], 1)
        shift = self.whole(torch.cat([*summary, numbers.to(log.dtype)], 1))[:, :, None, None]
        hidden = hidden + F.silu(self.second(hidden + shift[:, :-1]))
        change, blend = F.pixel_shuffle(self.out(hidden), self.patch).chunk(2, 1)
        trust = torch.sigmoid(blend + 1)
        refined = (trust * log + (1 - trust) * near + change + shift[:, -1:]) * sd + mean
        return refined + self.level.missing(refined, seen)


def _pooled_log(variance: Tensor, size: int, mean: Tensor, sd: Tensor) -> Tensor:
    pooled = F.avg_pool2d(variance, size, 1, size // 2, count_include_pad=False)
    return (pooled.clamp(min=FLOOR).log() - mean) / sd


def loss(log_variance: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of sensitivities ``(N, M, C, H, W)``, up to constants.

    Pixel by pixel d ~ N(0, V); the sum over an image, which ranks images, once more as a gamma
    variable of one degree of freedom, whose optimum is the same V.
    """
    pixels = log_variance[:, None] + target.square() * (-log_variance[:, None]).exp()
    total = log_variance.exp().flatten(1).sum(1)
    seen = target.square().mean(1).flatten(1).sum(1)
    return 0.5 * pixels.mean() + 0.5 * (total.log() + seen / total).mean()


def train_refiner(
    seen: Evidence, target: Tensor, *, patch: int, epochs: int, seed: int, batch: int = 32
) -> Refiner:
    """Fit a refiner to N images with M independent sensitivities each, ``(N, M, C, H, W)``."""
    with torch.random.fork_rng():  # a caller's own draws go on as if nothing had happened
        torch.manual_seed(seed)
        return _train(seen, target, patch, epochs, batch)


def _train(seen: Evidence, target: Tensor, patch: int, epochs: int, batch: int) -> Refiner:
    refiner = Refiner(seen.images.shape[1], seen.features.shape[1], patch).to(seen.images.device)
    log = seen.variance.clamp(min=FLOOR).log()
    refiner.scale.copy_(torch.stack([log.mean(), log.std()]))  # type: ignore[operator]
    optimizer = torch.optim.AdamW(refiner.parameters(), weight_decay=1e-2)
    steps = epochs * max(1, len(target) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps + 1)
    for _ in track(range(epochs), "refiner", "epochs"):
        order = torch.randperm(len(target), device=target.device)
        for index in order[: max(1, len(order) // batch) * batch].split(batch):
            optimizer.zero_grad()
            loss(refiner(seen[index]), target[index]).backward()
            optimizer.step()
            schedule.step()
    refiner.eval()
    with torch.no_grad():
        refiner.level.fit(seen, target, level_of(refiner(seen)).mean())
    return refiner
