"""The study of latent inference: a linear flow's exact posteriors, calibration, bad input."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import MLP
from bayesdiff.paths.inflation import Inflation
from bayesdiff.solvers import Heun
from bayesdiff.studies.inference import calibration
from bayesdiff.studies.inference.collapsed import component_likelihood, linear_likelihood
from bayesdiff.studies.inference.flow_map import FlowMap
from bayesdiff.studies.inference.hamiltonian import Hamiltonian
from bayesdiff.studies.inference.inference import LatentInference
from bayesdiff.studies.inference.mixture import jacobian
from bayesdiff.studies.inference.simplex import GridPosterior, grid_posterior
from bayesdiff.studies.inference.weights import (
    WeightChains,
    collapsed_chains,
    referee,
    speedup,
    summary,
)

SMALL = [
    "data=circles", "model=inflation", "net=mlp", "experiment=inference", "net.width=16",
    "inference.observations=60", "inference.importance_draws=4", "inference.chains=4",
    "inference.draws=40", "inference.warmup=20", "inference.leapfrog_steps=3",
    "inference.repeats=10", "inference.repeat_observations=10", "inference.truths=10",
    "inference.heads=3", "inference.joint=true", "inference.joint_observations=5",
    "inference.joint_chains=4", "data.source.points=2000", "data.source.test_points=300",
    "trainer.max_steps=2", "uncertainty=ensemble", "uncertainty.members=2",
    "uncertainty.num_images=4", "metrics.num_images=0", "report.pdf=false", "solver.num_steps=2",
]  # fmt: skip
_OF_POINTS = ("data.source", "net.width", "net=mlp")
TRUTH = torch.tensor([0.5, 0.25, 0.25]).double()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def flow_of(size: int = 2, head: float = 0.0, steps: int = 8) -> FlowMap:
    """Of a network whose head is a multiple of what it was drawn as; of 0 the flow is linear."""
    torch.manual_seed(0)
    net = MLP((size,), width=8, blocks=1)
    with torch.no_grad():
        net.head.weight.mul_(head)
        net.head.bias.mul_(head)
    space = SimpleNamespace(variances=torch.linspace(2.0, 0.5, size))
    path = Inflation("prp", duration=7.01).for_space(space)
    model = GenerativeModel(net, path, "v", torch.optim.AdamW)
    return FlowMap(model, Heun(steps))


@pytest.mark.parametrize("size", [2, 3])
def test_the_posterior_of_a_linear_flow_is_the_exact_one(size):
    flow = flow_of(size, steps=4)
    with flow.frozen():
        mixture = LatentInference(noise=0.3).mixture(flow, size, torch.device("cpu"))
        assert mixture.means.shape == (3, size)
        if size == 3:
            assert mixture.scales[:, 2].tolist() == [1, 1, 1] and not mixture.means[:, 2].any()
        slope = flow.decode(torch.eye(size)).T
        assert (slope - torch.eye(size)).abs().max() > 1e-5  # the data's noise left
        x = mixture.draw(TRUTH.float(), 100, seeded(1))[1]
        found = component_likelihood(
            mixture, x, flow.encode(x), seeded(), draws=2, inflation=1.0
        ).log_likelihood
    exact = linear_likelihood(mixture, slope, x)
    assert torch.allclose(found, exact, atol=2e-3)
    mine, grid = (grid_posterior(each.double()) for each in (found, exact))
    assert torch.allclose(mine.mean, grid.mean, atol=1e-3)
    sampler = Hamiltonian(draws=150, warmup=60, leapfrog_steps=4)
    chains = collapsed_chains(found.double(), sampler, 16, seeded(2))
    numbers = summary(chains, TRUTH)
    assert numbers["r_hat_max"] < 1.03 and numbers["chains"] == 16
    against = referee(grid, numbers)
    assert against["mean_off"] < 0.15 and against["sd_off"] < 0.12
    for end in ("low", "high"):
        assert numbers[end] == pytest.approx(against[end], abs=0.03)


def test_the_flow_is_differentiated_as_it_is_computed_and_frozen():
    flow = flow_of(head=3.0)
    z = torch.randn(5, 2, generator=seeded())
    with flow.frozen():
        slope = jacobian(lambda each: flow.decode(each), z)
        step = 1e-2
        for k in range(2):
            off = step * torch.eye(2)[k]
            slow = (flow.decode(z + off) - flow.decode(z - off)) / (2 * step)
            assert torch.allclose(slope[:, :, k], slow, atol=2e-3)
        assert not flow.decode(z).requires_grad
        finer = flow_of(head=3.0, steps=32)
        assert (finer.encode(finer.decode(z)) - z).norm() < 0.02
    assert flow.decode(z).requires_grad and all(p.requires_grad for p in flow.model.parameters())


def test_each_state_has_a_head_of_its_own():
    flow = flow_of(head=1.0)
    z = torch.randn(3, 2, generator=seeded())
    head = flow.model.net.head
    own = (
        torch.cat([head.weight, head.bias[:, None]], 1)[None]
        * torch.tensor([0, 1, 2])[:, None, None]
    )
    with flow.frozen():
        x = flow.decode_under(own, z)
        again = flow.encode_under(own, x)
        assert torch.allclose(x[1], flow.decode(z)[1], atol=1e-5)
        assert torch.allclose(x[0], flow_of().decode(z)[0], atol=1e-5)
    assert (again - z).abs().max() < 0.05


class Heads:
    """Weights as they are, biases around them; every tenth, a true one, ``off`` times as far."""

    def __init__(self, head: nn.Linear, width: float, off: float = 1.0) -> None:
        self.mean = torch.cat([head.weight, head.bias[:, None]], 1).detach().double()
        self.width, self.off = width, off

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        drawn = self.mean.expand(n, *self.mean.shape).clone()
        noise = torch.randn(n, len(self.mean), generator=generator, dtype=torch.float64)
        noise[::10] *= self.off
        drawn[:, :, -1] += self.width * noise
        return drawn


def test_latents_of_biased_flows_are_shifted_normals():
    """The head's bias shifts all latents alike: their spread is known."""
    flow = flow_of(steps=4)
    head: nn.Linear = flow.model.net.head

    def tested(width: float, off: float = 1.0) -> dict:
        how = (2, torch.device("cpu"), 200, 9, 3)
        found = calibration.latent_shares(flow, Heads(head, width, off), *how)
        assert found.error.abs().max() < 1e-3
        return calibration.of_latents(found)

    with flow.frozen():
        narrow, wide, wrong = tested(0.05), tested(1.0), tested(0.05, off=3)
        shift = flow.encode_under(Heads(head, 0).draw(1, seeded()) + _bias(), torch.zeros(1, 2))
    for numbers in (narrow, wide):
        assert numbers["p_corrected"] > 0.01 and numbers["weighted"]["p_corrected"] > 0.01
        assert numbers["coverage"] == pytest.approx([0.9, 0.9], abs=0.08)
    assert narrow["spread"] == pytest.approx((0.05 * shift.abs()).flatten().tolist(), rel=0.05)
    assert wrong["p_corrected"] < 1e-6 and max(wrong["coverage"]) < 0.75


def _bias() -> Tensor:
    return torch.cat([torch.zeros(1, 2, 8), torch.ones(1, 2, 1)], 2)


def test_ranks_of_weights_are_uniform_and_halved_ones_are_not():
    flow = flow_of(steps=2)
    with flow.frozen():
        device = torch.device("cpu")
        mixture = LatentInference(scales=[[1, 1], [0.1, 1], [1, 0.1]]).mixture(flow, 2, device)
        ranks = calibration.weight_shares(mixture, flow, 100, 20, 2, 5)
    assert ranks.shape == (100, 3)
    assert calibration.of_weights(ranks)["p_corrected"] > 0.01
    assert calibration.of_weights(ranks // 2)["p_corrected"] < 1e-3


def test_numbers_of_chains():
    draws = torch.distributions.Dirichlet(torch.tensor([5.0, 3.0, 2.0]).double())
    torch.manual_seed(0)
    chains = WeightChains(draws.sample((4, 500)), 2.0, 0, 0.9)
    inside = summary(chains, draws.mean)
    assert inside["all_inside"] and inside["inside"] == [True] * 3
    outside = summary(chains, torch.tensor([0.99, 0.005, 0.005]).double())
    assert not outside["all_inside"]
    assert chains.rate == pytest.approx(1000, rel=0.2)
    exact = GridPosterior(draws.sample((4000,)), torch.full((4000,), 1 / 4000).double(), 0.0)
    assert referee(exact, inside)["mean_off"] < 0.1
    logs = torch.randn(20, 3, generator=seeded()).double()
    sampler = Hamiltonian(draws=30, warmup=20, leapfrog_steps=3)
    many = collapsed_chains(logs, sampler, 4, seeded())
    found = speedup(logs, sampler, many, seeded())
    assert found["speedup"] == found["ess_per_second"] / found["ess_per_second_alone"]
    assert found["chains"] == 4 and found["observations"] == 20


def test_bonferroni_and_the_band():
    shares = calibration.LatentShares(*[torch.linspace(0.01, 0.99, 100)[:, None]] * 4)
    found = calibration.of_latents(shares)
    assert found["p"][0] == pytest.approx(1, abs=0.01) and found["counts"] == [[10] * 10]
    two = torch.stack([torch.arange(100), torch.arange(100) ** 2 // 100], 1)
    found = calibration.of_weights(two)
    assert found["p_corrected"] == pytest.approx(2 * found["p"][1])
    low, high = calibration.band(100, 10)
    assert (
        low < 10 < high and math.isclose(low, 4, abs_tol=1) and math.isclose(high, 16, abs_tol=1)
    )


def test_the_study_of_a_run(compose):
    result = pipeline.run(compose(*SMALL))
    (folder,) = result.studies
    found = json.loads((folder / "results.json").read_text())
    assert len(found["weights"]["mean"]) == 3 and found["weights"]["chains"] == 4
    assert found["joint"]["draws"] == 40 and "mean_off" in found["joint"]["referee"]
    assert result.headlines["inference/sbc_p"] == found["sbc"]["p_corrected"]
    names = ("weights_covered", "r_hat", "speedup", "sbc_p", "latents_p")
    assert set(result.headlines) >= {f"inference/{name}" for name in names}
    made = {f.name for f in (folder / "figures").glob("*.png")}
    assert made == {"weights.png", "ranks.png", "observations.png"}


@pytest.mark.parametrize(
    "override, message",
    [
        ("inference.weights=[0.5,0.5]", "3 positive numbers that sum to 1"),
        ("inference.weights=[0.5,0.5,0.5]", "3 positive numbers that sum to 1"),
        ("inference.means=[[0,0]]", "must have as many rows"),
        ("inference.means=0", "must be rows of numbers"),
        ("inference.scales=[[1,1],[1,0],[1,1]]", "must all be positive"),
        ("inference.noise=0", "inference.noise"),
        ("inference.chains=3", "inference.chains"),
        ("inference.repeats=9", "inference.repeats"),
        ("inference.joint=1", "must be true or false"),
        ("data=digits", "latents of 2 or 3 coordinates"),
        ("solver=ddpm", "draws noise"),
        ("solver.denoise=true", "solver.denoise=true ends with a prediction"),
    ],
)
def test_bad_input_is_refused_in_one_line(compose, override, message):
    key = override.partition("=")[0]
    words = [w for w in SMALL if not w.startswith(f"{key}=")]
    if override == "data=digits":
        words = [w for w in words if not w.startswith(_OF_POINTS)]
    with pytest.raises(Exception, match=message) as error:
        pipeline.run(compose(*words, override))
    assert len(explain(error.value).splitlines()) == 1


def test_conditional_models_and_too_many_coordinates_are_refused(compose):
    words = [*SMALL, "data.source.labels=true", "model.num_classes=auto"]
    with pytest.raises(UserError, match="use model.num_classes=null"):
        pipeline.run(compose(*words))
    wide = LatentInference(means=[[0, 0, 0]] * 2, scales=[[1, 1, 1]] * 2, weights=[0.5, 0.5])
    data = SimpleNamespace(name="plane", space=SimpleNamespace(shape=(2,)))
    with pytest.raises(UserError, match="have 3 coordinates, and states of plane have 2"):
        wide.check_data(data, "inference")
    with pytest.raises(UserError, match="has 4 Gaussians; give 2 or 3"):
        LatentInference(means=[[0]] * 4, scales=[[1]] * 4, weights=[0.25] * 4)
