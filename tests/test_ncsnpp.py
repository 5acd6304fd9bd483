"""NCSN++: an exploding path, a network that adds an image behind its head and divides by sigma."""

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")

import pretrained_checks as checks  # noqa: E402
from diffusers import (  # noqa: E402
    DDPMPipeline,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    ScoreSdeVeScheduler,
    UNet2DModel,
)
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput  # noqa: E402
from pipelines import CALLS, LINEAR, PIPELINES  # noqa: E402
from torch import nn  # noqa: E402
from torch.func import vmap  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.laplace.gradients import gradients  # noqa: E402
from bayesdiff.laplace.gram import gram, gram_diagonal  # noqa: E402
from bayesdiff.laplace.head import HeadGeometry, apply_head, head_matrix  # noqa: E402
from bayesdiff.networks.carrying import CarryingConv2d, CarryingLinear  # noqa: E402
from bayesdiff.networks.forward_mode import jvp  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.pretrained.head import tapped  # noqa: E402
from bayesdiff.solvers import DDIM, Euler, Heun  # noqa: E402
from bayesdiff.uncertainty import Ensemble, Linearised, TotalVariance  # noqa: E402
from bayesdiff.uncertainty.recursion.uncertain_head import UncertainHead  # noqa: E402
from bayesdiff.uncertainty.sensitivities.linearised import directions  # noqa: E402

SIGMAS = 0.01, 0.6
QUICK = {"uncertainty": Ensemble(members=2)}


@pytest.fixture(scope="module")
def made():
    pipe = PIPELINES["ncsnpp"]()
    return pipe, *checks.fitted(pipe, CALLS["ncsnpp"], prior_precision=1e8)


@pytest.fixture
def model(made):
    """Ours, in double precision, with the network that it came from."""
    bayes = made[1]
    ours = copy.deepcopy(checks._model(bayes)).double()
    ours.net.module.dtype = torch.float64
    return ours, copy.deepcopy(bayes.followed.network).double()


def noise(network, x, t):
    """What the score stands for, by formulas of its own."""
    sigma = (SIGMAS[0] * (SIGMAS[1] / SIGMAS[0]) ** (1 - t)).float().double()
    return -sigma.view(-1, 1, 1, 1) * network(x, sigma).sample


def states(count=3, seed=5):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.1, 0.9, count, dtype=torch.float64)


@pytest.mark.parametrize("steps", [2, 3, 7])
def test_images_are_the_pipelines_own(made, steps):
    pipe, bayes, _, _ = made
    error = checks.scheduler_error(bayes, pipe, {"num_inference_steps": steps})
    assert error < 1e-5
    out = bayes(num_inference_steps=steps, **QUICK)
    assert out.images.std() > 0.05
    assert torch.allclose(out.latent_variance, out.variance)  # states lie in [0, 1] too


def test_the_split_is_exact_at_the_price_of_one_evaluation(model):
    ours, network = model
    x, t = states()
    runs = []
    ours.net.module.register_forward_hook(lambda *_: runs.append(1))
    features = ours.net.features(x, t)
    assert len(runs) == 1
    assert features.shape == (3, 32 + 3, 8, 8)
    assert ours.prediction == "noise"
    output = ours.net.fold(ours.net.head(features))
    assert torch.allclose(output, noise(network, x, t), rtol=1e-12, atol=1e-13)
    # What is carried does not depend on the head, and is not all.
    assert features[:, 32:].abs().mean() > 0.1
    ours.net.head.weight.zero_()
    ours.net.head.bias.zero_()
    assert torch.equal(ours.net.head(features), features[:, 32:])


def test_derivatives_run_through_what_is_carried(model):
    ours, network = model
    x, t = states(2)
    rows = torch.randn(3, *x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))

    def along(function):
        return vmap(lambda d: jvp(lambda state: function(state, t), (x,), (d,))[1])(rows)

    own = along(ours.net)
    assert torch.allclose(own, along(lambda z, t: noise(network, z, t)), rtol=1e-10, atol=1e-12)
    # No tensor of the transformation stays behind.
    assert ours.net._tap.kept == []
    assert torch.allclose(ours.net(x, t), noise(network, x, t), rtol=1e-12, atol=1e-13)


def test_nothing_stays_behind_a_run_that_fails(model):
    ours, _ = model
    x, t = states()
    handle = ours.net.module.module.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ours.net.features(x, t)
    handle.remove()
    assert ours.net._tap.kept == []


def test_the_curvature_is_that_of_the_dense_jacobian():
    with checks.double_by_default():
        bayes, _, images = checks.fitted(PIPELINES["ncsnpp"](), CALLS["ncsnpp"], 2, wide=True)
        assert checks.split_error(bayes) < 1e-12
        assert checks.curvature_error(bayes, images, None) < 1e-8
    # Residuals of a network that knows nothing are about the noise itself.
    assert 0.7 < bayes.posterior.curvature.sigma_mle < 2


class Mirrored(Ensemble):
    """Members on both sides of the mean, along directions that ``Linearised`` follows."""

    def weights(self, posterior):
        deltas = directions(posterior, self.members // 2, self.seed)
        return posterior.curvature.mean + torch.cat([deltas, -deltas])


def test_first_order_maps_are_those_of_an_ensemble(made):
    _, bayes, _, _ = made
    asked = {"num_images": 2, "num_inference_steps": 4}
    exact = bayes(uncertainty=Linearised(draws=24), **asked).variance
    members = bayes(uncertainty=Mirrored(members=48), **asked).variance * 47 / 48
    pair = torch.stack([exact.flatten(), members.flatten()])
    assert torch.corrcoef(pair)[0, 1] > 0.999
    assert 0.99 < exact.mean() / members.mean() < 1.01
    fresh = bayes(uncertainty=Ensemble(members=96), **asked).variance
    assert 0.7 < exact.mean() / fresh.mean() < 1.4


def test_weights_that_change_leave_what_is_carried(made):
    _, bayes, _, _ = made
    ours = checks._model(bayes)
    x, t = states(2)
    features = ours.net.features(x.float(), t)
    empty = features.clone()
    empty[:, 32:] = 0

    class Bare:
        model, guidance = ours, 1.0

    head = UncertainHead(Bare, bayes.posterior)
    added = [
        head.shared_noise(2, torch.Generator().manual_seed(0))([each])
        for each in (features, empty)
    ]
    assert torch.equal(*added)
    own, bare = (bayes.posterior.predictive_variance(each) for each in (features, empty))
    assert torch.equal(own, bare)


def test_a_posterior_is_kept(made, tmp_path):
    pipe, bayes, _, _ = made
    bayes.save(tmp_path)
    again = BayesianPipeline.load(pipe, tmp_path)
    assert again.posterior.curvature.geometry == HeadGeometry(32, 3, True, carried=3)
    quick = {"num_inference_steps": 3, **QUICK}
    assert torch.equal(again(**quick).variance, bayes(**quick).variance)


def test_solvers_of_ours_follow_its_flow_or_are_refused(made):
    _, bayes, _, _ = made
    many = {"num_inference_steps": 2, **QUICK}
    fine, coarse, euler = (bayes(solver=s, **many).images for s in (Heun(40), Heun(15), Euler(80)))
    assert (coarse - fine).abs().mean() < 0.01
    assert (euler - fine).abs().mean() < 0.02
    assert fine.std() > 0.1
    with pytest.raises(UserError, match="use solver=euler, heun"):
        bayes(solver=DDIM(4), **many)
    with pytest.raises(UserError, match="says nothing of decoded pixels"):
        bayes(uncertainty=TotalVariance(), num_inference_steps=2)


def test_its_corrector_is_refused_with_the_cure(made):
    pipe, _, _, _ = made
    other = copy.copy(pipe)
    other.scheduler = ScoreSdeVeScheduler(sigma_max=0.6, correct_steps=1)
    with pytest.raises(UserError, match="correct_steps=0"):
        BayesianPipeline(other)
    other.scheduler.register_to_config(correct_steps=0)
    BayesianPipeline(other)


def test_a_network_that_does_not_divide_predicts_the_score():
    torch.manual_seed(0)
    pipe = PIPELINES["ncsnpp"]()
    config = {k: v for k, v in pipe.unet.config.items() if not k.startswith("_")}
    pipe.unet = UNet2DModel(**config | {"time_embedding_type": "positional"}).eval()
    bayes, call, _ = checks.fitted(pipe, CALLS["ncsnpp"], prior_precision=1e6)
    assert checks._model(bayes).prediction == "score"
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5


class Odd(nn.Module):
    """The head, and something behind it."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.out, self.kind = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 3, padding=1), kind

    def forward(self, x, t, y=None):
        out = self.out(self.body(x).tanh())
        if self.kind == "time":
            return out * t.float().view(-1, 1, 1, 1)
        if self.kind == "twice":
            return torch.cat([out, out], 1)[:, :4] + x.mean(1, keepdim=True)
        return out[:, [2, 0]] * 3 + x[:, :2]


def test_what_is_added_follows_places_and_rows():
    torch.manual_seed(0)
    net, x, t = Odd("fewer"), torch.randn(2, 3, 6, 5), torch.tensor([0.2, 0.9])
    truth = net(x, t)
    ours = tapped(net, (3, 6, 5))
    assert ours.features(x, t).shape == (2, 8 + 2, 6, 5)
    assert torch.allclose(ours(x, t), truth, atol=1e-6)
    for kind, why in (("time", "same for all states and times"), ("twice", "several times")):
        with pytest.raises(UserError, match=why):
            tapped(Odd(kind), (3, 6, 5))


@pytest.mark.parametrize("kind", [CarryingConv2d, CarryingLinear])
def test_heads_that_carry_are_plain_ones_with_an_offset(kind):
    torch.manual_seed(0)
    convolution = kind is CarryingConv2d
    options = (4, 2, 3) if convolution else (4, 2)
    more = {"dtype": torch.float64} | ({"padding": 1} if convolution else {})
    head = kind(*options, **more)
    plain = kind.__mro__[1](*options, **more)
    plain.load_state_dict(head.state_dict())
    axis = 1 if convolution else -1
    features = torch.randn((3, 6, 5, 4) if convolution else (3, 5, 6), dtype=torch.float64)
    read, offset = features.narrow(axis, 0, 4), features.narrow(axis, 4, 2)
    assert torch.allclose(head(features), plain(read) + offset)
    weights = torch.stack([head_matrix(head), 2 * head_matrix(head)])
    own = apply_head(head, features[None], weights)
    assert torch.allclose(own[0], head(features))
    free = apply_head(plain, read[None], weights)
    assert torch.allclose(own, free + offset)
    assert torch.equal(apply_head(head, features[None], weights, change=True), free)
    assert torch.allclose(gram(head, features), gram(plain, read))
    assert torch.allclose(gram_diagonal(head, features), gram_diagonal(plain, read))
    residual = torch.randn_like(offset)
    assert torch.equal(gradients(head, features, residual), gradients(plain, read, residual))
    with pytest.raises(UserError, match=r"D = 4 \+ 2 carried"):
        gram(head, read)


class SplittingPipeline(DDPMPipeline):
    """Gives its scheduler the channels of the mean alone, as pipelines of other classes do."""

    @torch.no_grad()
    def __call__(self, generator=None, num_inference_steps=4, output_type="np"):
        x = torch.randn(1, 3, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            mean = self.unet(x, t).sample[:, :3]
            x = self.scheduler.step(mean, t, x, generator=generator).prev_sample
        return ImagePipelineOutput((x / 2 + 0.5).clamp(0, 1).movedim(1, 3).numpy())


def test_adm_follows_the_cures_of_its_learned_noise():
    pipe = PIPELINES["adm"]()
    refused = BayesianPipeline.of(pipe)
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    refused.fit(images)
    with pytest.raises(UserError, match="fixed_small"):
        refused(num_inference_steps=3, **QUICK)
    assert math.isfinite(refused.posterior.sigma_noise)
    pipe.scheduler = DPMSolverMultistepScheduler(**LINEAR, variance_type="learned_range")
    bayes, call, _ = checks.fitted(pipe, CALLS["adm"])
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5
    ancestral = DDPMScheduler(**LINEAR, clip_sample=False, variance_type="fixed_small")
    pipe = SplittingPipeline(pipe.unet, ancestral)
    bayes, call, _ = checks.fitted(pipe, CALLS["adm"])
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5
    assert any(step.stochastic for step in bayes.followed.scheduled(None, {}, 4, 1.0).own)
