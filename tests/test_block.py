"""A posterior wider than the head: factors, draws, members, artefacts of the last block."""

import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Compose, Trained
from hand import Hand, model_of, plain, real_start, small_unet
from test_bad_input import check_line, refused
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.block import fit as block
from bayesdiff.laplace.block.fit import check_block, fit_block
from bayesdiff.laplace.block.kinds import KINDS, Beside
from bayesdiff.laplace.block.layers import layer_matrix, layers_of
from bayesdiff.laplace.block.posterior import BlockPosterior, LayerPosterior
from bayesdiff.laplace.block.record import BlockFactors, LayerFactors
from bayesdiff.laplace.callback import LastLayerLaplace
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.uncertainty import Ensemble, Linearised, TotalVariance
from bayesdiff.uncertainty.members.block_ensemble import BlockEnsemble
from bayesdiff.uncertainty.sensitivities.layers_linearised import LayersLinearised
from bayesdiff.uncertainty.wider import check_wider, with_block


class Small(nn.Module):
    """A body that is a formula, a block, a head; float64."""

    def __init__(self, layers, head):
        super().__init__()
        torch.manual_seed(3)
        self.last_block, self.head = nn.Sequential(*layers()).double(), head().double()

    def features(self, x, t, y=None):
        t = t.double().view(-1, 1, 1, 1)
        return self.last_block(torch.cat([torch.tanh(x.double() + t), x.double() ** 2], 1))

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))


class Channels(nn.Module):
    """A linear layer over the channels of one pixel."""

    def __init__(self, width_in, width_out):
        super().__init__()
        self.layer = nn.Linear(width_in, width_out)

    def forward(self, x):
        return self.layer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def pictures(count, size, channels=1):
    generator = torch.Generator().manual_seed(5)
    return torch.randint(
        256, (count, channels, size, size), generator=generator, dtype=torch.uint8
    )


@pytest.fixture
def seen(monkeypatch):
    """Networks and inputs of every batch of the pass."""
    found, forward = [], block.Flat.forward

    def record(self, inputs):
        found.append((self.net, inputs))
        return forward(self, inputs)

    monkeypatch.setattr(block.Flat, "forward", record)
    return found


def dense_ggn(seen, name):
    """J^T J over all batches by autograd, weights as rows ``(C, P)``."""
    total = 0
    for net, inputs in seen:
        layer = net.get_submodule(name)

        def outputs(matrix, net=net, inputs=inputs, layer=layer):
            weight = matrix[:, : layer.weight[0].numel()].reshape(layer.weight.shape)
            given = {f"{name}.weight": weight}
            if layer.bias is not None:
                given[f"{name}.bias"] = matrix[:, -1]
            call = (inputs["x"], inputs["t"], inputs["y"])
            return torch.func.functional_call(net, given, call).flatten()

        jacobian = torch.autograd.functional.jacobian(outputs, layer_matrix(layer)).flatten(1)
        total = total + jacobian.T @ jacobian
    return total


EXACT = {
    "one position": (lambda: [Channels(2, 3)], lambda: nn.Conv2d(3, 1, 1), 1),
    "no bias": (lambda: [nn.Conv2d(2, 3, 1, bias=False)], lambda: nn.Conv2d(3, 1, 1), 3),
    "positions apart": (lambda: [nn.Conv2d(2, 3, 1)], lambda: nn.Conv2d(3, 1, 1), 4),
    "patches": (lambda: [nn.Conv2d(2, 3, 3, padding=1)], lambda: nn.Conv2d(3, 1, 1), 4),
}  # fmt: skip


@pytest.mark.parametrize("case", EXACT)
def test_factors_are_the_dense_ggn_where_the_factorisation_is_exact(case, seen):
    """A constant Jacobian that keeps positions apart: second moment of the input (x) W^T W."""
    layers, head, size = EXACT[case]
    net = Small(layers, head)
    (name,) = layers_of(net, "last_block")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    factors = fit_block(
        model_of(net), pictures(12, size), None, source="s", draws=2, batch_size=5, probes="all"
    )
    got = factors.layers[name]
    assert len(seen) == 6 and got.bias == (case != "no bias")
    truth = dense_ggn(seen, name) / 2
    torch.testing.assert_close(torch.kron(got.output, got.input), truth, rtol=1e-10, atol=1e-10)
    weights = net.head.weight.detach().flatten(1)
    closed = 12 * size**2 * weights.T @ weights
    torch.testing.assert_close(got.output, closed, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_a_block_that_is_a_head_has_the_posterior_of_that_head(structure):
    """The same layer, once before a head that only copies, once as the head itself."""
    net = Small(lambda: [nn.Conv2d(2, 2, 3, padding=1)], lambda: nn.Conv2d(2, 2, 1, bias=False))
    with torch.no_grad():
        net.head.weight.copy_(torch.eye(2).view(2, 2, 1, 1))
    images = pictures(12, 4, 2)
    net.last_block[0] = nn.Conv2d(4, 2, 3, padding=1).double()
    options = {"source": "s", "draws": 2, "batch_size": 5, "seed": 3, "num_images": 11}
    factors = fit_block(model_of(net), images, None, probes="all", **options)

    other = Small(lambda: [nn.Identity()], lambda: nn.Conv2d(4, 2, 3, padding=1))
    other.head.load_state_dict(net.last_block[0].state_dict())
    numbers = {"sigma_noise": 0.3, "prior_precision": 0.7, "n_eff": 500.0}
    curvature = fit_curvature(model_of(other), images, None, **options)
    head = HeadPosterior.fit(curvature, structure=structure, **numbers)
    (layer,) = BlockPosterior.beside(head, factors).layers.values()
    wanted = torch.block_diag(head.covariance, head.covariance)
    torch.testing.assert_close(layer.covariance, wanted, rtol=1e-9, atol=1e-12)
    values, known = layer.eigenvalues.flatten().sort().values, head.eigenvalues.repeat(2)
    torch.testing.assert_close(values, known.sort().values, rtol=1e-9, atol=1e-6)


def slow_factors(seen, name):
    """Second moments of inputs and of every output's gradient: a loop over the outputs."""
    inner, outer, images = 0, 0, 0
    for net, inputs in seen:
        layer, held = net.get_submodule(name), {}

        def keep(_layer, given, output, held=held):
            held["input"], held["output"] = given[0], output

        hook = layer.register_forward_hook(keep)
        values = net(inputs["x"], inputs["t"], inputs["y"]).flatten(1)
        hook.remove()
        a = held["input"].detach().double()
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, padding=layer.padding).mT
        rows = a.reshape(-1, a.shape[-1])
        rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=rows.dtype)], 1)
        inner = inner + rows.T @ rows * len(a) / len(rows)
        for number in range(values.shape[1]):
            (g,) = torch.autograd.grad(values[:, number].sum(), held["output"], retain_graph=True)
            g = g.double() if g.ndim == 2 else g.double().flatten(2).mT.flatten(0, 1)
            outer = outer + g.T @ g
        images += len(a)
    return inner / images, outer


def test_every_layer_of_the_unets_last_block_has_its_factors(seen):
    """Convolutions, the modulation by time and label, and the 1x1 skip, on real inputs."""
    net, _ = small_unet()
    names = [f"up.{len(net.up) - 1}.{n}" for n in ("conv_1", "modulate", "conv_2", "skip")]
    assert list(layers_of(net, "last_block")) == names and net.last_block is net.up[-1]
    model = model_of(net, num_classes=3)
    labels = torch.arange(12) % 3
    factors = fit_block(
        model, pictures(12, 8), labels, source="s", batch_size=7, probes="all", seed=1
    )
    assert [len(inputs["y"]) for _, inputs in seen] == [7, 5] and len(seen) == 2
    given = list(seen)
    for name, layer in factors.layers.items():
        assert layer.bias and layer.shape == tuple(layer_matrix(net.get_submodule(name)).shape)
        inner, outer = slow_factors(given, name)
        torch.testing.assert_close(layer.input, inner, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.output, outer, rtol=1e-4, atol=1e-4)


def test_the_draws_are_those_of_the_heads_pass():
    """The same images, times, noise and labels, whatever the batch."""
    net, _ = small_unet()
    model, labels = model_of(net, num_classes=3), torch.arange(12) % 3
    inputs = []
    options = {"source": "s", "draws": 2, "num_images": 11, "batch_size": 4, "seed": 7}
    net.register_forward_pre_hook(lambda _net, given: inputs.append(given[:3]))
    fit_block(model, pictures(12, 8), labels, probes=1, **options)
    of_block, features = list(inputs), []
    net.head.register_forward_pre_hook(lambda _head, given: features.append(given[0]))
    fit_curvature(model, pictures(12, 8), labels, **options)
    assert len(features) == len(of_block) == 6
    for (x, t, y), wanted in zip(of_block, features, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(net.features(x, t, y), wanted, rtol=1e-5, atol=1e-5)


def test_random_probes_are_right_on_average_and_repeat():
    net = Small(lambda: [nn.Conv2d(2, 3, 3, padding=1), nn.SiLU()], lambda: nn.Conv2d(3, 1, 3))
    model, images = model_of(net), pictures(30, 5)
    options = {"source": "s", "batch_size": 10}
    (exact,) = fit_block(model, images, None, probes="all", **options).layers.values()
    (rough,) = fit_block(model, images, None, probes=2, **options).layers.values()
    (again,) = fit_block(model, images, None, probes=2, **options).layers.values()
    (close,) = fit_block(model, images, None, probes=400, **options).layers.values()
    assert torch.equal(rough.output, again.output)
    torch.testing.assert_close(rough.input, exact.input, rtol=1e-12, atol=1e-12)
    size = exact.output.norm()
    assert 0.01 < (rough.output - exact.output).norm() / size < 0.5
    assert (close.output - exact.output).norm() / size < 0.03


def spread(size, seed):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size + 2, dtype=torch.float64, generator=generator)
    return root @ root.T / size


def some_factors(**shapes):
    layers = {
        name: LayerFactors(
            spread(columns, 1),
            40 * spread(rows, 2),
            spread(max(rows, columns), 3)[:rows, :columns],
            True,
        )
        for name, (rows, columns) in shapes.items()
    }
    return BlockFactors(layers, num_images=20, source="w-d-p")


@pytest.mark.parametrize("structure", ["full", "kron"])
def test_draws_have_the_covariance_of_the_inverse_precision(structure):
    factors = some_factors(a=(2, 4))
    layer = factors.layers["a"]
    posterior = BlockPosterior(factors, structure, 0.5, dict.fromkeys(factors.layers, 2.0), 60.0)
    inner = layer.input.clone()
    if structure == "kron":
        inner[-1, :-1] = inner[:-1, -1] = 0
    precision = 60 / 20 / 0.5**2 * torch.kron(layer.output, inner)
    precision += 2 * torch.eye(8, dtype=torch.float64)
    truth = torch.linalg.inv(precision)
    got = posterior.layers["a"].covariance
    torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-14)
    draws = posterior.deviations(40_000, torch.Generator().manual_seed(0))["a"].flatten(1)
    sd = truth.diagonal().sqrt()
    apart = (draws.T @ draws / len(draws) - truth) / (sd[:, None] * sd)
    assert apart.abs().max() < 0.03 and (draws.mean(0) / sd).abs().max() < 0.03
    counted = 8 - 2 * float(truth.trace())
    assert posterior.effective_parameters == pytest.approx(counted)
    assert posterior.num_parameters == 8


def test_kron_is_the_posterior_that_laplace_torch_makes_of_the_same_factors():
    from laplace.utils import Kron

    factors = some_factors(a=(2, 4))
    layer = factors.layers["a"]
    # A trailing 1 has the second moment 1.
    inner = layer.input.clone()
    inner[-1, -1] = 1.0
    layer = replace(layer, input=inner)
    theirs = Kron([[layer.output, inner[:-1, :-1]], [layer.output]]).decompose() * (1 / 0.5**2)
    theirs = theirs + torch.tensor([2.0, 2.0], dtype=torch.float64)
    order = torch.tensor([0, 1, 2, 4, 5, 6, 3, 7])  # all weights, then all biases
    ours = LayerPosterior.of(layer, "kron", 1 / 0.5**2, 2.0).covariance[order][:, order]
    torch.testing.assert_close(ours, theirs.to_matrix(exponent=-1), rtol=1e-10, atol=1e-14)


def unet_posterior(prior=2000.0):
    """A U-Net with posteriors of head and last block by hand, both modest."""
    net, head = small_unet()
    shapes = {
        name: layer_matrix(layer).shape for name, layer in layers_of(net, "last_block").items()
    }
    model = model_of(net, num_classes=3)
    factors = replace(some_factors(**shapes), source=f"{weights_key(model)}-d-p")
    return (
        net,
        head,
        BlockPosterior(factors, "full", 1.0, dict.fromkeys(factors.layers, prior), 20.0),
    )


@torch.no_grad()
@pytest.mark.parametrize("name", ["euler", "euler-guided", "ddim-eta"])
def test_members_are_whole_networks_drawn_from_both_posteriors(name):
    """Against loading each draw into the network itself and sampling."""
    net, head, posterior = unet_posterior()
    start = real_start(net, name)
    own = replace(
        posterior,
        factors=replace(posterior.factors, source=f"{weights_key(start.model)}-d-p"),
    )
    estimator = BlockEnsemble(members=3, noise_members=0, seed=4, block=own)
    ready = estimator.fit(lambda numbers: real_start(net, name), head)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    samples = ready(real_start(net, name), head)
    heads = Ensemble(members=3, seed=4).weights(head)
    generator = torch.Generator().manual_seed(4 + 4_000_037)
    deviations = own.deviations(3, generator)
    images = [plain(real_start(net, name))]
    for number in range(3):
        matrices = {"head": heads[number]}
        for layer, deviation in deviations.items():
            matrices[layer] = layer_matrix(net.get_submodule(layer)) + deviation[number]
        for layer, matrix in matrices.items():
            module = net.get_submodule(layer)
            module.weight.copy_(matrix[:, :-1].reshape(module.weight.shape))
            module.bias.copy_(matrix[:, -1])
        images.append(plain(real_start(net, name)))
        net.load_state_dict(before)
    torch.testing.assert_close(samples.images, images[0], rtol=1e-4, atol=1e-5)
    truth = torch.stack(images[1:]).var(0)
    torch.testing.assert_close(samples.variance, truth, rtol=1e-3, atol=1e-6)
    alone = Ensemble(members=3, noise_members=0, seed=4)(real_start(net, name), head)
    assert (samples.variance.sum() / alone.variance.sum() - 1).abs() > 0.05
    assert samples.estimator == "ensemble, 3 members, skip 1, " + own.described
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@torch.no_grad()
def test_draws_do_not_depend_on_the_batch():
    net, head, posterior = unet_posterior()
    whole = real_start(net, "euler")
    ready = BlockEnsemble(members=3, noise_members=0, block=posterior).fit(lambda n: whole, head)
    together = ready(real_start(net, "euler"), head)
    for row in range(2):
        start = real_start(net, "euler")
        noise = type(start.noise)(1, [(4, 7)[row]], (1, 8, 8))
        alone = ready(replace(start, condition=start.labels[row : row + 1], noise=noise), head)
        torch.testing.assert_close(alone.variance[0], together.variance[row], rtol=1e-3, atol=1e-7)


@torch.no_grad()
def test_certain_posteriors_leave_the_image_alone():
    net, head, posterior = unet_posterior(prior=1e30)
    certain = replace(head, prior_precision=1e30)
    ready = BlockEnsemble(members=2, noise_members=0, block=posterior)
    ready = ready.fit(lambda numbers: real_start(net, "euler"), certain)
    samples = ready(real_start(net, "euler"), certain)
    torch.testing.assert_close(samples.images, plain(real_start(net, "euler")))
    assert float(samples.variance.max()) < 1e-10
    for network in ready.networks:
        assert all(
            torch.equal(v, net.state_dict()[k]) for k, v in network.net.state_dict().items()
        )


def test_a_network_of_other_weights_is_refused():
    net, head, posterior = unet_posterior()
    with torch.no_grad():
        net.head.bias.add_(1)
    with pytest.raises(UserError, match="computed from .*-d-p, not from"):
        BlockEnsemble(members=2, block=posterior).fit(lambda n: real_start(net, "euler"), head)
    other = replace(head, curvature=replace(head.curvature, source="v-d-p"))
    with pytest.raises(UserError, match=r"block file"):
        BlockPosterior.beside(other, some_factors(a=(2, 4)))
    mine = replace(head, curvature=replace(head.curvature, source="w-d-another pass"))
    assert BlockPosterior.beside(mine, some_factors(a=(2, 4))).structure == "full"
    with pytest.raises(UserError, match="cannot be diag"):
        BlockPosterior.beside(replace(mine, structure="diag"), some_factors(a=(2, 4)))


def test_factors_survive_their_file_and_their_key_tells_them_apart(tmp_path):
    factors, path = some_factors(a=(2, 4), b=(3, 3)), tmp_path / "block.safetensors"
    factors.save(path)
    read = BlockFactors.load(path)
    assert read.key == factors.key and list(read.layers) == ["a", "b"]
    assert (read.num_images, read.source) == (20, "w-d-p")
    assert torch.equal(read.layers["b"].output, factors.layers["b"].output)
    moved = replace(factors.layers["a"], output=factors.layers["a"].output * (1 + 1e-12))
    keys = {
        factors.key,
        replace(factors, layers={**factors.layers, "a": moved}).key,
        replace(factors, num_images=21).key,
        replace(factors, source="w-d-q").key,
    }
    assert len(keys) == 4
    assert (
        KINDS["kronecker"].stored(path, "w-d-p") is not None
        and KINDS["kronecker"].stored(None, "w-d-p") is None
    )
    assert KINDS["kronecker"].stored(path, "w-d-more draws") is None
    with pytest.raises(UserError, match="computed from w-d-p"):
        KINDS["kronecker"].stored(path, "w-other images-p")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_unreadable_factors_are_refused_in_one_line(tmp_path):
    path = tmp_path / "block.safetensors"
    some_factors(a=(2, 4)).save(path)
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[-3] ^= 1
    for content, words in (
        (whole[:-8], "cannot be read"),
        (bytes(spoilt), "damaged"),
        (b"\x80\x04N.", "cannot be read"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as error:
            BlockFactors.load(path)
        check_line(str(error.value), ["delete it"])
    with pytest.raises(UserError, match="not finite"):
        BlockFactors(
            {"a": LayerFactors(torch.full((2, 2), torch.nan), torch.eye(2), torch.eye(2), True)},
            1,
            "s",
        )
    with pytest.raises(UserError, match="square"):
        BlockFactors(
            {"a": LayerFactors(torch.ones(2, 3), torch.eye(2), torch.eye(2), True)}, 1, "s"
        )


def test_networks_without_a_last_block_are_refused():
    hand = Hand(lambda x, t, y: x, [[1.0]])
    with pytest.raises(UserError, match="Hand has no last block; give it a property last_block"):
        check_block(hand, 100)
    still = Small(lambda: [nn.GroupNorm(1, 2), nn.SiLU()], lambda: nn.Conv2d(2, 1, 1))
    with pytest.raises(UserError, match="no linear or convolution layer"):
        check_block(still, 100)
    with pytest.raises(UserError, match="10 images or more, got 9; raise laplace.num_images"):
        check_block(small_unet()[0], 9)


def test_what_kfac_cannot_take_keeps_its_values():
    def layers():
        grouped = nn.Conv2d(2, 2, 3, padding=1, groups=2)
        around = nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")
        return [grouped, nn.GroupNorm(1, 2), around, nn.Conv2d(2, 2, 1)]

    assert list(layers_of(Small(layers, lambda: nn.Conv2d(2, 1, 1)), "last_block")) == [
        "last_block.3"
    ]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"subset": "body"}, ["laplace.subset", "head, last_block", "'body'"]),
        ({"structure": "diag"}, ["laplace.structure=diag", "full or kron"]),
        ({"sigma_noise": "mle_per_time"}, ["mle_per_time", "use mle"]),
        ({"layers": "dense"}, ["laplace.layers", "kronecker, low_rank", "'dense'"]),
        ({"layers_rank": 0}, ["laplace.layers_rank", "got 0"]),
        ({"probes": 0}, ["laplace.probes", "all", "got 0"]),
        ({"probes": True}, ["laplace.probes", "got True"]),
        ({"probes": "some"}, ["laplace.probes", "'some'"]),
    ],
)
def test_bad_settings_are_refused_in_one_line(options, fragments):
    head = {"structure": "full", "sigma_noise": "mle"}
    of_head = head | {k: v for k, v in options.items() if k in head}
    beside = {"subset": "last_block"} | {k: v for k, v in options.items() if k not in head}
    with pytest.raises(UserError) as error:
        Beside(**beside).check(**of_head)
    check_line(str(error.value), fragments)
    if set(options) <= {"structure", "sigma_noise"}:
        Beside().check(**of_head)


def test_estimators_that_follow_whole_networks_take_a_wider_posterior():
    _, _, posterior = unet_posterior()
    assert with_block(Linearised(), None) == Linearised()
    with pytest.raises(UserError, match="uncertainty=total_variance"):
        with_block(TotalVariance(), posterior)
    given = Ensemble(members=5, skip_interval=2, times=(0.5,), seed=3)
    made = with_block(given, posterior)
    assert isinstance(made, BlockEnsemble) and made.count == 5
    sensitive = Linearised(draws=5, noise_draws=2, seed=3)
    wider = with_block(sensitive, posterior)
    assert isinstance(wider, LayersLinearised)
    for one, other in ((given, made), (sensitive, wider)):
        assert made.name == given.name
        for name in (field.name for field in fields(one)):
            assert getattr(other, name) == getattr(one, name)
    check_wider(given, "all")
    with pytest.raises(UserError, match="ablation=null"):
        check_wider(given, "all", "ablation")
    for refused_one in ({"draws": "all"}, {"skip_interval": 2}, {"derivative": "bfloat16"}):
        with pytest.raises(UserError, match="laplace.subset=head"):
            with_block(replace(sensitive, **refused_one), posterior)


LAST = "laplace.subset=last_block"


@pytest.fixture
def work(monkeypatch):
    """Counts passes over the last block; draws no pictures."""
    calls, pass_over = Counter(), block.fit_block

    def counted(*args, **options):
        calls["pass"] += 1
        return pass_over(*args, **options)

    kind = replace(KINDS["kronecker"], fit=counted)
    monkeypatch.setitem(KINDS, "kronecker", kind)
    monkeypatch.setattr("bayesdiff.report.board.write", lambda *args, **options: [])
    return calls


def maps(result):
    with np.load(result.samples, allow_pickle=False) as file:
        return dict(file)


def test_the_run_with_a_wider_posterior(copied: Trained, compose: Compose, work):
    """A cell beside the head's, from one more pass; each of what it depends on makes another."""
    result = pipeline.run(compose(LAST))
    assert result.folder.parent == copied.folder and result.folder != copied.cell
    assert result.folder.name.startswith("euler-ensemble-")
    wide, narrow = maps(result), np.load(copied.samples)
    assert np.array_equal(wide["images"], narrow["images"])
    assert wide["variance"].min() > 0
    assert not np.allclose(wide["variance"], narrow["variance"], rtol=0.01)
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["settings"]["subset"] == "last_block"
    assert record["metrics"]["nfe"] == 3 * (1 + 2)
    metrics = record["metrics"]
    assert 0 < metrics["laplace/block_effective_parameters"] < metrics["laplace/block_parameters"]
    assert work == {"pass": 1}

    again = pipeline.run(compose(LAST))
    assert again.folder == result.folder and again.metrics == result.metrics
    assert work == {"pass": 1}
    prior = pipeline.run(compose(LAST, "laplace.prior_precision=1e4"))
    kron = pipeline.run(compose(LAST, "laplace=kron"))
    assert work == {"pass": 1}
    assert prior.metrics["summed_variance/mean"] < result.metrics["summed_variance/mean"]
    probes = pipeline.run(compose(LAST, "laplace.probes=1"))
    assert work == {"pass": 2}
    assert len({r.folder for r in (result, prior, kron, probes)}) == 4
    head = pipeline.run(compose())
    assert head.folder == copied.cell and head.metrics == copied.metrics
    assert work == {"pass": 2}


def test_other_content_of_the_file_makes_other_maps(copied: Trained, compose: Compose, work):
    given = (LAST, "metrics.num_images=0")
    result = pipeline.run(compose(*given))
    (path,) = copied.folder.glob("block-*.safetensors")
    factors = BlockFactors.load(path)
    layers = {
        name: replace(layer, output=layer.output * 4) for name, layer in factors.layers.items()
    }
    replace(factors, layers=layers).save(path)
    other = pipeline.run(compose(*given))
    assert other.folder != result.folder
    assert not np.array_equal(maps(other)["variance"], maps(result)["variance"])
    path.unlink()
    assert pipeline.run(compose(*given)).folder == result.folder
    assert work == {"pass": 2}
    replace(factors, source="0" * 16 + factors.source[16:]).save(path)
    check_line(refused(compose, *given), ["computed from 0000000000000000", "block file"])
    path.write_bytes(path.read_bytes()[:-9])
    check_line(refused(compose, *given), ["block-", "delete it"])
    pipeline.run(compose(given[1]))  # the head's maps need no such file


def test_a_broken_file_is_found_before_training(compose: Compose, monkeypatch):
    cfg = compose(LAST)
    path = pipeline.prepare(cfg)[3].block_path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"nothing")
    monkeypatch.setattr(pipeline, "fit", lambda *args: pytest.fail("training was started"))
    check_line(refused(compose, LAST), ["block-", "delete it"])


def test_the_callback_alone_has_both_posteriors():
    """In memory, without a run folder; evidence of the layers is their own."""
    net, _ = small_unet()
    model = model_of(net, num_classes=3)

    class Data:
        images, labels, fingerprint = pictures(16, 8), torch.arange(16) % 3, "d"

    options = {"batch_size": 8, "prior_precision": "evidence"}
    laplace = LastLayerLaplace(subset="last_block", probes=1, **options)
    assert laplace.block_statistics() == {}
    head = laplace.fit(model, Data)
    alone = LastLayerLaplace(**options).fit(model, Data)
    assert laplace.block_path is None and head.settings == alone.settings
    assert set(laplace.block.priors) == set(layers_of(net, "last_block"))
    assert len({*laplace.block.priors.values(), head.prior_precision}) > 2
    assert head.curvature.source == alone.curvature.source
    assert laplace.block.factors.num_images == 16
