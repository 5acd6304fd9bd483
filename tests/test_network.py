"""The U-Net as three parts, sizes it takes and refuses, and how it starts."""

import pytest
import torch
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.networks import UNet


def awake(net):
    """Replace what starts at zero, so that every part of the network matters."""
    torch.manual_seed(1)
    for parameter in net.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return net.eval()


def inputs(net, channels, size, batch=3):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(batch, channels, size, size, generator=generator)
    t = torch.tensor([0.0, 0.37, 1.0])[:batch]
    y = None if net.num_classes is None else torch.tensor([0, 2, 3])[:batch]
    return x, t, y


CASES = {
    "8-grey": {"in_channels": 1, "image_size": 8, "num_classes": 3, "channels": (8, 16)},
    "28-grey": {
        "in_channels": 1,
        "image_size": 28,
        "num_classes": 3,
        "channels": (8, 16),
        "patch": 2,
    },
    "32-rgb": {
        "in_channels": 3,
        "image_size": 32,
        "num_classes": 3,
        "channels": (8, 16, 64),
        "patch": 2,
    },
    "unconditional": {"in_channels": 3, "image_size": 16, "channels": (6, 10), "head_kernel": 1},
    "one-level": {"in_channels": 2, "image_size": 7, "channels": (4,), "attention": False},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_forward_is_fold_of_head_of_features(case):
    options = CASES[case]
    net = awake(UNet(**options, blocks=1))
    size, patch = options["image_size"], options.get("patch", 1)
    x, t, y = inputs(net, options["in_channels"], size)
    features = net.features(x, t, y)
    assert features.shape == (3, options["channels"][0], size // patch, size // patch)
    assert isinstance(net.head, nn.Conv2d)
    assert net.head.out_channels == options["in_channels"] * patch**2
    out = net(x, t, y)
    assert out.shape == x.shape and out.isfinite().all()
    assert torch.equal(out, net.fold(net.head(features)))


def test_fold_puts_head_channels_on_their_own_pixels():
    """Channel c patch^2 + dy patch + dx of block (i, j) is pixel (i patch + dy, j patch + dx)."""
    net = UNet(2, 8, channels=(4, 8), patch=2)
    output = torch.arange(8 * 4 * 4.0).reshape(1, 8, 4, 4)
    image = net.fold(output)
    for c, y, x in ((0, 0, 0), (0, 3, 6), (1, 5, 2), (1, 7, 7)):
        channel = 4 * c + 2 * (y % 2) + x % 2
        assert image[0, c, y, x] == output[0, channel, y // 2, x // 2]


@torch.no_grad()
def test_every_input_matters_and_images_do_not_mix():
    net = awake(UNet(1, 8, num_classes=3, channels=(8, 16)))
    x, t, y = inputs(net, 1, 8)
    out = net(x, t, y)
    for other in ((x + 0.1, t, y), (x, t * 0.9 + 0.05, y), (x, t, (y + 1) % 4)):
        assert ((net(*other) - out).abs().amax((1, 2, 3)) > 1e-4).all()
    for i in range(3):
        alone = net(x[i : i + 1], t[i : i + 1], y[i : i + 1])
        torch.testing.assert_close(alone[0], out[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_no_label_is_the_label_after_the_last_class():
    net = awake(UNet(1, 8, num_classes=3, channels=(8, 16)))
    x, t, _ = inputs(net, 1, 8)
    assert torch.equal(net(x, t), net(x, t, torch.full((3,), 3)))


@torch.no_grad()
def test_an_unconditional_network_has_no_classes_and_ignores_labels():
    net = awake(UNet(1, 8, channels=(8, 16)))
    x, t, _ = inputs(net, 1, 8)
    assert net.classes is None
    assert torch.equal(net(x, t), net(x, t, torch.tensor([0, 1, 2])))


@pytest.mark.parametrize("training", [True, False])
def test_inputs_are_left_as_they_were(training):
    net = awake(UNet(1, 8, num_classes=3, channels=(8, 16), dropout=0.1)).train(training)
    given = inputs(net, 1, 8)
    kept = [value.clone() for value in given]
    net(*given).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_every_parameter_gets_a_gradient_once_awake():
    net = awake(UNet(1, 8, num_classes=3, channels=(8, 32), blocks=2)).train()
    x, t, y = inputs(net, 1, 8)
    net(x, t, y).square().mean().backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_a_fresh_network_starts_with_blocks_that_change_nothing():
    """A block with equal widths is the identity, and so is the attention; the start is finite."""
    torch.manual_seed(0)
    net = UNet(3, 16, num_classes=3, channels=(8, 64))
    x, t, y = inputs(net, 3, 16)
    hidden, embedding = torch.randn(3, 64, 4, 4), torch.randn(3, 32)
    assert torch.equal(net.middle[0](hidden, embedding), hidden)
    assert torch.equal(net.attention(hidden), hidden)
    loss = (net(x, t, y) - x).square().mean()
    loss.backward()
    assert loss.isfinite() and loss < 20
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients)
    assert net.middle[0].conv_2.weight.grad.any(), "a block at the identity still learns"


@torch.no_grad()
def test_dropout_acts_in_training_only():
    net = awake(UNet(1, 8, channels=(8, 16), dropout=0.5))
    x, t, _ = inputs(net, 1, 8)
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


@torch.no_grad()
def test_attention_equals_the_fused_operation():
    """Written out for speed; torch's own scaled dot product is the truth, in float64."""
    net = awake(UNet(1, 16, channels=(8, 64))).double()
    attention, hidden = net.attention, torch.randn(2, 64, 4, 3, dtype=torch.float64)
    assert attention.heads == 2
    query, key, value = attention.qkv(attention.norm(hidden)).chunk(3, 1)

    def rows(part):
        return part.reshape(2, 2, 32, 12).transpose(-1, -2)

    mixed = nn.functional.scaled_dot_product_attention(rows(query), rows(key), rows(value))
    expected = hidden + attention.out(mixed.transpose(-1, -2).reshape(hidden.shape))
    torch.testing.assert_close(attention(hidden), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"image_size": 28, "channels": (8, 8, 8, 8)}, "image size 28 .* by 8"),
        ({"image_size": 9, "patch": 2}, "image size 9 .* by 4"),
        ({"image_size": 32, "patch": 3}, "image size 32 .* by 6"),
        ({"channels": ()}, "net.channels"),
        ({"channels": (8, 0)}, "net.channels"),
        ({"channels": (7, 8)}, "net.channels.0.=7"),
        ({"channels": (8, 100)}, "net.channels.-1.=100"),
        ({"head_kernel": 2}, "net.head_kernel=2"),
        ({"head_kernel": 0}, "net.head_kernel"),
        ({"blocks": 0}, "net.blocks"),
        ({"patch": 0}, "net.patch"),
        ({"dropout": 1.5}, "net.dropout"),
    ],
)
def test_what_cannot_work_is_refused_before_training(options, named):
    with pytest.raises(UserError, match=named) as refused:
        UNet(**({"in_channels": 1, "image_size": 32, "channels": (8, 16)} | options))
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_widths_that_do_not_share_into_heads_work_without_attention():
    net = UNet(1, 8, channels=(8, 100), blocks=1, attention=False)
    x, t, _ = inputs(net, 1, 8)
    assert net(x, t).shape == x.shape
