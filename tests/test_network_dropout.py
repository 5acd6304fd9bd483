"""MC dropout in all layers of a network that was trained with it, against explicit masks."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import CPU, SOLVERS, Double, Hand, curved, model_of, plain, start_of
from test_bad_input import check_line, refused
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.networks import MLP, UNet
from bayesdiff.solvers import DDIM, Euler, SampleNoise
from bayesdiff.uncertainty import MCDropout, Samples, Start
from bayesdiff.uncertainty.members.dropout import _SALT
from bayesdiff.uncertainty.members.network_masks import NetworkMasks, dropout_layers

pytestmark = pytest.mark.usefixtures("without_reports")
POSTERIOR = curved()[1]  # never looked at


@pytest.fixture(scope="module")
def unet():
    """A U-Net in double precision with dropout in every block."""
    torch.manual_seed(0)
    net = UNet(1, 8, num_classes=3, channels=(8, 16), blocks=1, patch=2, dropout=0.3)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    net.time.register_forward_pre_hook(lambda _m, given: (given[0].double(),))
    return net.double()


class Times(nn.Module):
    """Multiplies by the next of these factors, in turn."""

    def __init__(self, *factors):
        super().__init__()
        self.factors, self.count = factors, 0

    def forward(self, x):
        self.count += 1
        return x * self.factors[(self.count - 1) % len(self.factors)]


def unet_start(net, name, labels=(0, 2)):
    solver, path, prediction = SOLVERS[name]
    model = model_of(net, path, prediction, num_classes=3)
    return start_of(model, solver, len(labels), (1, 8, 8), labels=torch.tensor(labels))


def explicit(net, masks):
    """The network with its dropout layers replaced by multiplications."""
    other = copy.deepcopy(net)
    layers = [name for name, m in other.named_modules() if isinstance(m, nn.Dropout)]
    for name, factors in zip(layers, masks, strict=True):
        parent, _, last = name.rpartition(".")
        setattr(other.get_submodule(parent), last, Times(*factors))
    return other


def drawn_masks(net, shapes, members, evaluations, seed):
    """The masks by hand: ``[evaluation][member][layer]``, zeros and 1 / (1 - p)."""
    generator, found = torch.Generator().manual_seed(seed + _SALT), []
    for _ in range(evaluations):
        found.append(
            [
                [
                    (torch.rand(shape, generator=generator) >= 0.3).double() / 0.7
                    for shape in shapes
                ]
                for _ in range(members)
            ]
        )
    return found


def inputs_of_dropout(net):
    """Shapes of what the dropout layers see, in turn, without the batch."""
    shapes = []
    hooks = [
        m.register_forward_hook(lambda _m, given, _o: shapes.append(tuple(given[0].shape[1:])))
        for m in dropout_layers(net)
    ]
    net(torch.zeros(1, 1, 8, 8).double(), torch.zeros(1), torch.zeros(1).long())
    for hook in hooks:
        hook.remove()
    return shapes


@torch.no_grad()
@pytest.mark.parametrize("mask", ["fixed", "fresh"])
@pytest.mark.parametrize("name", ["euler", "euler-guided", "heun", "ddim-eta"])
def test_members_are_networks_with_explicit_masks(name, mask, unet):
    shapes = inputs_of_dropout(unet)
    assert len(shapes) == 8 and len(shapes[0]) == 3 and shapes[0][1] > 1
    members, start = 3, unet_start(unet, name)
    count = sum(len(step.times) for step in start.steps())
    turns = count if mask == "fresh" else 1
    masks = drawn_masks(unet, shapes, members, turns, seed=5)
    estimator = MCDropout(members=members, where="network", mask=mask, seed=5, noise_members=0)
    samples = estimator(start, POSTERIOR)
    twice = 2 if "guided" in name else 1  # guidance meets the same mask twice
    images = []
    for member in range(members):
        factors = [
            [masks[turn][member][layer] for turn in range(turns) for _ in range(twice)]
            for layer in range(len(shapes))
        ]
        images.append(plain(unet_start(explicit(unet, factors), name)))
    truth = torch.stack(images).var(0)
    torch.testing.assert_close(samples.variance, truth, rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(samples.images, plain(unet_start(unet, name)))
    assert truth.min() > 0 and samples.nfe == twice * count * (1 + members)
    assert samples.nfe == estimator.evaluations(unet_start(unet, name))
    assert samples.estimator == (
        f"mc_dropout, 3 members, skip 1, the network's dropout layers, {mask} masks"
    )
    assert not any(m._forward_hooks for m in unet.modules())


def one_layer(kind, p=0.4):
    """Two features, dropout, and a head that adds them: the map has a closed form."""
    net = Hand(lambda x, t, y: None, [[1.0, -2.0]])
    net.dropout = kind(p)
    net.formula = lambda x, t, y: net.dropout(torch.cat([1 + x, 2 - x], 1))
    return net


@torch.no_grad()
@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout2d])
def test_one_evaluation_has_the_variance_of_masks(kind):
    """p / q sum_k c_k^2; positions of a channel move together for ``Dropout2d`` alone."""
    net = one_layer(kind)
    start = start_of(model_of(net), Euler(1), 2, (1, 2, 2))
    members = MCDropout(members=4000, where="network").images(start, POSTERIOR)[1]
    x_0 = start_of(model_of(net), Euler(1), 2, (1, 2, 2)).draw()
    truth = 0.4 / 0.6 * ((1 + x_0) ** 2 + 4 * (2 - x_0) ** 2)
    torch.testing.assert_close(members.var(0), truth, rtol=0.12, atol=0)
    first, second = members[:, 0, 0, 0, 0], members[:, 0, 0, 1, 1]
    tied = abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1]))
    assert tied > 0.5 if kind is nn.Dropout2d else tied < 4 / math.sqrt(4000)


@torch.no_grad()
def test_masks_leave_out_the_layers_share_and_repeat():
    layers = [nn.Dropout(0.2), nn.Dropout2d(0.5)]
    masks, x = NetworkMasks(layers, 3), torch.zeros(2, 40, 30, 30)
    for layer, p, shape in ((0, 0.2, (40, 30, 30)), (1, 0.5, (40, 1, 1))):
        mask = masks.mask(0, layer, x)
        assert mask.shape == shape
        sd = math.sqrt(p * (1 - p) / mask.numel())
        assert float(mask.double().mean()) == pytest.approx(1 - p, abs=4 * sd)
        assert masks.mask(0, layer, x[:1]) is mask
        assert not torch.equal(masks.mask(1, layer, x), mask)
    old = masks.mask(0, 0, x)
    masks.renew()
    assert not torch.equal(masks.mask(0, 0, x), old)


@torch.no_grad()
def test_maps_do_not_depend_on_how_images_are_batched(unet):
    estimator = MCDropout(members=3, where="network", noise_members=0)
    model = model_of(unet, num_classes=3)

    def run(numbers):
        noise = Double(SampleNoise(0, numbers, (1, 8, 8)))
        labels = torch.tensor(list(numbers)) % 3
        return estimator(Start(model, Euler(2), labels, noise, CPU), POSTERIOR)

    joined = Samples.join([run(part) for part in ([0, 1], [2])])
    torch.testing.assert_close(joined.variance, run(range(3)).variance, rtol=1e-9, atol=1e-15)


@torch.no_grad()
def test_fixed_masks_stay_where_fresh_ones_fade_with_the_steps(unet):
    total = {}
    for mask in ("fixed", "fresh"):
        for steps in (2, 16):
            start = unet_start(unet, "euler")
            start = Start(start.model, Euler(steps), start.condition, start.noise, CPU)
            estimator = MCDropout(members=12, where="network", mask=mask, noise_members=0)
            total[mask, steps] = float(estimator(start, POSTERIOR).variance.sum())
    assert total["fixed", 16] > 0.6 * total["fixed", 2]
    assert total["fresh", 16] < 0.4 * total["fresh", 2]


@torch.no_grad()
def test_transformer_layers_are_masked_too():
    """Their fused path would pass over the dropout within."""
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.5, batch_first=True).double().eval()
    net = Hand(lambda x, t, y: None, [[1.0, -2.0]])
    net.layer = layer

    def formula(x, t, y):
        rows = torch.cat([1 + x, 2 - x], 1).flatten(2).mT
        return layer(rows).mT.unflatten(2, x.shape[2:])

    net.formula = formula
    start = start_of(model_of(net), DDIM(1), 2, (1, 2, 2))
    assert MCDropout(members=4, where="network")(start, POSTERIOR).variance.min() > 0


def test_networks_without_dropout_are_refused():
    for net in (UNet(1, 8, channels=(8, 16), blocks=1), MLP(shape=(1, 1, 2), width=8, blocks=1)):
        with pytest.raises(UserError) as error:
            MCDropout(where="network").check_model(model_of(net))
        check_line(str(error.value), ["where=network", type(net).__name__, "net.dropout=0.1"])
        MCDropout().check_model(model_of(net))
    assert len(dropout_layers(UNet(1, 8, channels=(8, 16), blocks=1, dropout=0.1))) == 8


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"where": "body"}, ["uncertainty.where 'body'", "head, network"]),
        ({"where": "network", "p": 0.2}, ["uncertainty.p=0.2", "leave it at null"]),
        ({"where": "network", "members": 1}, ["uncertainty.members", ">= 2"]),
    ],
)
def test_bad_values_are_refused(options, fragments):
    with pytest.raises(UserError) as error:
        MCDropout(**options)
    check_line(str(error.value), fragments)


def test_a_run_with_dropout_has_maps_and_one_without_is_refused(copied: Trained, compose: Compose):
    given = ("uncertainty=mc_dropout", "uncertainty.where=network")
    check_line(refused(compose, *given), ["where=network", "net.dropout=0.1", "where=head"])
    small = (*given, "uncertainty.members=2", "metrics.num_images=0", "net.dropout=0.1")
    result = pipeline.run(compose(*small))
    samples = np.load(result.samples)
    assert (samples["variance"] > 0).any() and samples["nfe"] == 3 * 3
