"""Our models as folders of diffusers: the same images when read back, and the same as ours."""

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DiffusionPipeline

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT, VariancePreserving
from bayesdiff.paths.prediction import convert
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline
from bayesdiff.pretrained.export import export_pipeline

OPTIONS = {"in_channels": 3, "image_size": [8, 4], "channels": [8, 16], "blocks": 1, "patch": 2}
LABELLED = OPTIONS | {"num_classes": 4}
VP = VariancePreserving(beta_end=0.002)
CASES = {"flow": (CondOT(), "velocity"), "noise": (VP, "noise"), "v": (VP, "v")}


def model_of(path, prediction, **options):
    torch.manual_seed(0)
    net = UNet(**OPTIONS, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for values in net.parameters():
            values.copy_(0.2 * torch.randn(values.shape, generator=generator))
    labels = options.get("num_classes")
    return GenerativeModel(net, path, prediction, torch.optim.SGD, num_classes=labels).eval()


@torch.no_grad()
def by_hand(model, times):
    """The first-order path through the model's own predictions, at our times."""
    x = torch.randn(1, 3, 8, 4, generator=torch.Generator().manual_seed(5))
    for now, after in zip(times[:-1], times[1:], strict=True):
        output = model(x, torch.full((1,), now, dtype=torch.float32))
        here, there = (model.path.coefficients(torch.tensor(t).double()) for t in (now, after))
        ends = []
        for target in ("data", "noise"):
            p, q = convert(model.prediction, target, here)
            ends.append(p.float() * x + q.float() * output)
        x = there.alpha.float() * ends[0] + there.sigma.float() * ends[1]
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe(generator=generator, num_inference_steps=5, output_type="np").images


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [None, 4])
def test_a_folder_makes_our_images(tmp_path, case, labels):
    model = model_of(*CASES[case], **({"num_classes": labels} if labels else {}))
    given = OPTIONS | {"_target_": "bayesdiff.networks.UNet", "num_classes": labels}
    pipe = export_pipeline(model, tmp_path, given)
    read = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    made = images(read)
    assert np.allclose(made, images(pipe), rtol=0, atol=1e-6)
    steps = read.scheduler.timesteps.tolist()
    shift = 0 if case == "flow" else 1
    times = [1 - (step + shift) / 1000 for step in steps] + [1.0]
    assert np.allclose(made, by_hand(model, times), rtol=0, atol=2e-5)
    assert ((made > 0) & (made < 1)).mean() > 0.2


def test_a_folder_makes_our_maps(tmp_path):
    pipe = export_pipeline(model_of(VP, "noise", num_classes=4), tmp_path, LABELLED)
    read = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pixels = torch.rand(4, 3, 8, 4, generator=torch.Generator().manual_seed(2))
    maps = []
    for each in (pipe, read):
        each.set_progress_bar_config(disable=True)
        bayes = BayesianPipeline.of(each).fit(pixels, labels=[0, 1, 2, 3])
        maps.append(bayes(class_labels=[2], num_inference_steps=3, seed=1).variance)
    assert maps[0].min() > 0
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-3, atol=0)


def test_labels_reach_the_network(tmp_path):
    model = model_of(CondOT(), "velocity", num_classes=4)
    own = export_pipeline(model, tmp_path, LABELLED).unet
    x, y = torch.randn(2, 3, 8, 4), torch.tensor([1, 3])
    t = torch.full((2,), 0.75)
    with torch.no_grad():
        found = own(x, 250.0, class_labels=y, return_dict=False)[0]
        assert torch.allclose(found, -model(x, t, y), atol=1e-6)
        assert not torch.allclose(found, -model(x, t), atol=1e-3)


def test_what_no_scheduler_stands_for_is_refused(tmp_path):
    with pytest.raises(UserError, match="VariancePreserving with model.prediction=velocity"):
        export_pipeline(model_of(VP, "velocity"), tmp_path, OPTIONS)
    with pytest.raises(UserError, match="options"):
        export_pipeline(model_of(VP, "noise"), tmp_path, OPTIONS | {"channels": [8, 8]})
    assert not list(tmp_path.iterdir())
