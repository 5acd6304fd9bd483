"""CLIP, DINOv2 and the untrained classifier as encoders: with random weights, from files."""

import hashlib
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch_fidelity import feature_extractor_clip as clip
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from bayesdiff.checks import UserError
from bayesdiff.metrics import encoders
from bayesdiff.metrics.encoders import ClipFeatures, clip_weights, dino_network, dino_weights
from bayesdiff.metrics.features import build_extractor, extract, untrained


def images(count, channels=1, size=12):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, size, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def build(name, path):
    return build_extractor(name, None, cache_dir="", seed=0, weights_path=path)


def clip_state(width=768, patch=32, side=7, layers=1, out=512):
    """Random weights of one layer instead of twelve: as fast as can be at the real widths."""
    torch.manual_seed(0)
    network = clip.CLIPVisual(out, patch * side, layers, width, patch)
    return {name: value.half() for name, value in network.state_dict().items()}


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    # The text's half, which whole files hold too.
    rest = {"text_projection": torch.zeros(512, 512), "logit_scale": torch.tensor(1.0)}
    torch.save(clip_state() | rest, path)
    return path


def dino_state(width=768, patch=14, side=37, layers=1):
    generator = torch.Generator().manual_seed(1)

    def some(*shape, around=0.0, scale=0.05):
        return around + scale * torch.randn(shape, generator=generator)

    state = {
        "cls_token": some(1, 1, width),
        "pos_embed": some(1, 1 + side**2, width, scale=0.3),
        "mask_token": some(1, width),
        "patch_embed.proj.weight": some(width, 3, patch, patch),
        "patch_embed.proj.bias": some(width),
    }
    shapes = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
    shapes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    norms = ["norm"]
    for block in (f"blocks.{number}" for number in range(layers)):
        norms += [f"{block}.norm1", f"{block}.norm2"]
        for name, shape in shapes.items():
            state[f"{block}.{name}.weight"] = some(*shape)
            state[f"{block}.{name}.bias"] = some(shape[0])
        state |= {f"{block}.ls{k}.gamma": some(width, around=0.5) for k in (1, 2)}
    for name in norms:
        state |= {f"{name}.weight": some(width, around=1.0), f"{name}.bias": some(width)}
    return state


@pytest.fixture(scope="module")
def dino_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "dino.pth"
    torch.save(dino_state(), path)
    return path


def seen(pictures, size, mean, std):
    """Images as torch-fidelity shows them to these networks."""
    rgb = pictures.float().expand(-1, 3, -1, -1)
    rgb = interpolate_bilinear_2d_like_tensorflow1x(rgb, size=(size, size), align_corners=False)
    scaled = [[255 * value for value in values] for values in (mean, std)]
    return torchvision.transforms.functional.normalize(rgb, *scaled)


def test_clip_gives_its_own_features_of_grey_images_and_no_classes(clip_file):
    extractor = build("clip", clip_file)
    grey = images(3)
    found = extract(extractor, grey, batch_size=2)
    assert found.features.shape == (3, 512) and found.logits.shape == (3, 0)
    rgb = extract(extractor, grey.repeat(1, 3, 1, 1))
    torch.testing.assert_close(found.features, rgb.features, rtol=1e-4, atol=1e-4)
    network = clip.CLIPVisual(512, 224, 1, 768, 32).eval()
    network.load_state_dict(clip_state())
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    with torch.no_grad():
        expected = network.visual(seen(grey, 224, mean, std))
    torch.testing.assert_close(found.features, expected, rtol=1e-4, atol=1e-4)
    assert extractor.get_name() == "clip-vit-b-32"


def slow_dino(state, x, heads):
    """Meta's network step by step in float64: (B, 3, S, S) -> (B, F)."""
    state = {name: value.double() for name, value in state.items()}

    def norm(name, x):
        shape, weight, bias = x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"]
        return F.layer_norm(x, shape, weight, bias, 1e-6)

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    patch = state["patch_embed.proj.weight"]
    rows = F.conv2d(x.double(), patch, state["patch_embed.proj.bias"], stride=patch.shape[-1])
    side = rows.shape[-1]
    rows = rows.flatten(2).mT
    rows = torch.cat([state["cls_token"].expand(len(x), -1, -1), rows], 1)
    places = state["pos_embed"]
    old = math.isqrt(places.shape[1] - 1)
    if old != side:
        grid = places[:, 1:].reshape(1, old, old, -1).permute(0, 3, 1, 2)
        scale = float((side + 0.1) / math.sqrt(old**2))
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        assert grid.shape[-2:] == (side, side)
        grid = grid.permute(0, 2, 3, 1).reshape(1, side**2, -1)
        places = torch.cat([places[:, :1], grid], 1)
    rows = rows + places
    for block in sorted({".".join(name.split(".")[:2]) for name in state if "blocks." in name}):
        queries, keys, values = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2)
            for part in linear(f"{block}.attn.qkv", norm(f"{block}.norm1", rows)).chunk(3, -1)
        )
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
        mixed = linear(f"{block}.attn.proj", (weights @ values).transpose(1, 2).flatten(2))
        rows = rows + state[f"{block}.ls1.gamma"] * mixed
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", rows)))
        rows = rows + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
    return norm("norm", rows)[:, 0]


@pytest.mark.parametrize("side", [4, 6])
def test_dino_network_is_metas(side):
    """On the grid it was trained with, and on a finer one that it is used with."""
    state = dino_state(width=24, patch=4, side=6, layers=2)
    x = torch.randn(2, 3, 4 * side, 4 * side, generator=torch.Generator().manual_seed(2)).double()
    state = {name: value.double() for name, value in state.items()}
    network = dino_network(state, 4 * side, heads=3).double()
    # Loading rounded the weights to float32.
    with torch.no_grad():
        torch.testing.assert_close(network(x), slow_dino(state, x, 3), rtol=1e-5, atol=1e-5)
    assert (slow_dino(state, x, 3) - slow_dino(state, x, 2)).abs().max() > 1e-3


def test_dinov2_reads_metas_file_and_takes_grey_images(dino_file):
    extractor = build("dinov2", dino_file)
    grey = images(2)
    found = extract(extractor, grey, batch_size=1)
    assert found.features.shape == (2, 768) and found.logits.shape == (2, 0)
    x = seen(grey, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = slow_dino(dino_state(), x, 12).float()
    torch.testing.assert_close(found.features, expected, rtol=1e-3, atol=1e-3)
    assert extractor.get_name() == "dinov2-vit-b-14"


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.parametrize("name", ["clip", "dinov2"])
@pytest.mark.parametrize("content", ["missing", "text", "other", "list", "code", "large"])
def test_wrong_weights_files_are_refused_and_never_run(name, content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    if content == "text":
        path.write_text("hello")
    elif content == "large":  # another network of the same family
        small = {"clip": lambda: clip_state(width=64, patch=8, side=2, out=16)}
        torch.save(small.get(name, lambda: dino_state(width=24, side=3))(), path)
    elif content != "missing":
        values = {"other": {"a": torch.zeros(1)}, "list": [1], "code": {"a": Bomb()}}
        torch.save(values[content], path)
    with pytest.raises(UserError, match="metrics.weights_path=.*weights.pth") as refusal:
        build(name, path)
    line = str(refusal.value)
    assert "\n" not in line and {"clip": "ViT-B-32.pt", "dinov2": "dinov2_vitb14"}[name] in line
    assert not (tmp_path / "exploded").exists()
    if content == "large":
        assert "does not hold" in line and "not (" in line


def script(path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = clip.CLIPVisual(512, 224, 1, 768, 32).visual
            self.text_projection = nn.Parameter(torch.zeros(4, 512))

        def forward(self, x):
            return x

    torch.jit.save(torch.jit.trace(Whole(), torch.zeros(1)), str(path))


@pytest.mark.filterwarnings("ignore:.*TorchScript archive")
def test_an_archive_with_code_is_opened_only_if_it_is_openais(tmp_path, monkeypatch):
    path = tmp_path / "ViT-B-32.pt"
    script(path)
    opened = []
    real = torch.jit.load
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: opened.append(a) or real(*a, **k))
    with pytest.raises(UserError, match="not a plain weights file"):
        clip_weights(path, "metrics.weights_path")
    assert not opened
    known = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(encoders, "CLIP_SHA256", known)
    weights = clip_weights(path, "metrics.weights_path")
    assert len(opened) == 1 and weights["visual.proj"].shape == (768, 512)
    assert ClipFeatures(weights)(images(1))[0].shape == (1, 512)


def test_without_a_network_the_cure_is_a_file(tmp_path, monkeypatch):
    def offline(*_args, **_options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    for read, file in ((clip_weights, "ViT-B-32.pt"), (dino_weights, "dinov2_vitb14")):
        with pytest.raises(UserError, match=f"downloaded.*; set some.option to .*{file}") as line:
            read(None, "some.option")
        assert "\n" not in str(line.value)


def test_a_download_is_checked_by_its_content_and_kept(tmp_path, monkeypatch, clip_file):
    def fetch(url, path, sha256, progress):
        assert encoders.CLIP_SHA256 in url and sha256 == encoders.CLIP_SHA256
        torch.save(torch.load(clip_file, weights_only=True), path)
        fetched.append(path)

    fetched: list = []
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    for _ in range(2):
        assert clip_weights(None, "x")["visual.proj"].shape == (768, 512)
    assert len(fetched) == 1


def test_the_untrained_classifier_is_random_but_has_the_scale_of_features():
    data = SimpleNamespace(images=images(200, size=8), num_classes=3)
    state = torch.get_rng_state()
    one, same, other = untrained(data, 1), untrained(data, 1), untrained(data, 2)
    assert torch.equal(torch.get_rng_state(), state)
    features = [network.features(data.images) for network in (one, same, other)]
    assert torch.equal(features[0], features[1])
    assert not torch.allclose(features[0], features[2], atol=0.1)
    assert 0.1 < float(features[0].detach().std()) < 2 and not one.training
    extractor = build_extractor("untrained", data, cache_dir="", seed=1)
    torch.testing.assert_close(extract(extractor, data.images).features, features[0].detach())
