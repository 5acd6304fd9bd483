"""Layers beside the head: which they are, priors of their own, sensitivities to their weights."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import Compose, Trained
from hand import model_of, plain, real_start, small_unet, start_of
from test_bad_input import check_line, refused
from test_block import Small, pictures, some_factors, unet_posterior
from torch import nn
from torch.func import functional_call

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.block import low_rank
from bayesdiff.laplace.block.kinds import Beside
from bayesdiff.laplace.block.layers import check_names, layer_matrix, layer_tensors, layers_of
from bayesdiff.laplace.block.low_rank_posterior import LowRankPosterior
from bayesdiff.laplace.block.posterior import BlockPosterior
from bayesdiff.paths import CondOT
from bayesdiff.solvers import Heun, integrate
from bayesdiff.uncertainty import Linearised
from bayesdiff.uncertainty.sensitivities.linearised import directions, follow, follow_rows
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS
from bayesdiff.uncertainty.sensitivities.weights import WeightTangentField
from bayesdiff.uncertainty.wider import with_block


def bend():
    """A float64 network with two layers that bend before the head."""
    layers = lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1)]  # noqa: E731
    return Small(layers, lambda: nn.Conv2d(2, 1, 3, padding=1))


@pytest.mark.parametrize("solver", [Heun(num_steps=2)])
def test_sensitivities_are_the_derivative_of_the_whole_sampler_in_all_weights(solver):
    """Against reverse-mode differentiation of the sampled image in every weight, in float64."""
    net = bend()
    model = model_of(net, CondOT())
    start = start_of(model, solver, count=2, shape=(1, 4, 4))
    names = [name for name, _ in net.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    along = {
        name: torch.randn(3, *value.shape, dtype=torch.float64, generator=generator)
        for name, value in net.named_parameters()
    }
    field = start.field()
    tangent = WeightTangentField(field, along)
    found = follow_rows(start, tangent, 3, 1.0).sensitivities

    class Sampled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self):
            again = start_of(model, solver, count=2, shape=(1, 4, 4))
            steps, x = again.steps(), again.initial()
            return integrate(again.field(), steps, x, again.draw)

    sampled = Sampled()
    weights = tuple(value.detach().clone() for value in net.parameters())

    def image(*values):
        given = {f"net.{name}": value for name, value in zip(names, values, strict=True)}
        return functional_call(sampled, given, ())

    with torch.enable_grad():
        jacobians = torch.autograd.functional.jacobian(image, weights)
    truth = sum(
        torch.einsum("...k,mk->m...", jacobian.flatten(4), along[name].flatten(1))
        for name, jacobian in zip(names, jacobians, strict=True)
    )
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["euler", "euler-guided", "ddim-eta"])
def test_along_the_heads_weights_alone_they_are_those_of_the_head(name):
    net, posterior = small_unet()
    deltas = directions(posterior, 3, seed=1)
    truth = follow(real_start(net, name), deltas, 1.0, PRODUCTS["exact"], noise_draws=2, seed=4)
    along = {f"head.{k}": v for k, v in layer_tensors(net.head, deltas).items()}
    for derivative, tolerance in (("exact", 1e-4), ("difference", 3e-2)):
        start = real_start(net, name)
        tangent = WeightTangentField(start.field(), along, derivative)
        found = follow_rows(start, tangent, 3, 1.0, noise_draws=2, seed=4)
        size = truth.sensitivities.abs().amax()
        assert (found.sensitivities - truth.sensitivities).abs().amax() < tolerance * size
        assert torch.equal(found.states, truth.states)
        if truth.sampler_noise is not None:
            size = truth.sampler_noise.amax()
            assert (found.sampler_noise - truth.sampler_noise).abs().amax() < tolerance * size


@torch.no_grad()
def test_the_estimator_is_the_mean_square_along_its_directions():
    """Turns of directions, the images, the count of evaluations, and the record."""
    net, head, posterior = unet_posterior(prior=2e4)
    start = real_start(net, "euler")
    wide = with_block(Linearised(draws=66, seed=3, derivative="difference"), posterior)
    samples = wide(start, head)
    along = wide.directions(start.model, head)
    assert {name.rpartition(".")[0] for name in along} == {*posterior.layers, "head"}
    again = real_start(net, "euler")
    tangent = WeightTangentField(again.field(), along, "difference")
    truth = follow_rows(again, tangent, 66, 1.0).sensitivities.square().mean(0)
    torch.testing.assert_close(samples.variance, truth, rtol=1e-4, atol=1e-9)
    assert torch.equal(samples.images, plain(real_start(net, "euler")))
    assert samples.nfe == wide.evaluations(start) == start.nfe * (2 + 66)
    assert posterior.described in samples.estimator
    alone = Linearised(draws=66, seed=3)(real_start(net, "euler"), head)
    assert samples.variance.mean() > alone.variance.mean()


def test_priors_maximise_the_evidence_of_these_layers():
    """By hand: log N(w | 0, 1 / tau) and the log-determinants of dense matrices."""
    factors = some_factors(a=(2, 4), b=(3, 2))
    flat = BlockPosterior(factors, "full", 0.5, {"a": 2.0, "b": 7.0}, 60.0)
    truth = 0.0
    for name, layer in factors.layers.items():
        data = 60 / 20 / 0.5**2 * torch.kron(layer.output, layer.input)
        tau = flat.priors[name]
        eye = torch.eye(len(data), dtype=torch.float64)
        truth -= 0.5 * float(torch.logdet(data + tau * eye) - len(data) * torch.tensor(tau).log())
        truth -= 0.5 * tau * float(layer.mean.square().sum())
    assert flat.log_evidence() == pytest.approx(truth, rel=1e-6)
    for per in ("layer", "subset"):
        best = flat.with_evidence(per)
        assert len(set(best.priors.values())) == (2 if per == "layer" else 1)
        for factor in (0.9, 1.1):
            for moved in [list(best.priors)] if per == "subset" else [[n] for n in best.priors]:
                other = {n: t * factor if n in moved else t for n, t in best.priors.items()}
                worse = BlockPosterior(factors, "full", 0.5, other, 60.0)
                assert worse.log_evidence() < best.log_evidence()
        assert best.prior_range == (min(best.priors.values()), max(best.priors.values()))
    assert flat.with_evidence("layer").log_evidence() > flat.with_evidence("subset").log_evidence()


def test_names_choose_layers_with_all_inside_them():
    net, _ = small_unet()
    every = layers_of(net, "all")
    kinds = (nn.Conv2d, nn.Linear)
    assert set(every) == {
        name for name, module in net.named_modules() if isinstance(module, kinds)
    } - {"head"}
    some = layers_of(net, ["up.1", "stem"])
    assert "stem" in some and len(some) > 2
    assert all(name == "stem" or name.startswith("up.1.") for name in some)
    assert list(layers_of(net, ["middle", "middle.0"])) == list(layers_of(net, ["middle"]))
    for subset, fragments in (
        (["up.77"], ["'up.77'", "did you mean up."]),
        (["nothing at all"], ["the network has time"]),
        (["head"], ["no linear or convolution layer beside the head"]),
        (["norm"], ["[norm] of UNet", "laplace.subset=head"]),
    ):
        with pytest.raises(UserError) as error:
            layers_of(net, subset)
        check_line(str(error.value), fragments)
    for subset in ("body", [], [3], None, 3, True):
        with pytest.raises(UserError, match=r"laplace.subset"):
            check_names(subset)


def test_tensors_of_a_layer_are_its_matrix_taken_apart():
    for layer in (nn.Conv2d(2, 3, 3), nn.Linear(4, 2, bias=False)):
        found = layer_tensors(layer, layer_matrix(layer))
        assert found.keys() == dict(layer.named_parameters()).keys()
        assert all(torch.equal(found[k], v) for k, v in layer.named_parameters())


def test_bad_names_are_refused_before_any_work(compose: Compose):
    given = "laplace.subset=all", "laplace.layers=low_rank", "laplace.layers_rank=900000"
    check_line(
        refused(compose, *given), ["laplace.layers_rank=900000", "laplace.layers=kronecker"]
    )
    check_line(refused(compose, "laplace.subset=null"), ["laplace.subset", "None"])
    given = "laplace.subset=all", "laplace.n_eff=seen", "sample_from=best"
    check_line(refused(compose, *given), ["laplace.n_eff=seen", "sample_from=last"])
    assert Beside(subset=["up.2", "middle", "up.2"]).subset == ["middle", "up.2"]
    given = "laplace.subset=[up.99]", "uncertainty=linearised"
    check_line(refused(compose, *given), ["'up.99'", "did you mean"])
    given = "laplace.subset=all", "laplace.prior_per=channel", "uncertainty=linearised"
    check_line(refused(compose, *given), ["laplace.prior_per", "layer or subset", "'channel'"])


def dense(net, layers, seen):
    """J^T J over all batches by autograd, all weights of these layers in the order of matrices."""
    total = 0
    for x, t in seen:
        sizes = [layer_matrix(layer).shape for layer in layers.values()]

        def outputs(flat, x=x, t=t, sizes=sizes):
            given, at = {}, 0
            for (name, layer), size in zip(layers.items(), sizes, strict=True):
                matrix = flat[at : at + size.numel()].view(size)
                at += size.numel()
                given |= {f"{name}.{k}": v for k, v in layer_tensors(layer, matrix).items()}
            return functional_call(net, given, (x, t)).flatten()

        point = torch.cat([layer_matrix(layer).flatten() for layer in layers.values()])
        jacobian = torch.autograd.functional.jacobian(outputs, point)
        total = total + jacobian.T @ jacobian
    return total


def test_leading_directions_are_those_of_the_dense_ggn(monkeypatch):
    """Over all layers together, what ties them included; and the draws' covariance."""
    net = bend()
    model = model_of(net, CondOT())
    seen = []
    forward = low_rank.Flat.forward

    def record(self, inputs):
        given = (inputs["x"].detach().double(), inputs["t"].detach().double())
        if not any(torch.equal(given[1], t) for _, t in seen):
            seen.append(given)
        return forward(self, inputs)

    monkeypatch.setattr(low_rank.Flat, "forward", record)
    options = {"source": "w-d-p", "subset": "all", "batch_size": 6}
    images = pictures(12, 4)
    factors = low_rank.fit_low_rank(model.double(), images, None, rank=8, **options)
    layers = layers_of(net, "all")
    assert len(seen) == 2
    truth = dense(net, layers, seen)
    values, vectors = torch.linalg.eigh(truth)
    torch.testing.assert_close(factors.values, values.flip(0)[:8], rtol=1e-5, atol=1e-8)
    found = torch.cat([factors.vectors[name].flatten(1) for name in layers], 1)
    overlap = (found @ vectors.flip(1)[:, :8]).abs()
    torch.testing.assert_close(overlap, torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-3)
    posterior = LowRankPosterior(factors, 0.5, 3.0, 24.0)
    likelihood = found.T * (factors.values * 24 / 12 / 0.25) @ found
    eye = torch.eye(len(truth), dtype=torch.float64)
    covariance = torch.linalg.inv(likelihood + 3 * eye)
    drawn = posterior.deviations(40_000, torch.Generator().manual_seed(0))
    flat = torch.cat([drawn[name].flatten(1) for name in layers], 1)
    sd = covariance.diagonal().sqrt()
    assert ((flat.T @ flat / len(flat) - covariance) / (sd[:, None] * sd)).abs().max() < 0.04
    counted = float(torch.linalg.solve(likelihood + 3 * eye, likelihood).trace())
    assert posterior.effective_parameters == pytest.approx(counted)
    squares = sum(float(layer_matrix(layer).square().sum()) for layer in layers.values())
    logs = torch.logdet(likelihood + 3 * eye) - len(eye) * torch.tensor(3.0).log()
    assert posterior.log_evidence() == pytest.approx(-0.5 * (float(logs) + 3 * squares))
    with pytest.raises(UserError, match="laplace.layers=kronecker"):
        low_rank.fit_low_rank(model, images, None, rank=10_000, **options)


def test_directions_survive_their_file_and_are_of_their_weights(tmp_path):
    mean = torch.arange(6, dtype=torch.float64).view(2, 3)
    vectors = torch.eye(6, dtype=torch.float64)[:2].view(2, 2, 3)
    values = torch.tensor([5.0, 2.0], dtype=torch.float64)
    factors = low_rank.LowRankFactors(values, {"a": vectors}, {"a": mean}, 12, "w-d-p")
    factors.save(tmp_path / "f.safetensors")
    again = low_rank.LowRankFactors.load(tmp_path / "f.safetensors")
    assert again.key == factors.key and torch.equal(again.vectors["a"], vectors)
    assert replace(again, num_images=13).key != factors.key
    again.require_source("w-d")
    with pytest.raises(UserError, match="delete the block"):
        again.require_source("v-d")
    head = unet_posterior()[1]
    head = replace(head, curvature=replace(head.curvature, source="w-d-q"))
    best = LowRankPosterior.beside(head, factors, "evidence")
    for tau in (0.9, 1.1):
        worse = replace(best, prior_precision=best.prior_precision * tau)
        assert worse.log_evidence() < best.log_evidence()
    assert best.settings != replace(best, n_eff=3.0).settings


def test_a_run_by_leading_directions(copied: Trained, compose: Compose):
    wide = ["laplace.subset=[up.0,middle]", "laplace.prior_precision=evidence"]
    wide += ["uncertainty=linearised", "uncertainty.draws=2", "uncertainty.num_images=2"]
    low = ["laplace.layers=low_rank", "laplace.layers_rank=2", "laplace.num_images=16"]
    results = [pipeline.run(compose(*wide, *more)) for more in ([], low)]
    for result in results:
        assert result.settings["subset"] == "[up.0,middle]"
        assert result.metrics["laplace/block_log_evidence"] < 0
        low, high = (result.metrics[f"laplace/block_prior_precision_{k}"] for k in ("min", "max"))
        assert 0 < low <= high
    assert results[0].metrics["laplace/block_prior_precision_max"] != high


def test_auto_follows_all_layers_by_their_sensitivities(compose: Compose):
    cfg = compose("laplace.subset=all", "uncertainty=auto")
    this, _, estimator, _ = pipeline.prepare(cfg)
    assert type(estimator) is Linearised and cfg.uncertainty.draws == estimator.draws
    assert this.instead_of == "refined, which is of the head alone, not of all"


def test_the_likelihood_counts_what_the_training_saw(copied: Trained, compose: Compose):
    seen = pipeline.run(compose("laplace.n_eff=seen", "metrics.num_images=0"))
    record = json.loads((copied.folder / "fit.json").read_text())
    cfg = compose()
    assert seen.metrics["laplace/n_eff"] == record["steps"] * cfg.data.batch_size
    taken = ("fit=false", f"ckpt_path={copied.folder}/checkpoints/last.ckpt")
    check_line(refused(compose, "laplace.n_eff=seen", *taken), ["laplace.n_eff=seen", "a number"])
    check_line(refused(compose, "laplace.n_eff=most"), ["laplace.n_eff", "'most'", "seen or null"])
