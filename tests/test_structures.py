"""Every structure of the posterior against dense float64 algebra (T1 to T5, T12)."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hand import curvature_of
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace import callback
from bayesdiff.laplace import training_draws as draws_module
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.gradients import gradients, unfolded
from bayesdiff.laplace.gram import gram
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature, TimeBins
from bayesdiff.laplace.structures import STRUCTURES
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT

SIGMA, TAU = 0.3, 2.0
RANK = {"subspace": 7}
EF = ("empirical_fisher", "empirical_fisher_published")
every = pytest.mark.parametrize("structure", STRUCTURES)


def patches(head, features):
    """Rows phi of every pixel of every image, ``(B, pixels, P)``."""
    if isinstance(head, nn.Linear):
        rows = features.flatten(1, -2)
    else:
        k = head.kernel_size[0]
        rows = F.unfold(features, k, padding=k // 2).mT
    return (
        torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], 2) if head.bias is not None else rows
    )


def errors(head, residual):
    """Residuals of every pixel of every image, ``(B, pixels, C)``."""
    if isinstance(head, nn.Linear):
        return residual.flatten(1, -2)
    return residual.flatten(2).mT


def slow_squares(head, features, residual):
    """Squared gradient of half of each image's squared error, one image at a time."""
    total = torch.zeros(head_matrix(head).shape, dtype=torch.float64)
    for phi, r in zip(patches(head, features), errors(head, residual), strict=True):
        total = total + torch.einsum("pc,pk->ck", r, phi).square()
    return total


def slow_gradient(head, features, residual):
    """Gradient of half the squared error of all images."""
    rows, r = patches(head, features).flatten(0, 1), errors(head, residual).flatten(0, 1)
    return r.T @ rows


def example(k=3, bias=True, channels=2, width=3, images=12, spread=0.2):
    torch.manual_seed(0)
    if k:
        head = nn.Conv2d(width, channels, k, padding=k // 2, bias=bias).double()
    else:
        head = nn.Linear(width, channels, bias=bias).double()
    shape = (images, width, 5, 4) if k else (images, 5, width)
    features = torch.randn(shape, dtype=torch.float64) + 0.3
    out = head(features).detach()
    residual = spread * (torch.randn_like(out) + 0.5)
    if channels > 1:  # channels of their own size, so that mixing them up shows
        residual.select(1 if k else -1, 0).mul_(3)
    curvature = curvature_of(head, features, residual)
    truth = slow_gradient(head, features, residual), slow_squares(head, features, residual)
    exact = replace(curvature, gradient=truth[0], squared_gradients=truth[1])
    return head, features, residual, exact


def fit(curvature, structure, **options):
    options = {"sigma_noise": SIGMA, "prior_precision": TAU, "rank": RANK.get(structure)} | options
    return HeadPosterior.fit(curvature, structure=structure, **options)


def dense(structure, head, features, residual, sigma=SIGMA, tau=TAU, rank=7, weight=1.0):
    """Posterior precision ``(C, P, P)`` from the definitions, by loops and textbook algebra."""
    rows = patches(head, features).flatten(0, 1)
    matrix = rows.T @ rows / sigma**2
    squares = slow_squares(head, features, residual)
    channels = len(squares)
    if structure == "diag":
        matrix = matrix.diagonal().diag()
    elif structure == "kron" and head.bias is not None:
        matrix = torch.block_diag(matrix[:-1, :-1], matrix[-1:, -1:])
    elif structure == "prior_only":
        matrix = matrix.trace() / len(matrix) * torch.eye(len(matrix)).double()
    elif structure == "subspace":
        vectors, sizes, _ = torch.linalg.svd(matrix)
        matrix = sum(s * torch.outer(v, v) for s, v in zip(sizes[:rank], vectors.T, strict=False))
    matrix = matrix.expand(channels, -1, -1)
    if structure == "empirical_fisher":
        matrix = (squares / sigma**4).diag_embed()
    elif structure == "empirical_fisher_published":
        matrix = (2 * squares / sigma**2).diag_embed()
    return weight * matrix + tau * torch.eye(matrix.shape[1]).double()


def quadratic(head, features, sigma, ones=1.0):
    """phi^T Sigma phi of every pixel and channel, ``(B, pixels, C)``."""
    phi = patches(head, features)
    if head.bias is not None:
        phi = torch.cat([phi[..., :-1], ones * phi[..., -1:]], 2)
    return torch.einsum("npk,ckl,npl->npc", phi, sigma, phi)


@every
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_precision_covariance_and_variance_equal_dense_algebra(k, bias, structure):
    """T2 for every structure; in float32 to 1e-4."""
    head, features, residual, curvature = example(k, bias)
    rank = min(7, HeadGeometry.of(head).size - 1)
    options = {"rank": rank} if structure == "subspace" else {}
    posterior = fit(curvature, structure, n_eff=36.0, **options)
    precision = dense(structure, head, features, residual, rank=rank, weight=3.0)
    sigma = torch.linalg.inv(precision)
    ours = posterior.precision.expand_as(precision)
    torch.testing.assert_close(ours, precision, rtol=1e-10, atol=1e-8)
    ours = posterior.covariance.expand_as(sigma)
    torch.testing.assert_close(ours, sigma, rtol=1e-9, atol=1e-13)
    assert posterior.covariance.ndim == (3 if structure in EF else 2)
    for ones in (1.0, -0.4):
        fast = posterior.predictive_variance(features, ones)
        channels = fast.shape[1 if k else -1]
        assert channels == (2 if structure in EF else 1)
        expected = quadratic(head, features, sigma, ones)[..., :channels]
        torch.testing.assert_close(errors(head, fast), expected, rtol=1e-10, atol=0)
        single = posterior.predictive_variance(features.float(), ones)
        assert single.dtype == torch.float32
        torch.testing.assert_close(errors(head, single).double(), expected, rtol=1e-4, atol=0)


@every
def test_columns_and_draws_have_the_covariance(structure):
    """Channels never mix; draws within six standard errors of 4000."""
    head, features, _, curvature = example(channels=3)
    posterior = fit(curvature, structure)
    sigma = posterior.covariance.expand(3, 28, 28)
    expected = torch.zeros(3, 28, 3, 28).double()
    for channel in range(3):
        expected[channel, :, channel] = sigma[channel]
    columns = posterior.columns()
    assert columns.shape == (84, 3, 28)
    products = torch.einsum("mcp,mdq->cpdq", columns, columns)
    torch.testing.assert_close(products, expected, rtol=1e-9, atol=1e-15)
    values = torch.einsum("mck,npk->mcnp", columns, patches(head, features)).square().sum(0)
    exact = posterior.predictive_variance(features).expand(-1, 3, -1, -1)
    torch.testing.assert_close(values, exact.flatten(2).transpose(0, 1), rtol=1e-9, atol=0)

    draws = posterior.draw(4000, torch.Generator().manual_seed(0))
    assert draws.shape == (4000, 3, 28) and draws.dtype == torch.float64
    away = (draws - curvature.mean).flatten(1)
    found, wanted = away.T @ away / 4000, expected.reshape(84, 84)
    spread = wanted.diagonal().sqrt()
    assert ((found - wanted) / torch.outer(spread, spread)).abs().max() < 6 * math.sqrt(2 / 4000)
    assert torch.equal(draws, posterior.draw(4000, torch.Generator().manual_seed(0)))


@every
def test_a_prior_of_no_width_leaves_the_trained_weights(structure):
    """T5, the posterior's part."""
    _, features, _, curvature = example()
    certain = fit(curvature, structure, prior_precision=1e60)
    draws = certain.draw(5, torch.Generator().manual_seed(0))
    assert torch.equal(draws, curvature.mean.expand_as(draws))
    assert float(certain.predictive_variance(features).max()) < 1e-50
    assert certain.effective_parameters < 1e-40


@pytest.mark.parametrize("structure", ["full", "diag", "kron", "hessian_free"])
def test_leverages_sum_to_the_effective_parameters(structure):
    """T4, for every structure that sees the Gram matrix's own blocks."""
    head, features, residual, curvature = example()
    posterior = fit(curvature, structure, prior_precision=300.0)
    leverage = float(posterior.predictive_variance(features).sum()) / SIGMA**2
    assert leverage == pytest.approx(posterior.effective_parameters, rel=1e-10)
    matrix = dense(structure, head, features, residual, sigma=1.0, tau=0.0)[0]
    a = torch.linalg.eigvalsh(matrix)
    expected = float((a / (a + 300 * SIGMA**2)).sum())
    assert leverage == pytest.approx(expected, rel=1e-10)
    assert expected < posterior.num_parameters - 0.1


@every
def test_effective_parameters_and_evidence_are_those_of_the_eigenvalues(structure):
    head, features, residual, curvature = example()
    posterior = fit(curvature, structure, prior_precision=40.0)
    precision = dense(structure, head, features, residual, tau=40.0)
    shares = 1 - 40 * torch.linalg.inv(precision).diagonal(dim1=1, dim2=2)
    effective = float(shares.sum(1).mean())
    assert posterior.effective_parameters == pytest.approx(effective, rel=1e-9)
    values = torch.linalg.eigvalsh(precision) - 40
    low, high = posterior.eigenvalue_range
    assert high == pytest.approx(float(values.max()), rel=1e-9)
    assert low == pytest.approx(float(values.min()), rel=1e-6, abs=1e-9)
    if structure == "prior_only":
        with pytest.raises(UserError, match="no evidence"):
            posterior.log_evidence()
        return
    noise = torch.tensor(SIGMA, dtype=torch.float64)
    likelihood = torch.distributions.Normal(0, noise).log_prob(residual).sum()
    mean = curvature.mean
    prior = -20 * mean.square().sum() + 0.5 * mean.numel() * math.log(40)
    expected = float(likelihood + prior - 0.5 * torch.logdet(precision).sum())
    assert posterior.log_evidence() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("structure", ["kron", "subspace", "empirical_fisher"])
def test_the_evidence_prior_beats_a_grid(structure):
    _, _, _, curvature = example()
    best = fit(curvature, structure, prior_precision="evidence")
    steps = torch.logspace(-3, 3, 101).tolist()
    grid = [replace(best, prior_precision=best.prior_precision * x).log_evidence() for x in steps]
    assert grid.index(max(grid)) == 50


def test_kron_is_full_but_for_what_ties_weights_and_bias():
    _, _, _, curvature = example()
    full, kron = (fit(curvature, name).precision for name in ("full", "kron"))
    assert torch.equal(kron[:-1, :-1], full[:-1, :-1]) and kron[-1, -1] == full[-1, -1]
    assert not kron[-1, :-1].any() and full[-1, :-1].abs().min() > 0
    _, features, _, without = example(bias=False)
    full, kron = (fit(without, name).predictive_variance(features) for name in ("full", "kron"))
    assert torch.equal(full, kron)


def test_a_subspace_goes_from_the_prior_to_full():
    _, features, _, curvature = example()
    full = fit(curvature, "full").predictive_variance(features)
    whole = fit(curvature, "subspace", rank=28).predictive_variance(features)
    torch.testing.assert_close(whole, full, rtol=1e-9, atol=0)
    empty = fit(curvature, "subspace", rank=0)
    torch.testing.assert_close(empty.covariance, torch.eye(28).double() / TAU)
    assert empty.effective_parameters == 0
    sums = [
        float(fit(curvature, "subspace", rank=r).predictive_variance(features).sum())
        for r in range(29)
    ]
    assert all(a > b for a, b in zip(sums, sums[1:], strict=False))
    assert fit(curvature, "subspace", rank=5).settings[:2] == ["subspace", 5]


def test_prior_only_has_the_mean_precision_of_full_and_no_direction():
    head, features, _, curvature = example()
    prior, full = (fit(curvature, name) for name in ("prior_only", "full"))
    mean = float(torch.linalg.eigvalsh(full.precision).mean())
    torch.testing.assert_close(prior.precision, mean * torch.eye(28).double())
    norms = patches(head, features).square().sum(2) / mean
    torch.testing.assert_close(prior.predictive_variance(features).flatten(2)[:, 0], norms)


def refit_variance(loss, output, weights, step):
    """|f(refit) - f(weights)| / step, the refit by conjugate gradients; no matrix is formed."""
    gradient = torch.func.grad(loss)
    left = step * torch.func.grad(output)(weights)
    change, direction, size = torch.zeros_like(left), left, float(left.square().sum())
    aim = size * (10 * torch.finfo(left.dtype).eps) ** 2
    for _ in range(10 * weights.numel()):
        if size <= aim:
            break
        bent = torch.func.jvp(gradient, (weights,), (direction,))[1]
        length = size / float((direction * bent).sum())
        change, left = change + length * direction, left - length * bent
        before, size = size, float(left.square().sum())
        direction = left + size / before * direction
    return float((output(weights + change) - output(weights)).abs()) / step


def test_hessian_free_refits_by_gradients_alone_equal_the_closed_form():
    """T12: |f(theta^(l)) - f(theta_hat)| / l = phi^T P^-1 phi for every l."""
    head, features, residual, curvature = example(channels=1)
    posterior = fit(curvature, "hessian_free")
    target = head(features).detach() - residual
    rows = patches(head, features).flatten(0, 1)

    def loss(weights):
        misfit = rows @ weights - errors(head, target).flatten()
        return misfit.square().sum() / (2 * SIGMA**2) + TAU / 2 * weights.square().sum()

    exact = posterior.predictive_variance(features).flatten()
    ridge = torch.linalg.solve(
        posterior.precision, rows.T @ errors(head, target).flatten() / SIGMA**2
    )
    for pixel in (0, 11):
        for start in (ridge, curvature.mean[0]):
            for step in (1e-3, 1.0, 10.0):
                found = refit_variance(loss, lambda w, phi=rows[pixel]: phi @ w, start, step)
                assert found == pytest.approx(float(exact[pixel]), rel=1e-9)
    assert torch.equal(posterior.precision, fit(curvature, "full").precision)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_gradients_are_those_of_autograd(k, bias, monkeypatch):
    head, features, residual, _ = example(k, bias)
    target = head(features).detach() - residual
    expected = []
    for x, y in zip(features.split(1), target.split(1), strict=True):
        head.zero_grad()
        (0.5 * (head(x) - y).square().sum()).backward()
        parts = [head.weight.grad.flatten(1)] + ([head.bias.grad[:, None]] if bias else [])
        expected.append(torch.cat(parts, 1))
    expected = torch.stack(expected)
    found = gradients(head, features, residual)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    single = gradients(head, features.float(), residual.float())
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, expected, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("bayesdiff.laplace.gradients._CHUNK", 1)
    torch.testing.assert_close(gradients(head, features, residual), found)


def test_residuals_of_the_image_go_back_to_the_heads_own_outputs():
    net = UNet(3, 8, None, (4, 8), blocks=1, patch=2)
    output = torch.randn(2, 12, 4, 4)
    with torch.inference_mode():
        back = unfolded(net, output, net.fold(output))
    assert torch.equal(back, output)


def test_the_empirical_fisher_of_white_residuals():
    """T3: s^2 A for the corrected, 2 s^2 A for the published, and their laws in sigma_noise."""
    torch.manual_seed(0)
    head, count, s = nn.Conv2d(3, 1, 3, padding=1).double(), 20_000, 0.4
    features = torch.randn(1, 3, 3, 3, dtype=torch.float64).expand(count, -1, -1, -1)
    residual = s * torch.randn(count, 1, 3, 3, dtype=torch.float64)
    record = replace(
        curvature_of(head, features[:10], residual[:10]),
        gram=gram(head, features),
        num_images=count,
        squared_gradients=gradients(head, features, residual).square().sum(0),
    )

    def ratio(name, sigma):
        posterior = HeadPosterior.fit(record, structure=name, sigma_noise=sigma)
        return posterior.eigenvalues[0] / record.gram.diagonal()

    corrected, published = (ratio(name, 1.0) for name in EF)
    assert float((corrected / s**2 - 1).abs().max()) < 0.03
    assert float((published / (2 * s**2) - 1).abs().max()) < 0.03
    torch.testing.assert_close(ratio(EF[0], 0.1), 1e4 * corrected)
    torch.testing.assert_close(ratio(EF[1], 0.1), 1e2 * published)
    # At the noise level itself the corrected one is the GGN's diagonal.
    assert float((ratio(EF[0], s) * s**2 - 1).abs().max()) < 0.03


def binned(head, features, residual, parts, draws=1):
    """A curvature whose images fell into these intervals of t."""
    bins = [
        (
            gram(head, features[part]),
            residual[part].square().sum(),
            torch.tensor(float(residual[part].numel())).double(),
            slow_squares(head, features[part], residual[part]),
            slow_gradient(head, features[part], residual[part]),
        )
        for part in parts
    ]
    sums = TimeBins(*(torch.stack(values).detach() for values in zip(*bins, strict=True)))
    return replace(curvature_of(head, features, residual), bins=sums)


def test_noise_per_time_weights_the_gram_matrix_by_its_own_precision():
    """Heteroscedastic GGN: the sum over pixels of phi phi^T / sigma^2 of their own time."""
    head, features, residual, _ = example()
    residual[:4] *= 5
    parts = [slice(0, 4), slice(4, 7), slice(7, 12)]
    curvature = binned(head, features, residual, parts)
    posterior = fit(curvature, "full", sigma_noise="mle_per_time")
    expected = TAU * torch.eye(28).double()
    squares, likelihood = 0.0, 0.0
    for part in parts:
        sigma = residual[part].square().mean().sqrt()
        likelihood += torch.distributions.Normal(0, sigma).log_prob(residual[part]).sum()
        squares = squares + slow_squares(head, features[part], residual[part]) / sigma**4
        for phi in patches(head, features[part]).flatten(0, 1):
            expected = expected + torch.outer(phi, phi) / sigma**2
    torch.testing.assert_close(posterior.precision, expected, rtol=1e-10, atol=1e-8)
    mean = curvature.mean
    ratio = torch.logdet(expected) - 28 * math.log(TAU)
    evidence = likelihood - 0.5 * TAU * mean.square().sum() - 0.5 * len(mean) * ratio
    assert posterior.log_evidence() == pytest.approx(float(evidence), rel=1e-10)
    fisher = fit(curvature, "empirical_fisher", sigma_noise="mle_per_time")
    torch.testing.assert_close(fisher.eigenvalues, squares, rtol=1e-10, atol=0)
    again = fit(posterior.curvature, "full", sigma_noise="mle_per_time")
    assert again.settings == posterior.settings
    assert again.curvature.source == posterior.curvature.source != curvature.source
    torch.testing.assert_close(again.precision, expected, rtol=1e-10, atol=1e-8)


@torch.no_grad()
def least_squares(head, features, residual, noise, tau, count=1.0):
    """Regularised optimum ``(C, P)`` by QR; pixels with noise levels of their own."""
    phi, r = patches(head, features).flatten(0, 1), errors(head, residual).flatten(0, 1)
    target = phi @ head_matrix(head).T - r
    scale = math.sqrt(count) / noise
    rows = torch.cat([scale * phi, math.sqrt(tau) * torch.eye(phi.shape[1]).double()])
    right = torch.cat([scale * target, torch.zeros(phi.shape[1], target.shape[1]).double()])
    return torch.linalg.lstsq(rows, right).solution.T


@pytest.mark.parametrize("structure", ["full", "hessian_free"])
@pytest.mark.parametrize(("k", "bias"), [(3, True), (3, False), (1, True), (0, True)])
def test_the_optimum_is_that_of_regularised_least_squares(k, bias, structure):
    head, features, residual, curvature = example(k, bias)
    posterior = fit(curvature, structure, n_eff=30)
    sigma = torch.full((1, 1), SIGMA, dtype=torch.float64)
    expected = least_squares(head, features, residual, sigma, TAU, 30 / 12)
    torch.testing.assert_close(posterior.optimum, expected, rtol=1e-9, atol=1e-11)
    step = (expected - curvature.mean)[:, None]
    distance = (step @ posterior.precision @ step.mT).sum() / step.numel()
    assert posterior.distance == pytest.approx(math.sqrt(float(distance)), rel=1e-9)


def test_a_posterior_draw_lies_at_distance_one_from_the_optimum():
    """Weights that are a draw, with the residuals they give: on average 1."""
    head, features, residual, curvature = example()
    posterior = fit(curvature, "full")
    squares = []
    for draw in posterior.draw(100, torch.Generator().manual_seed(0)) - curvature.mean:
        moved = posterior.optimum + draw
        slope = curvature.gradient + (moved - curvature.mean) @ curvature.gram
        squares.append(fit(replace(curvature, mean=moved, gradient=slope), "full").distance ** 2)
    # The sd of a mean of 100 chi squares over their 56 degrees of freedom is 0.019.
    assert sum(squares) / 100 == pytest.approx(1, abs=0.06)


def test_the_optimum_weights_every_time_by_its_own_noise():
    head, features, residual, _ = example()
    residual[:4] *= 5
    parts = [slice(0, 4), slice(4, 7), slice(7, 12)]
    curvature = binned(head, features, residual, parts)
    noise = torch.cat(
        [residual[p].square().mean().sqrt().expand(len(residual[p]) * 20) for p in parts]
    )
    timed = fit(curvature, "full", sigma_noise="mle_per_time")
    expected = least_squares(head, features, residual, noise[:, None], TAU)
    torch.testing.assert_close(timed.optimum, expected, rtol=1e-9, atol=1e-11)
    plain = fit(curvature, "full", sigma_noise="mle")
    assert float((plain.optimum - expected).abs().max()) > 1e-3


def test_other_matrices_or_no_gradient_have_no_optimum():
    _, _, _, curvature = example()
    for structure in STRUCTURES:
        known = structure in ("full", "hessian_free")
        posterior = fit(curvature, structure)
        assert (posterior.optimum is not None) == (posterior.distance is not None) == known
    without = fit(replace(curvature, gradient=None), "full")
    assert without.optimum is None and without.distance is None


def test_equal_noise_at_all_times_is_plain_mle():
    head, features, residual, _ = example()
    residual[6:] = residual[:6]
    curvature = binned(head, features, residual, [slice(0, 6), slice(6, 12)])
    plain, timed = (fit(curvature, "full", sigma_noise=s) for s in ("mle", "mle_per_time"))
    torch.testing.assert_close(plain.precision, timed.precision)
    assert plain.log_evidence() == pytest.approx(timed.log_evidence(), rel=1e-12)
    assert plain.sigma_noise == pytest.approx(timed.sigma_noise, rel=1e-12)


def test_an_interval_without_images_has_no_say_and_one_without_error_is_refused():
    head, features, residual, _ = example()
    parts = [slice(0, 6), slice(6, 12)]
    curvature = binned(head, features, residual, parts)
    wider = binned(head, features, residual, [*parts, slice(0, 0)])
    assert bool(wider.bins.sigma_mle[2].isnan())
    a, b = (fit(c, "full", sigma_noise="mle_per_time") for c in (curvature, wider))
    torch.testing.assert_close(a.precision, b.precision, rtol=1e-12, atol=0)
    residual[:6] = 0
    with pytest.raises(UserError, match="time bin"):
        fit(binned(head, features, residual, parts), "full", sigma_noise="mle_per_time")


class Double(nn.Module):
    """A U-Net with features and head in float64 that remembers its times."""

    def __init__(self, net):
        super().__init__()
        self.net, self.head, self.seen = net, net.head.double(), []

    def features(self, x, t, y=None):
        features = self.net.features(x, t, y).double()
        self.seen.append((x, t, features))
        return features

    def fold(self, output):
        return self.net.fold(output)


def model_and_images(count=23):
    torch.manual_seed(0)
    net = UNet(1, 8, None, (4, 8), blocks=1, patch=2)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    image = torch.randint(0, 256, (1, 1, 8, 8)).byte()
    model = GenerativeModel(Double(net), CondOT(), "velocity", torch.optim.SGD)
    return model, image.expand(count, -1, -1, -1).contiguous()


def test_the_pass_sums_gradients_and_intervals_of_time():
    """All images alike: noise and residual follow from what the network saw."""
    model, images = model_and_images()
    found = fit_curvature(model, images, None, source="a", batch_size=8, draws=2, time_bins=4)
    head, total = model.net.head, []
    x_1 = images[0].double() / 127.5 - 1
    x_t, t, features = (torch.cat(parts) for parts in zip(*model.net.seen, strict=True))
    wide = t.double().view(-1, 1, 1, 1)
    x_0 = (x_t.double() - wide * x_1) / (1 - wide)
    residual = F.pixel_unshuffle(model.net.fold(head(features).detach()) - (x_1 - x_0), 2)
    for number in range(4):
        chosen = (t * 4).floor() == number
        assert chosen.any()
        rows = patches(head, features[chosen]).flatten(0, 1)
        error = residual[chosen].square().sum()
        squares = slow_squares(head, features[chosen], residual[chosen])
        slope = slow_gradient(head, features[chosen], residual[chosen])
        sums = rows.T @ rows, error, residual[chosen].numel(), squares, slope
        total.append([value / 2 for value in sums])
    for number, (matrix, error, outputs, squares, slope) in enumerate(total):
        bins = found.bins
        torch.testing.assert_close(bins.gram[number], matrix.detach(), rtol=1e-9, atol=1e-9)
        assert float(bins.squared_error[number]) == pytest.approx(float(error), rel=1e-3)
        assert float(bins.num_outputs[number]) == outputs
        torch.testing.assert_close(
            bins.squared_gradients[number], squares, rtol=1e-2, atol=1e-3 * float(squares.max())
        )
        near = 1e-3 * float(slope.abs().max())
        torch.testing.assert_close(bins.gradient[number], slope, rtol=1e-2, atol=near)
    plain = fit_curvature(model, images, None, source="a", batch_size=8, draws=2)
    assert plain.bins is None and float(found.bins.num_outputs.sum()) == found.num_outputs
    torch.testing.assert_close(found.gram, plain.gram, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(found.squared_gradients, plain.squared_gradients)
    torch.testing.assert_close(found.gradient, plain.gradient)
    torch.testing.assert_close(found.gradient, found.bins.gradient.sum(0))
    assert found.squared_error == pytest.approx(plain.squared_error, rel=1e-12)
    summed = sum(squares for *_, squares, _ in total)
    scale = float(summed.max())
    torch.testing.assert_close(plain.squared_gradients, summed, rtol=1e-3, atol=1e-4 * scale)


def test_processes_add_up_to_the_same_gradients_and_intervals(monkeypatch):
    model, images = model_and_images()
    options = {"source": "a", "batch_size": 5, "draws": 2, "time_bins": 3}
    alone = fit_curvature(model, images, None, **options)
    parts = []
    for rank in range(2):
        monkeypatch.setattr(draws_module, "dealt", lambda work, rank=rank: work[rank::2])
        parts.append(fit_curvature(model, images, None, **options))
    summed = sum(part.squared_gradients for part in parts)
    torch.testing.assert_close(summed, alone.squared_gradients, rtol=1e-12, atol=1e-12)
    summed = sum(part.gradient for part in parts)
    torch.testing.assert_close(summed, alone.gradient, rtol=1e-12, atol=1e-12)
    for name in vars(alone.bins):
        ours = sum(getattr(part.bins, name) for part in parts)
        torch.testing.assert_close(ours, getattr(alone.bins, name), rtol=1e-12, atol=1e-10)


def test_gradients_and_intervals_are_kept_in_the_file(tmp_path):
    head, features, residual, _ = example()
    curvature = binned(head, features, residual, [slice(0, 6), slice(6, 12)])
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    back = Curvature.load(path)
    assert torch.equal(back.squared_gradients, curvature.squared_gradients)
    assert torch.equal(back.gradient, curvature.gradient)
    for name, value in vars(curvature.bins).items():
        assert torch.equal(getattr(back.bins, name), value)
    replace(curvature, bins=None).save(path)
    assert Curvature.load(path).bins is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "lowrank"}, "one of full, diag, kron, .*; got 'lowrank'"),
        ({"structure": "subspace"}, "needs laplace.rank"),
        ({"structure": "subspace", "rank": 29}, "rank=29 is more than the 28 weights"),
        ({"structure": "subspace", "rank": -1}, "laplace.rank must be .* got -1"),
        ({"structure": "subspace", "rank": 2.5}, "laplace.rank must be .* got 2.5"),
        ({"structure": "full", "rank": 3}, "rank=3 is for laplace.structure=subspace"),
        ({"sigma_noise": "mle_per_time"}, "set laplace.time_bins"),
        ({"structure": EF[1], "sigma_noise": "mle_per_time"}, "one sigma_noise for all times"),
        ({"structure": "prior_only", "prior_precision": "evidence"}, "a number"),
        ({"sigma_noise": "best"}, "mle or mle_per_time"),
        ({"structure": "empirical_fisher", "prior_precision": -2.0}, "got -2"),
    ],
)
def test_what_a_structure_cannot_have_is_refused_in_one_line(options, words):
    _, _, _, curvature = example()
    with pytest.raises(UserError, match=words) as refusal:
        HeadPosterior.fit(curvature, **options)
    assert "\n" not in str(refusal.value)


def test_curvatures_that_cannot_serve_are_refused_in_one_line():
    _, _, _, curvature = example()
    _, _, _, few = example(images=9)
    cases = [
        (replace(curvature, squared_gradients=None), "empirical_fisher", "no squared gradients"),
        (few, "empirical_fisher", "needs 10 images or more, got 9"),
        (few, "empirical_fisher_published", "needs 10 images or more, got 9"),
    ]
    for record, structure, words in cases:
        with pytest.raises(UserError, match=words) as refusal:
            HeadPosterior.fit(record, structure=structure)
        assert "\n" not in str(refusal.value)
    with pytest.raises(UserError, match="all zero"):
        HeadPosterior.fit(replace(curvature, squared_error=0.0))
    with pytest.raises(UserError, match="squared gradients, got"):
        replace(curvature, squared_gradients=torch.ones(2, 3))
    with pytest.raises(UserError, match="as many gradients, got"):
        replace(curvature, gradient=torch.ones(3, 28))
    for name in ("squared_gradients", "gradient"):
        with pytest.raises(UserError, match="not finite"):
            replace(curvature, **{name: getattr(curvature, name) * math.nan})


@every
def test_fewer_pixels_than_weights_and_hardly_a_prior_is_refused_where_it_is_singular(structure):
    head, features, residual, _ = example(images=10)
    features, residual = 1e4 * features[..., :1, :1], residual[..., :1, :1]
    record = curvature_of(head, features, residual)
    if structure == "prior_only":
        assert fit(record, structure, prior_precision=1e-12).effective_parameters > 0
        return
    with pytest.raises(UserError, match="raise prior_precision"):
        fit(record, structure, prior_precision=1e-12)
    posterior = fit(record, structure, prior_precision=10.0)
    assert bool(posterior.predictive_variance(features).isfinite().all())


@pytest.mark.parametrize(("settings", "said"), [((5, 1e-6), True), ((5, 1e9), False)])
def test_directions_left_to_a_weak_prior_are_remarked_on(settings, said, caplog):
    _, _, _, curvature = example()
    rank, tau = settings
    posterior = fit(curvature, "subspace", rank=rank, prior_precision=tau)
    callback._remark(posterior)
    callback._remark(fit(curvature, "full", prior_precision=tau))
    size = posterior.num_parameters
    assert (f"{size - rank} of {size} directions" in caplog.text) == said
    assert len(caplog.records) == said
