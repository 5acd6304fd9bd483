"""Laplace over a random subset of all weights: exact on linear networks, and its members."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import curvature_of, curved, model_of, plain, real_start, small_unet
from test_bad_input import check_line, refused
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace import subnetwork
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.subnetwork import (
    SubnetworkCurvature,
    Subset,
    fit_subnetwork,
    weights_of,
)
from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.runs.setup import starts
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.uncertainty import Subnetwork
from bayesdiff.uncertainty.members.subnetwork import moved

pytestmark = pytest.mark.usefixtures("without_reports")
PASS = {"draws": 2, "batch_size": 5, "seed": 3, "num_images": 11}


class Linear(nn.Module):
    """Two linear layers of the state and the time, in double precision: linear in each alone."""

    def __init__(self, deep=False):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Conv2d(2, 2, 3, padding=1).double() if deep else nn.Identity()
        self.head = nn.Conv2d(2, 1, 3, padding=1).double()

    def features(self, x, t, y=None):
        x = torch.cat([x, torch.ones_like(x) * t.view(-1, 1, 1, 1)], 1).double()
        return self.first(x)

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.head(self.features(x, t, y))


def pictures(count, size=4):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)


def jacobian(net, seen):
    """Of all outputs in all weights, image by image, by loops: ``(B, outputs, P)``."""
    rows = []
    for x, t in zip(seen.x_t, seen.time, strict=True):
        output = net(x[None], t[None]).flatten()
        each = []
        for value in output:
            parts = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
            each.append(torch.cat([part.flatten() for part in parts]))
        rows.append(torch.stack(each))
    return torch.stack(rows)


def columns_of(net, subset):
    """Numbers of the chosen weights among all."""
    found, first = [], 0
    for name, parameter in net.named_parameters():
        if name in subset.places:
            found.append(subset.places[name] + first)
        first += parameter.numel()
    return torch.cat(found)


def slow(model, subset, kind):
    """Sum of J^T J, or of gradients' outer products, over the pass."""
    net, total = model.net, 0
    for seen in draws_of(model, pictures(12), None, **PASS):
        j = jacobian(net, seen)[..., columns_of(net, subset)]
        if kind == "empirical_fisher":
            error = net(seen.x_t, seen.time).flatten(1) - seen.target.flatten(1)
            g = torch.einsum("bo,bok->bk", error.detach(), j)
            total = total + g.T @ g
        else:
            total = total + torch.einsum("boj,bok->jk", j, j)
    return total / 2


@pytest.mark.parametrize("kind", ["ggn", "empirical_fisher"])
@pytest.mark.parametrize("structure", ["diag", "dense"])
def test_curvature_is_the_jacobians_own(kind, structure):
    model = model_of(Linear(deep=True))
    subset = Subset.at_random(model.net, 23, seed=4)
    got = fit_subnetwork(
        model, pictures(12), None, subset,
        source="s", structure=structure, curvature=kind, probes="all", **PASS,
    )  # fmt: skip
    truth = slow(model, subset, kind)
    wanted = truth.diagonal() if structure == "diag" else truth
    torch.testing.assert_close(got.matrix, wanted, rtol=1e-9, atol=1e-10)
    assert (got.num_images, got.power) == (11, 2 if kind == "ggn" else 4)
    assert all(parameter.grad is None for parameter in model.net.parameters())


def test_random_probes_are_right_on_average_and_repeat():
    model = model_of(Linear(deep=True))
    subset = Subset.at_random(model.net, 15, seed=0)
    options = {"source": "s", "structure": "dense", **PASS}
    exact, rough, again, close = (
        fit_subnetwork(model, pictures(12), None, subset, probes=probes, **options).matrix
        for probes in ("all", 2, 2, 3000)
    )
    assert torch.equal(rough, again)
    assert (rough - exact).norm() / exact.norm() > 0.02
    assert (close - exact).norm() / exact.norm() < 0.03


def test_of_a_linear_network_with_all_weights_it_is_the_posterior_of_the_head():
    """Dense over every weight of a head alone: the exact posterior, whatever the numbers."""
    net = Linear()
    model, subset = model_of(net), Subset.at_random(net, 19, seed=0)
    assert len(subset) == weights_of(net) == 19
    features, residual = [], []
    for seen in draws_of(model, pictures(12), None, **PASS):
        features.append(net.features(seen.x_t, seen.time))
        residual.append(net(seen.x_t, seen.time).detach() - seen.target)
    curvature = curvature_of(net.head, torch.cat(features), torch.cat(residual))
    curvature = replace(curvature, gram=curvature.gram / 2, num_images=11)
    head = HeadPosterior.fit(curvature, sigma_noise=0.3, prior_precision=0.7, n_eff=50.0)
    found = fit_subnetwork(
        model, pictures(12), None, subset,
        source="s", structure="dense", probes="all", **PASS,
    )  # fmt: skip
    root = found.covariance_root(head)(torch.eye(19, dtype=torch.float64))
    # Both name weights by (feature, tap), and the bias last.
    torch.testing.assert_close(root @ root, head.covariance, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("power", [2, 4])
def test_diagonal_draws_have_their_precision(power):
    curvature = SubnetworkCurvature(torch.tensor([0.0, 3.0, 8.0]).double(), power, 20, "s")
    net, head, _ = curved()
    numbers = {"sigma_noise": 0.5, "prior_precision": 2.0, "n_eff": 60.0}
    posterior = replace(head, **numbers)
    root = curvature.covariance_root(posterior)(torch.ones(1, 3, dtype=torch.float64))
    truth = (3 * curvature.matrix / 0.5**power + 2).rsqrt()
    torch.testing.assert_close(root[0], truth)


def test_subsets_are_uniform_over_all_weights_and_repeat():
    net, _ = small_unet()
    there = weights_of(net)
    names = {name for s in range(40) for name in Subset.at_random(net, 100, s).places}
    assert len(names) > 0.8 * len(list(net.parameters()))
    one, other = (columns_of(net, Subset.at_random(net, there // 4, s)) for s in (0, 1))
    assert torch.equal(one, columns_of(net, Subset.at_random(net, there // 4, 0)))
    assert len(one) == len(one.unique()) and not torch.equal(one, other)
    assert float(one.double().mean()) == pytest.approx(there / 2, rel=0.05)
    together = len(set(one.tolist()) & set(other.tolist()))
    assert together / len(one) == pytest.approx(0.25, abs=0.05)


@torch.no_grad()
def test_members_move_the_chosen_weights_alone():
    net, _ = small_unet()
    model = real_start(net, "euler").model
    before = {name: value.clone() for name, value in net.state_dict().items()}
    subset = Subset.at_random(net, 50, seed=1)
    deviation = torch.arange(1, 51, dtype=torch.float64) / 100
    member = moved(model, subset, deviation)
    change = torch.cat(
        [
            (dict(member.net.named_parameters())[name] - value).flatten()
            for name, value in net.named_parameters()
        ]
    )
    torch.testing.assert_close(
        change[columns_of(net, subset)].double(), deviation, atol=1e-6, rtol=0
    )
    assert int((change != 0).sum()) == 50
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


SMALL = (
    "uncertainty=subnetwork", "uncertainty.members=2", "uncertainty.weights=30",
    "metrics.num_images=0", "laplace.num_images=16", "uncertainty.noise_members=0",
)  # fmt: skip


def test_a_run_makes_its_curvature_once_and_follows_its_members(
    copied: Trained, compose: Compose, monkeypatch
):
    result = pipeline.run(compose(*SMALL))
    samples = np.load(result.samples)
    assert samples["variance"].max() > 0 and samples["nfe"] == 3 * 3
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["estimator"] == ("subnetwork, 2 members, skip 1, random 30 weights, diag ggn")
    (path,) = copied.folder.glob("subnetwork-*.safetensors")
    this, solver, estimator, laplace = pipeline.prepare(compose(*SMALL))
    this.model.load_state_dict(read_checkpoint(copied.checkpoint)["state_dict"])
    posterior = laplace.fit(this.model.eval(), this.data.data)
    made = []
    real = subnetwork.draws_of
    monkeypatch.setattr(subnetwork, "draws_of", lambda *a, **k: made.append(1) or real(*a, **k))
    ready = estimator.for_run(this).fit(starts(this, solver), posterior, this.folder)
    assert not made  # what is kept is read
    images = []
    for network in ready.networks:
        start = starts(this, solver)(range(4))
        images.append(plain(replace(start, model=network)))
    np.testing.assert_allclose(
        samples["variance"], torch.stack(images).var(0), rtol=1e-3, atol=1e-9
    )
    source = SubnetworkCurvature.stored(path, "another")
    assert source is None
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="delete it and run again"):
        estimator.for_run(this).fit(starts(this, solver), posterior, this.folder)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"members": 1}, ["uncertainty.members", ">= 2"]),
        ({"weights": 0}, ["uncertainty.weights", ">= 1"]),
        ({"share": 1.5}, ["uncertainty.share", "at most 1", "1.5"]),
        ({"share": -0.1}, ["uncertainty.share", "-0.1"]),
        ({"structure": "kron"}, ["uncertainty.structure 'kron'", "diag, dense"]),
        ({"curvature": "hessian"}, ["uncertainty.curvature 'hessian'", "ggn"]),
        ({"probes": "many"}, ["uncertainty.probes", "'many'"]),
        ({"probes": 0}, ["uncertainty.probes", ">= 1"]),
    ],
)
def test_bad_values_are_refused(options, fragments):
    with pytest.raises(UserError) as error:
        Subnetwork(**options)
    check_line(str(error.value), fragments)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (
            ("uncertainty.weights=999999999",),
            ["uncertainty.weights=999999999", "uncertainty.share"],
        ),
        (
            ("uncertainty.structure=dense", "uncertainty.weights=5000"),
            ["dense holds 4096", "5000", "diag"],
        ),
        (
            ("laplace.sigma_noise=mle_per_time", "laplace.time_bins=4"),
            ["laplace.sigma_noise=mle_per_time", "ensemble"],
        ),
        (("model=bfn", "data=binary_digits"), ["Gaussian likelihood", "uncertainty=ensemble"]),
        (("laplace.subset=last_block",), ["laplace.subset=last_block", "subnetwork"]),
    ],
)
def test_runs_are_refused_in_one_line(overrides, fragments, compose: Compose):
    check_line(refused(compose, "uncertainty=subnetwork", *overrides), fragments)


def test_without_a_run_there_is_no_data():
    net, head, _ = curved()
    with pytest.raises(UserError, match="no data to pass over"):
        Subnetwork().fit(lambda numbers: real_start(small_unet()[0], "euler"), head)
    with pytest.raises(UserError, match="use uncertainty=ensemble"):
        Subnetwork().check_model(model_of(net))
