"""Our curvature and posterior against laplace-torch's own GGN on the same small head."""

import copy
import math

import pytest
import torch
from hand import curvature_of
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from bayesdiff.checks import UserError
from bayesdiff.laplace.head import head_matrix
from bayesdiff.laplace.posterior import HeadPosterior


@pytest.fixture(autouse=True)
def double():
    """The library multiplies its GGN with an identity of the default dtype; float32 loses 1e-8."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


HEADS = {
    "conv": lambda: nn.Conv2d(2, 2, 3, padding=1),
    "conv_without_bias": lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False),
    "pixelwise": lambda: nn.Conv2d(3, 1, 1),
    "linear": lambda: nn.Linear(4, 3),
    "tokens": lambda: nn.Linear(3, 2),
}
SHAPES = {"linear": (4,), "tokens": (5, 3), "pixelwise": (3, 4, 5)}


def example(name):
    torch.manual_seed(0)
    head = HEADS[name]().double()
    features = torch.randn(12, *SHAPES.get(name, (2, 4, 5)), dtype=torch.float64)
    out = head(features).detach()
    target = (out + 0.3 * torch.randn_like(out)).flatten(1)
    return head, features, target


def library(head, features, target, structure, backend=None):
    """laplace-torch fitted by its own means; half batches, so that sums over batches count."""
    from laplace import Laplace

    model = nn.Sequential(head, nn.Flatten())
    fitted = Laplace(
        model,
        "regression",
        subset_of_weights="all",
        hessian_structure=structure,
        sigma_noise=0.3,
        prior_precision=2.0,
        **({} if backend is None else {"backend": backend}),
    )
    fitted.fit(DataLoader(TensorDataset(features, target), batch_size=3))
    return fitted


def posterior_of(head, features, target, structure, rank=None):
    residual = (head(features).detach().flatten(1) - target).view_as(head(features))
    return HeadPosterior.fit(
        curvature_of(head, features, residual),
        structure=structure,
        sigma_noise=0.3,
        prior_precision=2.0,
        rank=rank,
    )


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


def to_laplace(posterior, head):
    """The same posterior as a fitted laplace-torch object in float64."""
    from laplace import DiagLaplace, FullLaplace

    from bayesdiff.laplace.backend import HeadGGN, parameter_order

    curvature, order = posterior.curvature, parameter_order(head)
    mean, size = curvature.mean.flatten()[order], len(curvature.mean)
    model = nn.Sequential(copy.deepcopy(head).double(), nn.Flatten())
    nn.utils.vector_to_parameters(mean, model.parameters())
    copied = (DiagLaplace if posterior.is_diagonal else FullLaplace)(
        model,
        "regression",
        sigma_noise=posterior.sigma_noise,
        prior_precision=posterior.prior_precision,
        backend=HeadGGN,
    )
    # It keeps sigma^2 times the likelihood's precision.
    if posterior.is_diagonal:
        data = posterior.eigenvalues.expand(curvature.mean.shape).flatten()
    else:
        data = torch.block_diag(*[posterior.likelihood_precision] * size)[:, order]
    copied.H, copied.mean = posterior.sigma_noise**2 * data[order], mean
    weight = posterior.n_eff / curvature.num_images
    copied.loss = torch.tensor(weight * curvature.squared_error / 2, dtype=mean.dtype)
    copied.n_data, copied.n_outputs = (
        posterior.n_eff,
        curvature.num_outputs // curvature.num_images,
    )
    return copied


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", HEADS)
def test_backend_gives_laplace_torch_its_own_curvature(name, structure):
    from bayesdiff.laplace.backend import HeadGGN

    head, features, target = example(name)
    theirs = library(head, features, target, structure)
    ours = library(head, features, target, structure, HeadGGN)
    close(ours.H, theirs.H)
    close(ours.loss, theirs.loss)
    close(ours.posterior_precision, theirs.posterior_precision)
    close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("name", HEADS)
def test_posterior_and_its_laplace_torch_copy_equal_the_library(name, structure):
    head, features, target = example(name)
    theirs = library(head, features, target, structure)
    posterior = posterior_of(head, features, target, structure)
    copied = to_laplace(posterior, head)
    assert type(copied) is type(theirs)
    close(copied.posterior_precision, theirs.posterior_precision)
    close(copied.mean, theirs.mean)
    evidence = theirs.log_marginal_likelihood()
    close(copied.log_marginal_likelihood(), evidence)
    assert posterior.log_evidence() == pytest.approx(float(evidence), rel=1e-9)

    mean, variance = theirs(features, diagonal_output=True)
    close(copied(features, diagonal_output=True)[1], variance)
    close(mean, head(features).flatten(1).detach())
    closed = posterior.predictive_variance(features).expand_as(head(features)).flatten(1)
    close(closed, variance)


def test_the_copy_keeps_the_rest_of_the_library_working():
    head, features, target = example("conv")
    before = head_matrix(head)
    posterior = posterior_of(head, features, target, "full")
    copied = to_laplace(posterior, head)
    close(
        copied.posterior_covariance, library(head, features, target, "full").posterior_covariance
    )
    other = to_laplace(posterior, head)
    other.load_state_dict(copied.state_dict())
    close(other.posterior_precision, copied.posterior_precision)
    samples = copied.predictive_samples(features, pred_type="nn", n_samples=20)
    assert samples.shape == (20, *target.shape)
    best = HeadPosterior.fit(posterior.curvature, sigma_noise=0.3, prior_precision="evidence")
    tau = torch.tensor(best.prior_precision, requires_grad=True)
    evidence = copied.log_marginal_likelihood(prior_precision=tau)
    assert best.log_evidence() == pytest.approx(float(evidence.detach()), rel=1e-9)
    (slope,) = torch.autograd.grad(evidence, tau)
    assert abs(float(slope)) < 1e-9
    assert torch.equal(head_matrix(head), before)


def test_a_weighted_posterior_keeps_its_weight_in_the_copy():
    head, features, target = example("conv")
    curvature = posterior_of(head, features, target, "full").curvature
    posterior = HeadPosterior.fit(curvature, sigma_noise=0.3, prior_precision=2.0, n_eff=120.0)
    copied = to_laplace(posterior, head)
    assert posterior.log_evidence() == pytest.approx(
        float(copied.log_marginal_likelihood()), rel=1e-9
    )
    precision = copied.posterior_precision[:18, :18]
    close(precision, posterior.precision[:18, :18])


@pytest.mark.parametrize("name", ["linear", "pixelwise", "conv", "conv_without_bias"])
def test_the_published_empirical_fisher_is_that_of_the_librarys_backend(name):
    """Diagonal, one image a sample: the backend of the published last-layer posteriors."""
    from laplace.curvature import BackPackEF

    head, features, target = example(name)
    # It leaves hooks behind in the layer.
    theirs = library(copy.deepcopy(head), features, target, "diag", BackPackEF)
    posterior = posterior_of(head, features, target, "empirical_fisher_published")
    copied = to_laplace(posterior, head)
    close(copied.posterior_precision, theirs.posterior_precision)
    evidence = float(theirs.log_marginal_likelihood())
    assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-9)
    assert float(copied.log_marginal_likelihood()) == pytest.approx(evidence, rel=1e-9)
    _, variance = copied(features, diagonal_output=True)
    close(posterior.predictive_variance(features).flatten(1), variance)
    corrected = posterior_of(head, features, target, "empirical_fisher")
    close(corrected.eigenvalues, posterior.eigenvalues / (2 * 0.3**2))


def test_kron_is_the_librarys_where_it_factors_exactly():
    """One output vector per sample: KFAC of weights and of bias, each exact."""
    from laplace.curvature import CurvlinopsGGN

    head, features, target = example("linear")
    theirs = library(head, features, target, "kron", CurvlinopsGGN)
    posterior = posterior_of(head, features, target, "kron")
    full = posterior_of(head, features, target, "full")
    _, variance = theirs(features, diagonal_output=True)
    closed = posterior.predictive_variance(features)
    close(closed.expand_as(variance), variance)
    assert (full.predictive_variance(features) - closed).abs().max() > 1e-4
    evidence = float(theirs.log_marginal_likelihood())
    assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-9)


@pytest.mark.parametrize("structure", ["kron", "subspace", "prior_only", "hessian_free"])
@pytest.mark.parametrize("name", ["conv", "conv_without_bias", "tokens"])
def test_every_structure_goes_into_a_copy(name, structure):
    head, features, target = example(name)
    rank = 3 if structure == "subspace" else None
    posterior = posterior_of(head, features, target, structure, rank)
    copied = to_laplace(posterior, head)
    _, variance = copied(features, diagonal_output=True)
    closed = posterior.predictive_variance(features).expand_as(head(features)).flatten(1)
    close(closed, variance)
    if posterior.has_evidence:
        evidence = float(copied.log_marginal_likelihood())
        assert posterior.log_evidence() == pytest.approx(evidence, rel=1e-9)


def test_a_subspace_is_the_librarys_low_rank_posterior():
    """Its own algebra on the leading eigenvectors; its fit needs a package that is long gone."""
    from laplace import LowRankLaplace
    from laplace.baselaplace import ParametricLaplace

    class LowRank(LowRankLaplace):
        def __init__(self, *args, **options):
            ParametricLaplace.__init__(self, *args, **options)

    head, features, target = example("conv_without_bias")
    exact = library(head, features, target, "full")
    low = LowRank(
        nn.Sequential(head, nn.Flatten()), "regression", sigma_noise=0.3, prior_precision=2.0
    )
    values, vectors = torch.linalg.eigh(exact.H)
    rank = 5  # of each of two output channels
    low.H, low.mean = (vectors[:, -2 * rank :], values[-2 * rank :]), exact.mean
    posterior = posterior_of(head, features, target, "subspace", rank)
    jacobians, _ = exact.backend.jacobians(features)
    variance = low.functional_variance(jacobians).diagonal(dim1=1, dim2=2)
    closed = posterior.predictive_variance(features).expand_as(head(features)).flatten(1)
    close(closed, variance)
    ratio = float(low.log_det_posterior_precision) - exact.n_params * math.log(2.0)
    ours = posterior_of(head, features, target, "full").log_evidence() - posterior.log_evidence()
    theirs = 0.5 * (ratio - float(exact.log_det_ratio))
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_models_the_backend_cannot_treat_are_refused():
    from bayesdiff.laplace.backend import HeadGGN

    head, features, target = example("conv")
    for model in (nn.Sequential(head, nn.ReLU()), nn.Sequential(), nn.Tanh()):
        with pytest.raises(UserError):
            HeadGGN(model, "regression").full(features, target)
    with pytest.raises(UserError, match="regression"):
        HeadGGN(head, "classification").diag(features, target)
