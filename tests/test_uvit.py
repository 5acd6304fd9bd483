"""U-ViT: names, orders and both heads, against its formulas written out in float64."""

import math

import pytest
import torch
from safetensors.torch import save_file

from bayesdiff.checks import UserError
from bayesdiff.laplace.curvature import HeadGeometry
from bayesdiff.pretrained.uvit import UViT

SMALL = {"img_size": (4, 6), "patch_size": 2, "in_chans": 3, "embed_dim": 8, "depth": 5}
SMALL |= {"num_heads": 2, "mlp_ratio": 2}
# Published: networks for latents end in the linear layer, those for pixels in a convolution.
LATENT = {"num_classes": 11, "conv": False}
PIXELS = {"num_classes": -1, "conv": True, "mlp_time_embed": True, "qkv_bias": True}
X = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(1)).double()
T, Y = torch.tensor([1.0, 937.5]), torch.tensor([4, 10])


def network(options, **more):
    torch.manual_seed(0)
    net = UViT(**SMALL | options | more).double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for values in net.parameters():
            values.copy_(0.4 * torch.randn(values.shape, generator=generator))
    return net


def norm(x, w, name):
    centred = x - x.mean(-1, keepdim=True)
    size = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return centred / size * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def block(x, w, name, heads=2):
    """A block, head by head and token by token."""
    rows = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv")
    width = x.shape[-1]
    mixed = torch.zeros_like(x)
    for head in range(heads):
        size = width // heads
        own = slice(head * size, (head + 1) * size)
        query, key, value = (rows[..., k * width :][..., own] for k in range(3))
        for token in range(x.shape[1]):
            scores = (query[:, token, None] * key).sum(-1) / math.sqrt(size)
            shares = scores.exp() / scores.exp().sum(-1, keepdim=True)
            mixed[:, token, own] = (shares[..., None] * value).sum(1)
    x = x + linear(mixed, w, f"{name}.attn.proj")
    hidden = linear(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
    return x + linear(hidden, w, f"{name}.mlp.fc2")


def by_hand(w, x, t, y=None, depth=5, side=2, skip=True):
    """The whole network from its published description, by the names of its weights."""
    width = w["pos_embed"].shape[-1]
    rates = [10000 ** (-2 * i / width) for i in range(width // 2)]
    waves = [[f(float(s) * r) for f in (math.cos, math.sin) for r in rates] for s in t]
    time = torch.tensor(waves, dtype=torch.float64)
    if "time_embed.0.weight" in w:
        time = linear(time, w, "time_embed.0")
        time = linear(time / (1 + (-time).exp()), w, "time_embed.2")
    tokens = [time] if y is None else [w["label_emb.weight"][y], time]
    extras = len(tokens)
    places = [(i, j) for i in range(0, x.shape[2], side) for j in range(0, x.shape[3], side)]
    for i, j in places:
        patch = x[:, None, :, i : i + side, j : j + side]
        tokens.append((patch * w["patch_embed.proj.weight"]).sum((2, 3, 4)))
        tokens[-1] = tokens[-1] + w["patch_embed.proj.bias"]
    hidden = torch.stack(tokens, 1) + w["pos_embed"]
    kept = []
    for k in range(depth // 2):
        hidden = block(hidden, w, f"in_blocks.{k}")
        kept.append(hidden)
    hidden = block(hidden, w, "mid_block")
    for k in range(depth // 2):
        if skip:
            both = torch.cat([hidden, kept[-1 - k]], -1)
            hidden = linear(both, w, f"out_blocks.{k}.skip_linear")
        hidden = block(hidden, w, f"out_blocks.{k}")
    patches = linear(norm(hidden, w, "norm"), w, "decoder_pred")[:, extras:]
    image = torch.zeros_like(x)
    for (i, j), patch in zip(places, patches.unbind(1), strict=True):
        for row in range(side):
            for column in range(side):
                first = (row * side + column) * x.shape[1]
                image[:, :, i + row, j + column] = patch[:, first : first + x.shape[1]]
    if "final_layer.weight" in w:
        image = torch.nn.functional.conv2d(
            image, w["final_layer.weight"], w["final_layer.bias"], padding=1
        )
    return image


CASES = {
    "latent": (LATENT, Y),
    "no label given": (LATENT, None),
    "pixels": (PIXELS, None),
    "no skips": (LATENT | {"skip": False}, Y),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_is_the_described_network(case):
    options, y = CASES[case]
    net = network(options)
    labels = torch.tensor([10, 10]) if y is None and net.num_classes else y
    truth = by_hand(net.state_dict(), X, T, labels, skip=options.get("skip", True))
    assert truth.std() > 0.1
    torch.testing.assert_close(net(X, T, y), truth, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(net(X, T + 1, y), truth)


@pytest.mark.parametrize("head", ["conv", "linear"])
@torch.no_grad()
def test_both_heads_are_the_same_network(head):
    net, plain = network(PIXELS, head=head), network(PIXELS)
    features = net.features(X, T)
    assert torch.equal(net.fold(net.head(features)), net(X, T))
    torch.testing.assert_close(net(X, T), plain(X, T), rtol=1e-12, atol=1e-12)
    size = {"conv": 9 * 3 + 1, "linear": 8 + 1}[head]
    assert HeadGeometry.of(net.head).size == size
    assert features.shape == {"conv": (2, 3, 4, 6), "linear": (2, 6, 8)}[head]
    a, b = (torch.randn_like(net.head(features)) for _ in range(2))
    both = net.fold(a + b) - net.fold(a) - net.fold(b) + net.fold(torch.zeros_like(a))
    assert both.abs().max() < 1e-12  # affine


def test_names_are_the_published_ones():
    latent, pixels = (set(network(options).state_dict()) for options in (LATENT, PIXELS))
    parts = ("norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    names = {"patch_embed.proj", "label_emb", "norm", "decoder_pred"}
    names |= {f"out_blocks.{k}.skip_linear" for k in range(2)}
    blocks = ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1")
    names |= {f"{block}.{part}" for block in blocks for part in parts}
    weights = {f"{name}.weight" for name in names} | {"pos_embed"}
    biases = {f"{n}.bias" for n in names if not n.endswith("attn.qkv") and n != "label_emb"}
    assert latent == weights | biases
    assert pixels - latent == {
        *(f"{n}.{v}" for n in ("final_layer", "time_embed.0", "time_embed.2") for v in WB),
        *(f"{block}.attn.qkv.bias" for block in blocks),
    }


WB = ("weight", "bias")


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_weights_come_back(tmp_path, ending):
    net, path = network(LATENT), tmp_path / f"nnet_ema.{ending}"
    save = save_file if ending == "safetensors" else torch.save
    save(net.state_dict(), path)
    read = UViT(**SMALL | LATENT).double().load_weights(path)
    assert torch.equal(read(X, T, Y), net(X, T, Y))


class Code:
    def __reduce__(self):
        return exec, ("raise RuntimeError('code of a file has run')",)


def without(name):
    return lambda weights: {key: value for key, value in weights.items() if key != name}


WRONG = {
    "lacks pos_embed": without("pos_embed"),
    "has unknown clip.weight": lambda weights: weights | {"clip.weight": torch.zeros(1)},
    r"has label_emb.weight \(7, 8\) for \(11, 8\)": lambda weights: (
        weights | {"label_emb.weight": torch.zeros(7, 8)}
    ),
    "no state dict": lambda weights: {"model": weights},
    "cannot be read": lambda weights: {"odd": Code()},
}


@pytest.mark.parametrize("said", WRONG)
def test_other_weights_are_refused(tmp_path, said):
    net, path = network(LATENT), tmp_path / "nnet.pth"
    torch.save(WRONG[said](net.state_dict()), path)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(UserError, match=said) as refused:
        net.load_weights(path)
    assert "\n" not in str(refused.value) and "has run" not in str(refused.value)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"img_size": 5}, "img_size"),
        ({"num_heads": 3}, "num_heads=3"),
        ({"head": "clf"}, "head='clf'"),
        ({"head": "conv", "conv": False}, "conv=True"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        UViT(**SMALL | options)
