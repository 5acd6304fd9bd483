"""The head's posterior against dense float64 algebra (spec T1, T2, T4, T12)."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.directions import orthogonal_rows
from bayesdiff.laplace.gram import gram
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import CondOT


def patches(head, features):
    if isinstance(head, nn.Linear):
        rows = features.flatten(0, -2)
    else:
        k = head.kernel_size[0]
        rows = F.unfold(features, k, padding=k // 2).transpose(1, 2).flatten(0, 1)
    ones = rows.new_ones(len(rows), 1)
    return torch.cat([rows, ones], 1) if head.bias is not None else rows


def conv(width, channels=1, k=3, bias=True):
    return nn.Conv2d(width, channels, k, padding=k // 2, bias=bias).double()


@torch.no_grad()
def curvature_of(head, features, target, draws=1):
    return Curvature(
        gram=gram(head, features) / draws,
        num_images=len(features) // draws,
        draws=draws,
        squared_error=float((head(features) - target).square().sum()) / draws,
        num_outputs=target.numel() // draws,
        mean=head_matrix(head),
        source="checkpoint-a",
        geometry=HeadGeometry.of(head),
    )


def example(width=3, channels=2, k=3, bias=True, images=6, size=7):
    torch.manual_seed(0)
    head = conv(width, channels, k, bias) if k else nn.Linear(width, channels, bias=bias).double()
    shape = (images, width, size, size - 1) if k else (images, size, width)
    features = torch.randn(shape, dtype=torch.float64) + 0.3
    target = head(features).detach()
    target = target + 0.2 * torch.randn_like(target)
    return head, features, curvature_of(head, features, target)


def test_ggn_equals_the_autograd_hessian_and_ignores_the_targets():
    """T1: the Hessian of the Gaussian NLL is I_C (x) G / sigma^2."""
    torch.manual_seed(0)
    head, sigma = conv(2, 2), 0.7
    features = torch.randn(3, 2, 5, 6, dtype=torch.float64)
    expected = torch.block_diag(*[gram(head, features) / sigma**2] * 2)
    for _ in range(2):
        target = torch.randn(3, 2, 5, 6, dtype=torch.float64)

        def loss(matrix, target=target):
            out = patches(head, features) @ matrix.reshape(2, -1).T
            truth = target.permute(0, 2, 3, 1).flatten(0, 2)
            return (out - truth).square().sum() / (2 * sigma**2)

        hessian = torch.autograd.functional.hessian(loss, head_matrix(head).flatten())
        assert (hessian - expected).abs().max() < 1e-10


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3, 5])
def test_variance_equals_the_dense_quadratic_form(k, bias, structure):
    """T2, closed form; in float32 to 1e-4."""
    head, features, curvature = example(k=k, bias=bias)
    posterior = HeadPosterior.fit(
        curvature, structure=structure, sigma_noise=0.3, prior_precision=2.0
    )
    rows = patches(head, features[:2])
    precision = curvature.gram / 0.3**2
    if structure == "diag":
        precision = precision.diagonal().diag()
    sigma = torch.linalg.inv(precision + 2.0 * torch.eye(len(precision), dtype=torch.float64))
    torch.testing.assert_close(posterior.covariance, sigma, rtol=1e-9, atol=1e-14)
    for ones in (1.0, -0.4):
        scaled = torch.cat([rows[:, :-1], ones * rows[:, -1:]], 1) if bias else rows
        expected = ((scaled @ sigma) * scaled).sum(1)
        fast = posterior.predictive_variance(features[:2], ones)
        axis = 1 if k else -1
        assert fast.shape[axis] == 1
        torch.testing.assert_close(fast.flatten(), expected, rtol=1e-10, atol=0)
        single = posterior.predictive_variance(features[:2].float(), ones)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.flatten().double(), expected, rtol=1e-4, atol=0)


def test_float32_variance_survives_eigenvalues_over_six_decades():
    """Correlated features as a U-Net gives them, in several chunks."""
    torch.manual_seed(0)
    head = conv(16)
    scales = torch.logspace(0, -2.5, 16, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q
    latent = torch.randn(70, 16, 30, 30, dtype=torch.float64) * scales[:, None, None]
    latent = F.avg_pool2d(latent, 3, stride=1)
    features = torch.einsum("ij,bjhw->bihw", mix, latent).float().double()
    posterior = HeadPosterior.fit(
        curvature_of(head, features, torch.zeros(70, 1, 28, 28)), sigma_noise=0.2
    )
    low, high = posterior.eigenvalue_range
    assert high / low > 1e6
    exact = posterior.predictive_variance(features)
    single = posterior.predictive_variance(features.float()).double()
    torch.testing.assert_close(single, exact, rtol=1e-4, atol=0)
    bfloat = posterior.predictive_variance(features.bfloat16())
    assert bfloat.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(posterior.predictive_variance(features.float()).double(), single)


def test_draws_have_the_posterior_moments_and_predict_the_variance():
    """T2, Monte Carlo: 4 standard errors for 99.9 % of pixels, channels uncorrelated."""
    head, features, curvature = example(images=2)
    for structure in ("full", "diag"):
        posterior = HeadPosterior.fit(curvature, structure=structure, sigma_noise=0.5)
        generator = torch.Generator().manual_seed(0)
        draws = posterior.draw(4000, generator)
        assert draws.shape == (4000, 2, 28) and draws.dtype == torch.float64
        values = torch.einsum("mcp,np->mcn", draws - curvature.mean, patches(head, features))
        exact = posterior.predictive_variance(features).flatten()
        ratio = values.square().mean(0) / exact
        within = ((ratio - 1).abs() < 4 * math.sqrt(2 / 3999)).double().mean()
        assert within >= 0.999
        correlation = (values[:, 0] * values[:, 1]).mean(0) / exact
        assert correlation.abs().max() < 5 / math.sqrt(4000)
        covariance = torch.cov((draws[:, 0]).T)
        spread = posterior.covariance.diagonal()
        error = (covariance - posterior.covariance) / (spread[:, None] * spread).sqrt()
        assert error.abs().max() < 6 / math.sqrt(4000)
        again = posterior.draw(4000, torch.Generator().manual_seed(0))
        assert torch.equal(again, draws)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_columns_are_directions_whose_squares_sum_to_the_covariance(structure):
    """One channel each, none correlated with another's; their outputs give T2's variance."""
    head, features, curvature = example(channels=3, images=2)
    posterior = HeadPosterior.fit(curvature, structure=structure, sigma_noise=0.5)
    columns = posterior.columns()
    assert columns.shape == (3 * 28, 3, 28) and columns.dtype == torch.float64
    products = torch.einsum("mcp,mdq->cpdq", columns, columns)
    for c in range(3):
        for d in range(3):
            expected = posterior.covariance if c == d else torch.zeros(28, 28).double()
            torch.testing.assert_close(products[c, :, d], expected, rtol=1e-10, atol=1e-16)
    if structure == "full":
        dense = torch.linalg.inv(posterior.precision)
        torch.testing.assert_close(products[1, :, 1], dense, rtol=1e-9, atol=1e-14)
    values = torch.einsum("mcp,np->mcn", columns, patches(head, features))
    exact = posterior.predictive_variance(features).flatten().expand(3, -1)
    torch.testing.assert_close(values.square().sum(0), exact, rtol=1e-10, atol=0)


def test_leverage_sums_to_the_effective_number_of_parameters():
    """T4."""
    _, features, curvature = example()
    posterior = HeadPosterior.fit(curvature, sigma_noise=0.9, prior_precision=30.0)
    leverage = float(posterior.predictive_variance(features).sum()) / 0.9**2
    assert leverage == pytest.approx(posterior.effective_parameters, rel=1e-10)
    a = torch.linalg.eigvalsh(curvature.gram)
    assert leverage == pytest.approx(float((a / (a + 30 * 0.9**2)).sum()), rel=1e-10)
    assert leverage < posterior.num_parameters == 28


def test_limits_of_a_large_and_a_small_prior_and_of_twice_the_data():
    """T4."""
    head, features, curvature = example()
    rows = patches(head, features)
    strong = HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1e12)
    norms = rows.square().sum(1) / 1e12
    assert torch.allclose(strong.predictive_variance(features).flatten(), norms, rtol=1e-6)
    weak = HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1e-9)
    mean = float(weak.predictive_variance(features).mean())
    assert mean == pytest.approx(28 / len(rows), rel=1e-9)
    images = 2.0 * curvature.num_images
    twice = HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1e-9, n_eff=images)
    assert float(twice.predictive_variance(features).mean()) == pytest.approx(mean / 2, rel=1e-9)
    same = HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1e12, n_eff=images)
    assert torch.allclose(same.predictive_variance(features).flatten(), norms, rtol=1e-6)


def test_draws_follow_the_data_and_not_the_signs_of_eigenvectors():
    """Rounding turns eigenvectors of equal eigenvalues anywhere; draws must not turn with them."""
    head, features, curvature = example()
    size = len(curvature.gram)
    noise = torch.rand(size, size, generator=torch.Generator().manual_seed(1)).double()
    level = float(curvature.gram.diagonal().mean())
    grams = [level * (torch.eye(size).double() + k * (noise + noise.T)) for k in (0.0, 1e-13)]
    one, two = (
        HeadPosterior.fit(replace(curvature, gram=gram), sigma_noise=0.5) for gram in grams
    )
    assert not torch.allclose(one.eigenvectors.abs(), two.eigenvectors.abs(), atol=0.1)
    first, second = (each.draw(3, torch.Generator().manual_seed(0)) for each in (one, two))
    torch.testing.assert_close(first, second, rtol=0, atol=1e-9)


def test_two_draws_per_image_leave_the_posterior_as_wide_as_one():
    head, features, _ = example()
    target = torch.zeros_like(head(features))
    once = curvature_of(head, features, target)
    both = torch.cat([features, features])
    twice = curvature_of(head, both, torch.cat([target, target]), draws=2)
    assert twice.num_images == once.num_images
    a, b = (HeadPosterior.fit(c, sigma_noise=0.4) for c in (once, twice))
    torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-10, atol=0)
    assert a.log_evidence() == pytest.approx(b.log_evidence(), rel=1e-12)


def test_variance_falls_with_the_prior_and_rises_with_the_noise():
    _, features, curvature = example()
    for name, sign in (("prior_precision", -1), ("sigma_noise", 1)):
        sums = [
            float(
                HeadPosterior.fit(curvature, **{"sigma_noise": 1.0, name: value})
                .predictive_variance(features)
                .sum()
            )
            for value in (0.01, 0.1, 1.0, 10.0, 100.0)
        ]
        assert all(sign * (b - a) > 0 for a, b in zip(sums, sums[1:], strict=False))


def test_hessian_free_refits_equal_the_closed_form():
    """T12: |f(theta^(l)) - f(theta_hat)| / l = phi^T P^-1 phi for every l."""
    head, features, curvature = example(channels=1)
    posterior = HeadPosterior.fit(curvature, sigma_noise=0.6, prior_precision=1.5)
    target = torch.randn(len(patches(head, features)), dtype=torch.float64)
    rows = patches(head, features)
    pull = rows.T @ target / 0.6**2
    best = torch.linalg.solve(posterior.precision, pull)
    exact = posterior.predictive_variance(features).flatten()[11]
    for step in (1e-3, 1.0, 10.0):
        moved = torch.linalg.solve(posterior.precision, pull + step * rows[11])
        change = float((rows[11] @ (moved - best)).abs()) / step
        assert change == pytest.approx(float(exact), rel=1e-9)


def test_evidence_is_the_integral_over_the_weights():
    """Exact regression: with the mean at the ridge solution, log N(y; 0, s^2 I + R R^T / tau)."""
    torch.manual_seed(0)
    head, tau, sigma = conv(2, 1, 1), 1.7, 0.5
    features = torch.randn(2, 2, 4, 3, dtype=torch.float64)
    rows = patches(head, features)
    target = torch.randn(2, 1, 4, 3, dtype=torch.float64)
    flat = target.permute(0, 2, 3, 1).flatten()
    precision = rows.T @ rows / sigma**2 + tau * torch.eye(3, dtype=torch.float64)
    ridge = torch.linalg.solve(precision, rows.T @ flat / sigma**2)
    head.weight.data, head.bias.data = ridge[:2].reshape(1, 2, 1, 1), ridge[2:]
    posterior = HeadPosterior.fit(
        curvature_of(head, features, target), sigma_noise=sigma, prior_precision=tau
    )
    covariance = sigma**2 * torch.eye(len(flat), dtype=torch.float64) + rows @ rows.T / tau
    normal = torch.distributions.MultivariateNormal(torch.zeros_like(flat), covariance)
    assert posterior.log_evidence() == pytest.approx(float(normal.log_prob(flat)), rel=1e-12)


class Regression(GenerativeModel):
    """States are features beside what is to be predicted from them; nothing is corrupted."""

    def corrupt(self, x_1, x_0, t):
        return x_1, x_1


class Frozen(nn.Module):
    """The first values of a state are the features."""

    def __init__(self, width, outputs):
        super().__init__()
        self.head = nn.Linear(width, outputs).double()

    def features(self, x, t, y=None):
        return x[:, : self.head.in_features]

    def fold(self, output):
        return output


def test_intervals_of_a_regression_cover_the_weights_that_made_its_data():
    """Features that are frozen: the ridge's closed form, and 95 % intervals over 2000 data sets.

    Each output channel is a data set of its own, with weights drawn from the prior.
    """
    torch.manual_seed(0)
    images, width, repeats, tau, sigma = 40, 5, 2000, 1.7, 0.8
    phi = torch.randn(images + 3, width, dtype=torch.float64)
    rows = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
    truth = torch.randn(repeats, width + 1, dtype=torch.float64) / math.sqrt(tau)
    clean = rows @ truth.T
    noisy = clean + sigma * torch.randn_like(clean)
    states = torch.cat([phi, noisy], 1)[:images]
    model = Regression(Frozen(width, width + repeats), CondOT(), "velocity", torch.optim.SGD)
    curvature = fit_curvature(model, states, None, source="regression", encode=lambda x: x)
    posterior = HeadPosterior.fit(curvature, sigma_noise=sigma, prior_precision=tau)
    seen = rows[:images]
    precision = seen.T @ seen / sigma**2 + tau * torch.eye(width + 1, dtype=torch.float64)
    ridge = torch.linalg.solve(precision, seen.T @ noisy[:images] / sigma**2).T
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(posterior.optimum[width:], ridge, **close)
    torch.testing.assert_close(posterior.covariance, torch.linalg.inv(precision), **close)
    of_weights = posterior.covariance.diagonal().sqrt()
    of_outputs = posterior.predictive_variance(phi[images:]).sqrt()  # where no data were
    away = (ridge - truth).abs() / of_weights, (rows[images:] @ ridge.T - clean[images:]).abs()
    for distance in (away[0], away[1] / of_outputs):
        assert float((distance < 1.959964).double().mean()) == pytest.approx(0.95, abs=0.01)


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("sigma", [0.05, 1.0, 40.0])
def test_evidence_prior_beats_a_dense_grid(structure, sigma):
    _, _, curvature = example()
    options = {"structure": structure, "sigma_noise": sigma}
    best = HeadPosterior.fit(curvature, prior_precision="evidence", **options)
    grid = [
        HeadPosterior.fit(curvature, prior_precision=float(tau), **options).log_evidence()
        for tau in best.prior_precision * torch.logspace(-3, 3, 201)
    ]
    assert max(grid) <= best.log_evidence() + 1e-9 * abs(best.log_evidence())
    assert grid.index(max(grid)) == 100


def test_mle_noise_is_the_root_mean_squared_residual():
    _, _, curvature = example(images=30, size=12)
    assert curvature.sigma_mle == pytest.approx(0.2, rel=0.05)
    posterior = HeadPosterior.fit(curvature, sigma_noise="mle")
    assert posterior.sigma_noise == curvature.sigma_mle


def test_one_eigendecomposition_serves_a_sweep(monkeypatch):
    _, _, curvature = example()
    calls, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrix: calls.append(1) or eigh(matrix))
    for sigma in (0.1, 1.0):
        for tau in (0.1, 10.0, "evidence"):
            HeadPosterior.fit(curvature, sigma_noise=sigma, prior_precision=tau).log_evidence()
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "lowrank"}, "full, diag"),
        ({"sigma_noise": 0.0}, "sigma_noise"),
        ({"sigma_noise": "best"}, "mle"),
        ({"prior_precision": -1.0}, "evidence"),
        ({"prior_precision": math.inf}, "prior_precision"),
        ({"n_eff": math.nan}, "n_eff"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(options, words):
    _, _, curvature = example()
    with pytest.raises(UserError, match=words) as refusal:
        HeadPosterior.fit(curvature, **options)
    assert "\n" not in str(refusal.value)


def test_a_singular_precision_is_refused_and_a_prior_mends_it():
    head = conv(3, 1, 1)
    features = torch.randn(1, 3, 1, 2, dtype=torch.float64) * 1e4
    curvature = curvature_of(head, features, torch.zeros(1, 1, 1, 2))
    with pytest.raises(UserError, match="raise prior_precision"):
        HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1e-12)
    posterior = HeadPosterior.fit(curvature, sigma_noise=1.0, prior_precision=1.0)
    assert torch.isfinite(posterior.predictive_variance(features)).all()


def test_evidence_without_weights_or_features_is_refused():
    head, features, _ = example(k=1, bias=False)
    for broken in (copy.deepcopy(head), head):
        if broken is not head:
            broken.weight.data.zero_()
        inputs = features if broken is not head else features * 0
        record = curvature_of(broken, inputs, broken(inputs).detach() + 1)
        with pytest.raises(UserError, match="give a number"):
            HeadPosterior.fit(record, prior_precision="evidence")


def test_a_saved_curvature_comes_back_equal(tmp_path):
    _, _, curvature = example()
    path = tmp_path / "run" / "curvature.safetensors"
    curvature.save(path)
    back = Curvature.load(path)
    assert torch.equal(back.gram, curvature.gram) and torch.equal(back.mean, curvature.mean)
    for name in ("num_images", "draws", "squared_error", "num_outputs", "source", "geometry"):
        assert getattr(back, name) == getattr(curvature, name)
    assert [file.name for file in path.parent.iterdir()] == ["curvature.safetensors"]
    back.require_source("checkpoint-a")
    with pytest.raises(UserError, match="checkpoint-a, not from checkpoint-b"):
        back.require_source("checkpoint-b")


def test_a_crash_while_saving_keeps_the_old_file(tmp_path, monkeypatch):
    _, _, curvature = example()
    path = tmp_path / "curvature.safetensors"
    curvature.save(path)
    before = path.read_bytes()

    def crash(tensors, file, metadata):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("bayesdiff.storage.checked_file.save_file", crash)
    with pytest.raises(KeyboardInterrupt):
        curvature.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_broken_files_are_refused_in_one_line(tmp_path):
    from safetensors.torch import save_file

    _, _, curvature = example()
    good = tmp_path / "good.safetensors"
    curvature.save(good)
    data = good.read_bytes()
    flipped = bytearray(data)
    flipped[-9] ^= 1
    broken = {"cut": data[:-100], "short": data[:5], "empty": b"", "text": b"hello" * 50}
    broken["flipped"] = bytes(flipped)
    for name, content in broken.items():
        (tmp_path / name).write_bytes(content)
    save_file({"gram": torch.zeros(2, 2)}, tmp_path / "foreign")
    metadata = {"format": "bayesdiff-curvature-9"}
    save_file({"gram": torch.zeros(2, 2)}, tmp_path / "later", metadata)
    for name in [*broken, "foreign", "later", "missing"]:
        with pytest.raises(UserError) as refusal:
            Curvature.load(tmp_path / name)
        assert name in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_curvature_with_wrong_shapes_or_values_is_refused():
    _, _, curvature = example()

    with pytest.raises(UserError, match="28 x 28"):
        replace(curvature, gram=curvature.gram[:5, :5])
    with pytest.raises(UserError, match="not finite"):
        replace(curvature, gram=curvature.gram * math.nan)


def test_orthogonal_draws_share_nothing_and_average_the_covariance():
    """Rows of length sqrt(D) at right angles, in groups of D; uniform over all directions."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 7, 1, 3, dtype=torch.float64, generator=generator)
    rows = torch.stack([orthogonal_rows(each) for each in noise]).flatten(2)
    products = rows @ rows.mT
    for part in (slice(0, 3), slice(3, 6)):
        truth = 3 * torch.eye(3, dtype=torch.float64).expand(2000, 3, 3)
        torch.testing.assert_close(products[:, part, part], truth, rtol=0, atol=1e-10)
    assert products[:, 0, 3].abs().mean() > 0.5
    for number in range(7):
        own = rows[:, number]
        apart = own.T @ own / 2000 - torch.eye(3, dtype=torch.float64)
        assert apart.abs().max() < 0.1 and own.mean(0).abs().max() < 0.1
