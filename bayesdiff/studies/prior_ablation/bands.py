"""Maps under every sigma_noise and prior_precision from sensitivities followed once.

The posterior covariance of an output channel is ``U diag(s) U^T`` with eigenvectors U that no
setting changes, so that the first-order variance of a pixel with sensitivity S to the head is

    V = sum_k s_k a_k,    a_k = (S u_k)^2,

the sum over the eigenvectors of all channels. The a_k are kept by bands of directions with like
s. A band is followed along all of its directions, or along random mixtures
delta = sum z_k sqrt(p_k) u_k with p the s of a reference setting; then
E (S delta)^2 = sum p_k a_k, and another setting rescales it by the band's mean s / p. That is
exact for single directions, at the reference, and wherever s / p is the same over a band.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.laplace.evidence_grid import likelihood_precisions, resolved
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.uncertainty.sensitivities.linearised import follow
from bayesdiff.uncertainty.sensitivities.products import Product
from bayesdiff.uncertainty.start import Start

# Random directions of a band: with fewer bands the weights spread, with more the draws scatter.
_PER_BAND = 4


@dataclass(frozen=True)
class Bands:
    """Directions to follow, and what their squares weigh under K settings.

    Attributes:
        deltas: ``(M, C_out, P)`` float64 weight directions.
        of: ``(M,)``, band of each.
        weights: ``(K, B)`` float64, of the bands' summed squares in the variance; NaN where
            float64 cannot invert the precision.
        spread: ``(K,)``, largest ratio of s / p within a band: 1 where nothing is approximated.
    """

    deltas: Tensor
    of: Tensor
    weights: Tensor
    spread: Tensor

    @classmethod
    def fit(
        cls, posterior: HeadPosterior, sigma: Tensor, tau: Tensor, draws: int, seed: int
    ) -> "Bands":
        """Bands for the settings ``sigma (K,)``, ``tau (K,)`` of the posterior's structure.

        Args:
            posterior: gives eigenvalues and eigenvectors; its own setting is the reference.
            sigma: noise levels.
            tau: prior precisions.
            draws: M, directions in all; fewer where all C_out P of them are fewer.
            seed: of the random mixtures.
        """
        e, prior = likelihood_precisions(posterior, sigma), tau.double()[:, None, None]
        known, precisions = resolved(e + prior), (e + prior).flatten(1)
        shape = posterior.curvature.mean.shape
        own = (posterior.eigenvalues + posterior.prior_precision).expand(shape).flatten()
        parts = split(precisions, max(1, draws // _PER_BAND))
        counts = allocate((e / (e + prior)).flatten(1), parts, draws)
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        of: list[int] = []
        columns: list[Tensor] = []
        spreads: list[Tensor] = []
        for part, count in zip(parts, counts, strict=True):
            ratio = own[part] / precisions[:, part]  # s / p
            deltas = torch.zeros(count, len(own), dtype=torch.float64)
            if count == len(part):
                deltas[range(count), part] = own[part].rsqrt()
                of += range(len(columns), len(columns) + count)
                columns += ratio.unbind(1)
            else:
                noise = torch.randn(count, len(part), generator=generator, dtype=torch.float64)
                deltas[:, part] = noise * own[part].rsqrt()
                of += count * [len(columns)]
                columns.append(ratio.mean(1) / count)
                spreads.append(ratio.amax(1) / ratio.amin(1))
            rows.append(deltas.unflatten(1, shape))
        directions, vectors = torch.cat(rows), posterior.eigenvectors
        return cls(
            directions if vectors is None else directions @ vectors.T,
            torch.tensor(of),
            torch.stack(columns, 1).where(known[:, None], torch.nan),
            torch.stack([torch.ones(len(tau), dtype=torch.float64), *spreads]).amax(0),
        )

    @torch.no_grad()
    def follow(self, start: Start, product: Product, turn: int) -> tuple[Tensor, Tensor]:
        """Images ``(N, C, H, W)`` and the bands' summed squares ``(N, B, C, H, W)``, on the CPU.

        Args:
            start: the batch.
            product: how J d is computed.
            turn: directions followed at once.
        """
        noise, image = start.noise.copy(), torch.zeros(())
        found = []
        for deltas in self.deltas.split(turn):
            followed = follow(replace(start, noise=noise.copy()), deltas, 1.0, product)
            image = followed.states[-1].cpu()
            found.append(followed.sensitivities.cpu().square())
        every = torch.cat(found)
        squares = every.new_zeros(self.weights.shape[1], *every.shape[1:])
        return image, squares.index_add_(0, self.of, every).transpose(0, 1)

    def variance(self, squares: Tensor) -> Tensor:
        """Maps ``(N, K, C, H, W)`` float64 under all settings, from what ``follow`` gave."""
        return torch.einsum("nbchw,kb->nkchw", squares.double(), self.weights)


def split(precisions: Tensor, count: int) -> list[Tensor]:
    """Indices of at most ``count`` bands, equally wide in the logarithm of the precision.

    Args:
        precisions: ``(K, D)`` of every direction under each setting. The setting where they differ
            most decides: in all others the weights within a band are closer to each other.
        count: of bands; empty ones are left out.
    """
    heights = precisions.log()
    height = heights[(heights.amax(1) - heights.amin(1)).argmax()]
    low, high = float(height.min()), float(height.max())
    place = ((height - low) / max(high - low, 1e-12) * count).long().clamp(max=count - 1)
    return [torch.nonzero(place == band)[:, 0] for band in place.unique().tolist()]


def allocate(effective: Tensor, parts: list[Tensor], draws: int) -> list[int]:
    """Directions of every band, ``draws`` in all unless there are fewer.

    A direction's (S u)^2 is about proportional to what the data know of it, so that the share of
    a band in the variance is about its share in the effective parameters. A band gets directions
    for the largest share that it has under any setting, and never more than it has.

    Args:
        effective: ``(K, D)``, effective parameters of every direction, each from 0 to 1.
        parts: indices of each band.
        draws: to be handed out.

    Raises:
        UserError: if there are fewer draws than bands.
    """
    if draws < len(parts):
        raise UserError(f"ablation.draws={draws} are fewer than the {len(parts)} bands; raise it")
    shares = torch.stack([effective[:, part].sum(1) for part in parts], 1)
    wish = (shares / shares.sum(1, keepdim=True).clamp(min=1e-300)).amax(0).tolist()
    limits = [len(part) for part in parts]
    counts = [1] * len(parts)
    for _ in range(min(draws, sum(limits)) - len(parts)):
        need = [
            share / count if count < limit else -1.0
            for share, count, limit in zip(wish, counts, limits, strict=True)
        ]
        counts[need.index(max(need))] += 1
    return counts
