"""What is given to a pretrained pipeline: changed weights, classes, images of any form."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("diffusers")

import pretrained_checks as checks  # noqa: E402
from diffusers import (  # noqa: E402
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from PIL import Image  # noqa: E402
from pipelines import CALLS, PIPELINES, lumina2  # noqa: E402
from test_network_pipeline import Foreign  # noqa: E402
from test_pretrained_command import of_digits  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.pretrained.followed import FollowedPipeline  # noqa: E402
from bayesdiff.pretrained.network_pipeline import NetworkPipeline  # noqa: E402
from bayesdiff.pretrained.parts import Parts  # noqa: E402
from bayesdiff.pretrained.training_images import TrainingImages  # noqa: E402
from bayesdiff.uncertainty import DeepEnsemble, Ensemble, Refined, Swag  # noqa: E402

QUICK = {"num_inference_steps": 3, "uncertainty": Ensemble(members=2)}


@pytest.fixture(scope="module")
def dit():
    pipe = PIPELINES["dit"]()
    return (pipe, *checks.fitted(pipe, CALLS["dit"]))


@pytest.mark.parametrize("change", ["in place", "past the count", "loaded", "cast", "of the vae"])
def test_weights_that_change_afterwards_are_refused(dit, change, tmp_path):
    pipe = copy.copy(dit[0])
    for name in ("transformer", "vae"):
        setattr(pipe, name, copy.deepcopy(getattr(pipe, name)))
    bayes = BayesianPipeline(pipe)
    bayes.posterior, bayes.schedule = dit[1].posterior, dit[1].schedule
    part = pipe.vae if change == "of the vae" else pipe.transformer
    weight = part.get_parameter([name for name, _ in part.named_parameters()][-1])
    with torch.no_grad():
        if change == "past the count":  # as averages of weights are put in place
            weight.data.copy_(2 * weight.data + 1)
        elif change == "loaded":
            part.load_state_dict({k: v + 1 for k, v in part.state_dict().items()})
        elif change == "cast":
            part.to(torch.bfloat16)
        else:
            weight.flatten()[0] += 1e-3
    for use in (
        lambda: bayes(class_labels=[1], **QUICK),
        lambda: bayes.fit(dit[3], labels=[1] * 12),
        lambda: bayes.save(tmp_path),
        bayes.doctor,
    ):
        with pytest.raises(UserError, match=r"weights of the pipeline's .* new BayesianPipeline"):
            use()


def test_weights_that_stay_are_accepted(dit):
    parts = Parts(dit[0])
    dit[0].transformer.requires_grad_(False).eval().to("cpu")
    parts.check(dit[0])
    views = nn.Module()
    views.register_buffer("strided", torch.arange(24.0).reshape(4, 6).T[1:, 1:])
    views.register_buffer("one", torch.zeros(1).expand(50))
    views.register_buffer("none", torch.zeros(0, 3))
    views.register_buffer("meta", torch.zeros(3, device="meta"))
    holder = copy.copy(dit[0])
    holder.vae = views
    parts = Parts(holder)
    parts.check(holder)
    views.strided.data.mul_(2)
    with pytest.raises(UserError, match="of the pipeline's vae were changed"):
        parts.check(holder)


@pytest.mark.parametrize("labels", [[1001], [-1], [3, 5000], [True], ["cat"], [1.5]])
def test_classes_that_the_network_does_not_have_are_refused(dit, labels):
    reason = "whole numbers" if labels[0] in (True, "cat", 1.5) else "classes 0 to 1000"
    with pytest.raises(UserError, match=reason):
        dit[1](class_labels=labels, **QUICK)
    with pytest.raises(UserError, match=reason):
        BayesianPipeline.of(dit[0]).fit(dit[3][:1].expand(len(labels), -1, -1, -1), labels=labels)
    with pytest.raises(UserError, match=reason):
        FollowedPipeline(dit[0]).for_classes(labels, {})


def test_classes_behind_a_pipeline_that_knows_none_are_counted():
    bayes = BayesianPipeline.of(of_digits(11))
    with pytest.raises(UserError, match=r"class_labels=11, 12: .* classes 0 to 10"):
        bayes.fit(torch.rand(3, 1, 8, 8), labels=[11, 12, 3])


def test_classes_come_as_arrays_and_tensors(dit):
    made = [dit[1](class_labels=given, **QUICK).images for given in (
        [3, 4], torch.tensor([3, 4]), np.array([3, 4]), list(torch.tensor([3, 4])),
    )]  # fmt: skip
    assert all(torch.equal(images, made[0]) for images in made)


def test_fewer_images_than_classes_are_refused(dit):
    with pytest.raises(UserError, match="num_images=2 leaves out some of the 3"):
        dit[1](class_labels=[1, 2, 3], num_images=2, **QUICK)
    assert len(dit[1](class_labels=[1, 2], num_images=3, **QUICK).images) == 3


def test_an_output_is_not_mixed_with_another(dit, tmp_path):
    out = dit[1](class_labels=[1], **QUICK)
    out.save(tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out" / "png").iterdir())
    out.save(tmp_path / "out")  # the same again: nothing to do
    other = dit[1](class_labels=[2], **QUICK)
    with pytest.raises(UserError, match="has other images already; give another folder"):
        other.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "png").iterdir()) == names


@pytest.mark.parametrize("estimator", [Refined(train_images=20, epochs=1), Swag(),
                                       DeepEnsemble(members=["nowhere"])])  # fmt: skip
def test_estimators_that_cannot_serve_a_pipeline_say_so(dit, estimator):
    reason = "head is linear, on tokens" if isinstance(estimator, Refined) else "use uncertainty="
    with pytest.raises(UserError, match=reason):
        dit[1](class_labels=[1], num_inference_steps=3, uncertainty=estimator)


PICTURES = torch.randint(256, (6, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()


class Pairs:
    """A data set of another package: an image and what belongs to it."""

    def __init__(self, second, change):
        self.second, self.change = second, change

    def __len__(self):
        return len(self.second)

    def __getitem__(self, number):
        return self.change(PICTURES[number].numpy()), self.second[number]


@pytest.mark.parametrize(
    "given",
    [
        PICTURES.numpy(),
        PICTURES.permute(0, 3, 1, 2).numpy(),
        PICTURES.numpy() / np.float32(255),
        [Image.fromarray(image) for image in PICTURES.numpy()],
        list(PICTURES.numpy()),
        Pairs(range(6), Image.fromarray),
    ],
    ids=["NHWC", "NCHW", "float", "PIL", "list", "pairs"],
)
def test_images_in_any_form_are_the_same_images(given):
    truth = PICTURES.permute(0, 3, 1, 2).float() / 255
    assert torch.allclose(next(TrainingImages.of(given).batches(6)), truth)
    grey = TrainingImages.of(PICTURES[..., 0].numpy())
    assert torch.allclose(grey.batch(0, 6), truth[:, :1])


@pytest.mark.parametrize(
    "given, reason",
    [
        (np.zeros((4, 3, 8, 3), np.uint8), "does not say where its channels are"),
        (np.zeros((4, 8, 8, 5), np.uint8), "does not say where its channels are"),
        ([Image.new("RGBA", (8, 8))], r"mode RGBA; .*convert\('RGB'\)"),
        (Image.new("RGB", (8, 8)), "got Image"),
        ([{"image": 1}], "got dict"),
        (torch.zeros(3, 8, 8), r"got \(3, 8, 8\)"),
    ],
)
def test_other_things_than_images_are_refused(given, reason):
    with pytest.raises(UserError, match=reason) as error:
        TrainingImages.of(given)
    assert "\n" not in str(error.value)


def test_labels_and_prompts_of_a_data_set_are_used(monkeypatch):
    bayes = BayesianPipeline.of(of_digits(11))
    truth = torch.rand(6, 1, 8, 8)
    labels = [0, 3, 3, 9, 1, 0]
    rows = [(image, torch.tensor(label)) for image, label in zip(truth, labels, strict=True)]
    own = bayes.fit(rows).posterior.curvature.gram
    assert torch.equal(own, bayes.fit(truth, labels=labels).posterior.curvature.gram)
    assert not torch.equal(own, bayes.fit(truth, labels=[0] * 6).posterior.curvature.gram)
    words = Pairs(["a", "b", "a", "b", "c", "d"], Image.fromarray)
    assert TrainingImages.of(words).second(str) == words.second
    assert TrainingImages.of(words).second(int) is None


def test_edm_preconditioning_is_named():
    scheduler = EDMEulerScheduler()
    pipe = NetworkPipeline(Foreign().eval(), scheduler, (1, 6, 10))
    with pytest.raises(UserError, match="EDM's preconditioning"):
        BayesianPipeline.of(pipe).fit(torch.rand(2, 1, 6, 10))


class Reversed(nn.Module):
    """A flow network whose time runs from noise to data, and whose output is data - noise."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.net = Foreign()

    def forward(self, image, timestep):
        return self.net(image, 1000 * timestep)


class ReversedPipeline(NetworkPipeline):
    """Negates the network's output, and its time, as Lumina's pipeline does."""

    def __call__(self, num_images=1, num_inference_steps=50, generator=None, output_type="pt"):
        net, self_ = self.network, copy.copy(self)

        def negated(x, t):
            output = net(x, timestep=1 - t / 1000)
            return -(output if isinstance(output, torch.Tensor) else output[0])

        self_.network = negated
        self_.network.parameters = net.parameters
        return NetworkPipeline.__call__(
            self_, num_images, num_inference_steps, generator, output_type
        )


def test_a_negated_output_and_a_reversed_time_are_followed():
    pipe = ReversedPipeline(Reversed().eval(), FlowMatchEulerDiscreteScheduler(), (1, 6, 10))
    bayes, call, _ = checks.fitted(pipe, {"num_inference_steps": 5}, 4)
    call_of = next(iter(bayes.followed._models.values()))[0].net.module.call
    assert (call_of.sign, call_of.scale, call_of.shift) == (-1, -0.001, 1)
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5
    assert checks.split_error(bayes) < 1e-5
    wide, _, images = checks.fitted(pipe, call, 4, wide=True)
    assert checks.curvature_error(wide, images, None) < 1e-8
    # The model's prediction is noise - data, whatever the network's sign is.
    model = next(iter(bayes.followed._models.values()))[0]
    x, t = torch.randn(2, 1, 6, 10), torch.tensor([0.2, 0.6], dtype=torch.float64)
    assert torch.allclose(model.net(x, t), -pipe.network(x, t.float()), atol=1e-5)


def test_a_last_layer_over_the_prompts_tokens_is_refused():
    pipe, images = lumina2(), torch.rand(2, 3, 32, 48)
    asked = {"max_sequence_length": 8, "system_prompt": "b"}
    with pytest.raises(UserError, match="not linear"):
        BayesianPipeline.of(pipe, asked).fit(images, prompts=["a", "b"])
    asked["cfg_normalization"] = False
    with pytest.raises(UserError, match="runs over the tokens of the prompt as well"):
        BayesianPipeline.of(pipe, asked).fit(images, prompts=["a", "b"])


def test_a_pipeline_that_is_ours_is_read_once_bayesdiff_is_there(tmp_path):
    from bayesdiff.models import GenerativeModel
    from bayesdiff.networks import UNet
    from bayesdiff.paths import CondOT
    from bayesdiff.pretrained import command
    from bayesdiff.pretrained.export import export_pipeline

    options = {"in_channels": 1, "image_size": 8, "channels": [8, 16], "blocks": 1}
    model = GenerativeModel(UNet(**options), CondOT(), "velocity", torch.optim.SGD).eval()
    export_pipeline(model, tmp_path / "own", options)
    assert command.opened(str(tmp_path / "own")).who == "DDPMPipeline"
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "own")
    bayes = BayesianPipeline.of(pipe).fit(torch.rand(4, 1, 8, 8))
    assert bayes(**QUICK).images.shape == (1, 1, 8, 8)


def test_ddim_is_what_the_followed_scheduler_takes():
    """The path says what its schedulers take; steps of a score are turned for other networks."""
    assert FollowedPipeline(PIPELINES["ncsnpp"]()).scheduled(None, {}, 3, 1.0).takes == "score"
    other = NetworkPipeline(Foreign().eval(), DDIMScheduler(clip_sample=False), (1, 6, 10))
    assert FollowedPipeline(other).scheduled(None, {}, 3, 1.0).takes is None
