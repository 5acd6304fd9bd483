"""A second head for the variance of the training target: its fit, and its way to the images."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose, Trained
from hand import CPU, FLOW, LINEAR, Hand, certain, model_of, plain, start_of
from test_bad_input import check_line, refused

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.runs.setup import starts
from bayesdiff.solvers import DDIM, DPMSolverPP2M, Euler, Heun, integrate
from bayesdiff.solvers.integrate import advance, held_after
from bayesdiff.storage.checkpoints import read_checkpoint
from bayesdiff.uncertainty import VarianceHead
from bayesdiff.uncertainty.recursion import log_variance
from bayesdiff.uncertainty.recursion.log_variance import (
    LogVarianceHead,
    check_fold,
    fit_log_variance,
    marginal_targets,
    most_likely,
)

pytestmark = pytest.mark.usefixtures("without_reports")


def rows(count, seed=0):
    """Correlated features off the origin, and squares whose log-variance is linear in them."""
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    phi = phi @ torch.tensor([[1.0, 0.5, 0], [0, 0.1, 0], [0, 2, 3]]).double() + 4
    eta = phi @ torch.tensor([[0.3, -0.4], [0.2, 1.0], [-0.1, 0.05]]).double() - 2
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return phi, eta.exp() * noise**2


def newton(phi, squares):
    """The same by plain Newton steps on the likelihood alone, one output after the other."""
    one = torch.cat([phi, torch.ones_like(phi[:, :1])], 1)
    found = []
    for r in squares.T:
        w = torch.zeros(4, dtype=torch.float64)
        w[-1] = r.mean().log()
        for _ in range(100):
            ratio = r * (-(one @ w)).exp()
            slope = one.T @ (1 - ratio) / 2
            hessian = (one * ratio[:, None]).T @ one / 2
            step = torch.linalg.solve(hessian, slope)
            w = w - step * min(1.0, 1 / float((one @ step).abs().max()))
        assert slope.abs().max() < 1e-8 * len(r)
        found.append(w)
    return torch.stack(found)


def test_of_constant_features_the_variance_is_the_mean_square():
    squares = torch.rand(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    head = most_likely(torch.full((50, 3), 2.0, dtype=torch.float64), squares)
    eta = head.weight @ torch.full((3,), 2.0, dtype=torch.float64) + head.bias
    torch.testing.assert_close(eta.exp(), squares.mean(0), rtol=2e-6, atol=0)
    nothing = most_likely(torch.ones(5, 1, dtype=torch.float64), torch.zeros(5, 1).double())
    assert nothing.bias.isfinite().all() and nothing.lowest.isfinite().all()


def test_the_fit_is_the_maximum_of_the_likelihood():
    phi, squares = rows(20_000)
    head = most_likely(phi, squares)
    truth = newton(phi, squares)
    torch.testing.assert_close(head.weight, truth[:, :-1], rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(head.bias, truth[:, -1], rtol=2e-3, atol=1e-3)
    eta = phi @ head.weight.T + head.bias
    ratio = squares * (-eta).exp()
    # The prior counts as one row of 20,000, and does not hold the constant.
    torch.testing.assert_close(ratio.mean(0), torch.ones(2).double(), rtol=1e-5, atol=0)
    centred = (phi - phi.mean(0)) / phi.std(0)
    assert (centred.T @ (1 - ratio) / 2 / len(phi)).abs().max() < 1e-3
    torch.testing.assert_close(head.highest, eta.amax(0))
    torch.testing.assert_close(head.lowest, eta.amin(0))


def pictures(count, size=4):
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (count, 1, size, size), generator=generator, dtype=torch.uint8)


def test_the_pass_sees_the_trained_heads_features_and_residuals():
    """Patches, a kernel and all positions, against unfolded rows of the same draws."""
    weights = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).tolist()
    net = Hand(lambda x, t, y: torch.cat([x + t, torch.sin(x)], 1).double(), weights, 0.1, 3, 2)
    model = model_of(net)
    got = fit_log_variance(model, pictures(40), None, rows=10**6, seed=3)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3 + log_variance._SALT))
    phi, squares = [], []
    for seen in draws_of(model, pictures(40)[order], None, seed=3):
        features = net.features(seen.x_t, seen.time)
        wrong = net.fold(net.head(features)) - seen.target
        phi.append(F.unfold(features, 3, padding=1).mT.flatten(0, 1))
        squares.append(F.pixel_unshuffle(wrong, 2).square().movedim(1, -1).flatten(0, 2).detach())
    want = most_likely(torch.cat(phi), torch.cat(squares))
    torch.testing.assert_close(got.weight, want.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.bias, want.bias, rtol=1e-4, atol=1e-5)
    eta = torch.cat(phi) @ got.weight.T + got.bias
    eta = eta.view(40, 2, 2, 4).movedim(-1, 1)
    said = torch.cat([net.features(s.x_t, s.time) for s in draws_of(
        model, pictures(40)[order], None, seed=3
    )])  # fmt: skip
    torch.testing.assert_close(got(net, said), F.pixel_shuffle(eta, 2).exp())
    far = got(net, 100 * said)
    assert float(far.max()) <= float(got.highest.exp().max()) * (1 + 1e-9)
    few = fit_log_variance(model, pictures(40), None, rows=80, num_images=20, seed=3)
    assert not torch.equal(few.weight, got.weight)
    again = fit_log_variance(model, pictures(40), None, rows=80, num_images=20, seed=3)
    assert torch.equal(few.weight, again.weight)


def test_marginal_targets_weigh_the_images_of_the_same_condition():
    model = model_of(Hand(lambda x, t, y: x, [[1.0]]), num_classes=3)
    images, classes = pictures(12, 2), torch.arange(12) % 3
    references = to_model_range(images)
    for seen in draws_of(model, images, classes, seed=1):
        got = marginal_targets(model, seen, references, classes)
        for x, t, y, target in zip(seen.x_t, seen.time, seen.y, got, strict=True):
            own = references[classes == y].double()
            away = (x - t * own).double().square().flatten(1).sum(1) / (1 - t) ** 2
            weights = torch.softmax(-away / 2, 0)
            mean = (weights[:, None, None, None] * own).sum(0)
            torch.testing.assert_close(
                target.double(), mean - (x - t * mean) / (1 - t), rtol=1e-3, atol=1e-3
            )


def linear(kernel, slope=-0.7):
    """A network linear in the state, and a log-variance that reads the state as well."""
    generator = torch.Generator().manual_seed(5)
    net = Hand(lambda x, t, y: torch.cat([x, 0 * x + t], 1), [[slope, 0.2]], kernel=kernel)
    with torch.no_grad():
        net.head.weight.add_(0.2 * torch.randn(net.head.weight.shape, generator=generator))
    size = 2 * kernel**2
    weight = 0.2 * torch.randn(1, size, generator=generator).double()
    wide = torch.tensor([50.0]).double()
    return net, LogVarianceHead(weight, torch.tensor([-1.0]).double(), -wide, wide)


CASES = {
    "euler": (Euler(5), FLOW, "velocity"),
    "ddim": (DDIM(5), LINEAR, "v"),
    "dpmpp_2m": (DPMSolverPP2M(5), LINEAR, "v"),
}


def ready(case, kernel, **options):
    solver, path, prediction = CASES[case]
    net, head = linear(kernel)
    start = start_of(model_of(net, path, prediction), solver, 1, (1, 3, 3))
    return VarianceHead(head=head, **options), start, certain(net.head), head


@torch.no_grad()
def slow(start, head):
    """Every pixel of every evaluation moved by its own standard deviation, one after the other."""

    def final(where=None):
        field, number = start.field(), [0]

        def moved(x, t):
            features = field.features(x, t)
            output = field.output(features)
            if where is not None and where[0] == number[0]:
                sd = head(field.model.net, features).sqrt()
                output.flatten()[where[1]] += sd.flatten()[where[1]]
            number[0] += 1
            return output

        return integrate(moved, start.steps(), x_0, start.draw)

    x_0 = start.initial()
    image = final()
    places = [(n, p) for n in range(5) for p in range(9)]
    return image, sum((final(where) - image).square() for where in places)


@torch.no_grad()
def by_hand(start, head, slope):
    """V' of one pixel after the other, by matrices of it and what steps kept; no J^2 V."""
    net, x, memory = start.model.net, start.initial(), ()
    covariance = torch.zeros(9, 1, 1).double()
    for step, held in zip(start.steps(), held_after(start.steps()), strict=True):
        t = torch.tensor([step.times[0]])
        features = net.features(x, t)
        s2 = head(net, features).flatten()
        rows = [(*step.output, *step.history), *step.kept]
        size = covariance.shape[1]
        linear, own = torch.zeros(held + 1, size).double(), torch.zeros(held + 1).double()
        for number, row in enumerate(rows):
            own[number] = row[1]
            for place, value in enumerate((row[0], *row[2:])[:size]):
                linear[number, place] = value
        for number in range(len(rows), held + 1):
            linear[number, number - len(step.kept)] = 1
        found = []
        for each, noise in zip(covariance, s2, strict=True):
            cross = linear @ torch.outer(each[:, 0] * slope, own)
            found.append(
                linear @ each @ linear.T + cross + cross.T + torch.outer(own, own) * noise
            )
        covariance = torch.stack(found)
        x, memory = advance(step, x, [net.head(features)], memory, held)
    return x, covariance[:, 0, 0].view(1, 1, 3, 3)


@pytest.mark.parametrize("case", CASES)
def test_of_pixels_on_their_own_one_probe_is_exact(case):
    """A 1 x 1 kernel has a diagonal derivative, which any signs give."""
    estimator, start, posterior, head = ready(case, 1, probes=1)
    slope = start.model.net.head.weight[0, 0].item()
    image, variance = by_hand(replace(start, noise=start.noise.copy()), head, slope)
    samples = estimator(start, posterior)
    torch.testing.assert_close(samples.images, image)
    torch.testing.assert_close(samples.variance, variance, rtol=1e-9, atol=0)
    torch.testing.assert_close(samples.summed[-1], variance.sum()[None])


class Given:
    """Noise that is a list of vectors, read again and again."""

    def __init__(self, noise, vectors):
        self.noise, self.vectors, self.count = noise, vectors, 0
        self.generators, self.indices = noise.generators, noise.indices

    def __call__(self):
        return self.noise()

    def fork(self, number):
        def vector():
            self.count += 1
            return self.vectors[(self.count - 1) % len(self.vectors)].view(1, 1, 3, 3)

        return vector


@pytest.mark.parametrize("case", CASES)
def test_linearised_rows_have_the_whole_covariance(case):
    estimator, start, posterior, head = ready(case, 3, probes=45, propagation="linearised")
    image, variance = slow(replace(start, noise=start.noise.copy()), head)
    # Of evaluation n, row (n, p) sees pixel p alone: every random direction once.
    chosen = torch.eye(45).double().view(5, 9, 45).transpose(1, 2) * 45**0.5
    samples = estimator(replace(start, noise=Given(start.noise, chosen.flatten(0, 1))), posterior)
    torch.testing.assert_close(samples.images, image)
    torch.testing.assert_close(samples.variance, variance, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("propagation", "cross"), [("diagonal", 1.0), ("independent", 0.0)])
def test_one_step_after_the_other_reads_the_diagonal(propagation, cross):
    estimator, start, posterior, head = ready("euler", 3, probes=16, propagation=propagation)
    net = start.model.net
    x = replace(start, noise=start.noise.copy()).initial()
    variance = torch.zeros_like(x)
    for step in start.steps():
        t = torch.tensor([step.times[0]])

        def network(x, t=t):
            return net.head(net.features(x, t))

        a, b = step.output
        jacobian = torch.autograd.functional.jacobian(network, x).reshape(9, 9)
        diagonal = jacobian.diagonal().view(1, 1, 3, 3)
        assert (jacobian - jacobian.diagonal().diag()).abs().max() > 0.1
        s2 = head(net, net.features(x, t))
        variance = a**2 * variance + 2 * cross * a * b * diagonal * variance + b**2 * s2
        x = a * x + b * network(x)
    # Rows of a Hadamard matrix: over all 16, different pixels have no product.
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    signs = torch.kron(torch.kron(pair, pair), torch.kron(pair, pair))[:, :9]
    samples = estimator(replace(start, noise=Given(start.noise, signs)), posterior)
    torch.testing.assert_close(samples.images, x.detach())
    torch.testing.assert_close(samples.variance, variance.detach(), rtol=1e-9, atol=0)


def test_seeds_change_probes_and_no_image():
    def run(**options):
        estimator, start, posterior, _ = ready("euler", 3, **options)
        return estimator(start, posterior)

    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert torch.equal(first.variance, again.variance)
    assert not torch.equal(first.variance, other.variance)
    assert torch.equal(first.images, other.images)
    assert torch.equal(first.images, plain(ready("euler", 3)[1]))
    assert first.nfe == 5 + 4 * (1 + 8) and run(propagation="independent").nfe == 5
    recorded = run(times=(0.5,))
    assert recorded.state_variance.shape == (1, 1, 1, 3, 3)


SMALL = (
    "uncertainty=variance_head", "uncertainty.probes=2", "uncertainty.fit_images=64",
    "metrics.num_images=0",
)  # fmt: skip


def test_a_run_fits_its_head_once(copied: Trained, compose: Compose, monkeypatch):
    result = pipeline.run(compose(*SMALL))
    samples = np.load(result.samples)
    assert samples["variance"].min() > 0 and samples["variance"].shape == (4, 1, 8, 8)
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["estimator"] == "variance head, diagonal, 2 probes, conditional target"
    (path,) = copied.folder.glob("variance-head-*.safetensors")
    this, solver, estimator, laplace = pipeline.prepare(compose(*SMALL))
    this.model.load_state_dict(read_checkpoint(copied.checkpoint)["state_dict"])
    posterior = laplace.fit(this.model.eval(), this.data.data)
    made = []
    real = log_variance.draws_of
    monkeypatch.setattr(log_variance, "draws_of", lambda *a, **k: made.append(1) or real(*a, **k))
    given = starts(this, solver), posterior, this.folder
    fitted = estimator.for_run(this).fit(*given)
    assert not made  # what is kept is read
    found = fitted(starts(this, solver)(range(4)), posterior)
    np.testing.assert_allclose(samples["variance"], found.variance, rtol=1e-3)
    replace(estimator, target="marginal").for_run(this).fit(*given)
    assert made and len([*copied.folder.glob("variance-head-*.safetensors")]) == 2
    assert LogVarianceHead.stored(path, "another") is None
    other = pipeline.run(compose(*SMALL, "uncertainty.propagation=independent"))
    assert other.samples != result.samples
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="delete it and run again"):
        estimator.for_run(this).fit(*given)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"propagation": "full"}, ["uncertainty.propagation 'full'", "diagonal, linearised"]),
        ({"target": "data"}, ["uncertainty.target 'data'", "conditional, marginal"]),
        ({"probes": 0}, ["uncertainty.probes", ">= 1"]),
        ({"fit_rows": 0}, ["uncertainty.fit_rows", ">= 1"]),
        ({"fit_images": 0}, ["uncertainty.fit_images", ">= 1"]),
    ],
)
def test_bad_values_are_refused(options, fragments):
    with pytest.raises(UserError) as error:
        VarianceHead(**options)
    check_line(str(error.value), fragments)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (("solver=heun",), ["solver=heun has several evaluations", "euler or ddim"]),
        (("model=diffusion", "solver=ddpm"), ["solver=ddpm draws noise", "uncertainty=ensemble"]),
        (
            ("solver.guidance=2", "model.class_dropout=0.1"),
            ["is guided", "solver.guidance=1"],
        ),
        (("model=bfn", "data=binary_digits"), ["uncertainty=ensemble"]),
        (("laplace.subset=last_block",), ["laplace.subset=last_block", "variance_head"]),
        (("uncertainty.calibrate=held_out",), ["held_out", "variance_head"]),
    ],
)
def test_runs_are_refused_in_one_line(overrides, fragments, compose: Compose):
    check_line(refused(compose, "uncertainty=variance_head", *overrides), fragments)


def test_networks_that_mix_outputs_and_no_data_are_refused():
    net = Hand(lambda x, t, y: x, [[1.0]])
    model = model_of(net)
    check_fold(model, (1, 2, 2))
    net.fold = lambda output: output + output.flip(-1)
    with pytest.raises(UserError) as error:
        check_fold(model, (1, 2, 2))
    check_line(str(error.value), ["Hand.fold mixes", "uncertainty=ensemble"])
    assert next(model.parameters()).device == CPU
    with pytest.raises(UserError, match="no data to be fitted to"):
        VarianceHead().fit(lambda numbers: start_of(model, Heun(3)), certain(net.head))
    with pytest.raises(UserError, match="use uncertainty=ensemble"):
        VarianceHead().check_model(model)
