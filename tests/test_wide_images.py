"""Images that are not square, from the source to the figures."""

import numpy as np
import pytest
import torch
from hand import CPU, Noise, model_of, posterior_of, random_covariance
from hydra.errors import InstantiationException
from PIL import Image
from torch.func import functional_call

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.head import head_matrix
from bayesdiff.networks import UNet
from bayesdiff.runs.build import build
from bayesdiff.solvers import Euler
from bayesdiff.uncertainty import Start
from bayesdiff.uncertainty.members.ensemble import Ensemble
from bayesdiff.uncertainty.sensitivities.linearised import Linearised

SOURCE = "data.source._target_=own_sources.wide_digits"
SHAPE = (1, 8, 12)
TIMES = (0.0, 0.25, 0.5, 0.75, 1.0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    net = UNet(1, (8, 12), channels=(4, 8), blocks=1, patch=2).double()
    with torch.no_grad():
        for weight in net.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    # Its sines and cosines of the time are in single precision.
    net.time.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))
    return model_of(net)


def image_under(model, noise):
    """Euler's steps with the plain forward pass, as a function of the head's weights."""

    def image(weights):
        own = {"weight": weights[:, :-1].view_as(model.net.head.weight), "bias": weights[:, -1]}
        named = {f"head.{name}": value for name, value in own.items()}
        x = noise
        for t, after in zip(TIMES[:-1], TIMES[1:], strict=True):
            at = torch.full((len(x),), t, dtype=x.dtype)
            x = x + (after - t) * functional_call(model.net, named, (x, at))
        return x

    return image


def test_maps_are_those_of_members_one_by_one(model):
    posterior = posterior_of(model.net.head, random_covariance(37, 0.3))
    start = Start(model, Euler(4), None, Noise(2, SHAPE), CPU)
    ensemble = Ensemble(members=5, seed=3)
    with torch.no_grad():
        found = ensemble(start, posterior)
        image = image_under(model, Noise(2, SHAPE)())
        members = torch.stack([image(own) for own in ensemble.weights(posterior)])
        mean = image(head_matrix(model.net.head))
    assert found.variance.shape == (2, *SHAPE)
    torch.testing.assert_close(found.variance, members.var(0), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(found.images, mean, rtol=1e-6, atol=1e-9)


def test_the_linearised_map_is_that_of_the_jacobian(model):
    covariance = random_covariance(37, 0.3)
    posterior = posterior_of(model.net.head, covariance)
    start = Start(model, Euler(4), None, Noise(1, SHAPE), CPU)
    with torch.no_grad():
        found = Linearised(draws="all")(start, posterior)
    image = image_under(model, Noise(1, SHAPE)())
    jacobian = torch.autograd.functional.jacobian(image, head_matrix(model.net.head))
    rows = jacobian.flatten(0, 3)  # pixels x channels of the head x P
    truth = torch.einsum("npq,qr,npr->n", rows, posterior.covariance, rows).view(1, *SHAPE)
    torch.testing.assert_close(found.variance, truth, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("uncertainty", ["ensemble", "refined", "published"])
@pytest.mark.usefixtures("every_figure_drawn")
def test_a_whole_run_of_wide_images(compose, uncertainty):
    own = ("metrics.export=png", "uncertainty.export=png", "report.sorted_by=[map.sum]")
    result = pipeline.run(compose(SOURCE, f"uncertainty={uncertainty}", *own, "net.patch=2"))
    assert any(name.startswith("fid@12") for name in result.metrics)
    assert any(name.startswith("real/fid@12") for name in result.metrics)
    (grid,) = result.folder.glob("figures/**/samples.png")
    wide, high = Image.open(grid).size
    assert wide > 100 and high > 100
    files = sorted((result.folder / "png").glob("00000*.png"))
    assert files and all(np.array(Image.open(file)).shape[:2] == (8, 12) for file in files)


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (("+data.source.width=11",), "image size 8 x 11 is not divisible by 2; .*data.crop"),
        (("net.patch=8",), "image size 8 x 12 is not divisible by 16"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused(compose, options, fragment):
    with pytest.raises(InstantiationException, match=fragment) as error:
        build(compose(SOURCE, *options))
    assert isinstance(error.value.__cause__, UserError)


def test_the_network_of_squares_is_the_same_by_one_side_or_both():
    torch.manual_seed(0)
    one = UNet(1, 8, channels=(4, 8))
    torch.manual_seed(0)
    both = UNet(1, (8, 8), channels=(4, 8))
    for a, b in zip(one.parameters(), both.parameters(), strict=True):
        assert torch.equal(a, b)
