"""Pipelines of diffusers: split, curvature, images and maps against what they themselves say."""

import copy

import pytest
import torch

pytest.importorskip("diffusers")

import pretrained_checks as checks  # noqa: E402
from pipelines import CALLS, PIPELINES, SCHEDULERS  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.laplace.posterior import HeadPosterior  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.pretrained.followed import FollowedPipeline  # noqa: E402
from bayesdiff.pretrained.schedule import schedule_key  # noqa: E402
from bayesdiff.pretrained.training_images import TrainingImages  # noqa: E402
from bayesdiff.solvers.diffusion import DDIM  # noqa: E402
from bayesdiff.uncertainty import Ensemble, Linearised  # noqa: E402


@pytest.fixture(scope="module")
def made():
    """Pipelines with a posterior each, by name; made once."""
    kept = {}

    def get(name):
        if name not in kept:
            pipe = PIPELINES[name]()
            kept[name] = (pipe, *checks.fitted(pipe, CALLS[name], prior_precision=1e6))
        return kept[name]

    return get


def stored(bayes):
    """What a pipeline is, to see that nothing of it changes."""
    pipe = bayes.followed.pipe
    parts = {n: v for n, v in pipe.components.items() if isinstance(v, torch.nn.Module)}
    return {n: {k: v.clone() for k, v in part.state_dict().items()} for n, part in parts.items()}


@pytest.mark.parametrize(
    "name", ["unet2d", "ncsnpp", "ldm", "sd", "sdxl", "dit", "pixart", "sd3", "flux"]
)
def test_images_are_the_pipelines_own_and_the_split_is_exact(made, name):
    pipe, bayes, call, _ = made(name)
    before = stored(bayes)
    assert checks.split_error(bayes) < 1e-5
    assert checks.scheduler_error(bayes, pipe, call) < 1e-5
    after = stored(bayes)
    for part, weights in before.items():
        assert all(torch.equal(value, after[part][key]) for key, value in weights.items())
    assert all("forward" not in vars(part) for part in pipe.components.values() if part)


@pytest.mark.parametrize("name", ["unet2d", "adm", "sd_v", "dit", "flux"])
def test_the_curvature_is_that_of_the_dense_jacobian(name):
    pipe = PIPELINES[name]()
    if name == "adm":
        pipe.scheduler = SCHEDULERS[name][1]
    bayes, _, images = checks.fitted(pipe, CALLS[name], 2, wide=True)
    shown = None if bayes.followed.condition is None else torch.tensor([0, 1])
    assert checks.curvature_error(bayes, images, shown) < 1e-8


@pytest.mark.parametrize("number", range(len(SCHEDULERS["sd"])))
def test_every_scheduler_gives_the_pipelines_images(made, number):
    pipe, bayes, call, _ = made("sd")
    other = copy.copy(pipe)
    other.scheduler = SCHEDULERS["sd"][number]
    again = BayesianPipeline(other, bayes.followed.arguments)
    again.posterior, again.schedule = bayes.posterior, bayes.schedule
    if not hasattr(other.scheduler, "alphas_cumprod"):  # says nothing of the training
        with pytest.raises(UserError, match="no alphas_cumprod"):
            checks.scheduler_error(again, other, call)
        return
    assert checks.scheduler_error(again, other, call) < 1e-5


def test_pipelines_that_scale_twice_are_refused(made):
    pipe, bayes, call, _ = made("dit")
    other = copy.copy(pipe)
    other.scheduler = next(s for s in SCHEDULERS["dit"] if type(s).__name__.startswith("LMS"))
    again = BayesianPipeline(other, bayes.followed.arguments)
    again.posterior, again.schedule = bayes.posterior, schedule_key(other.scheduler)
    with pytest.raises(UserError, match="scale it twice or never"):
        checks.scheduler_error(again, other, call)
    assert any("noise of sd 1" in finding.what for finding in again.doctor())
    assert not any("noise of sd 1" in finding.what for finding in bayes.doctor())


def test_first_order_maps_are_those_of_an_ensemble(made):
    _, bayes, call, _ = made("sd")
    given = {k: v for k, v in call.items() if k != "prompt"}
    exact = bayes("a cat", uncertainty=Linearised(draws="all"), **given)
    members = bayes("a cat", uncertainty=Ensemble(members=128), **given)
    for own, other in (
        (exact.variance, members.variance),
        (exact.latent_variance, members.latent_variance),
    ):
        assert checks.spearman(own.flatten(), other.flatten()) > 0.95
        assert 0.8 < float(own.mean() / other.mean()) < 1.25


def test_prompts_are_told_apart_and_guided(made):
    _, bayes, call, _ = made("sd")
    given = {k: v for k, v in call.items() if k not in ("prompt", "guidance_scale")}
    quick = {"uncertainty": Ensemble(members=2)} | given
    both = bayes(["a cat", "a dog"], guidance_scale=3.0, **quick).images
    assert torch.allclose(both[:1], bayes("a cat", guidance_scale=3.0, **quick).images, atol=1e-5)
    free = bayes(["a cat", "a dog"], guidance_scale=1.0, **quick)
    assert not torch.allclose(both, free.images, atol=1e-4)
    negative = bayes("a cat", guidance_scale=3.0, negative_prompt="a dog", **quick).images
    assert not torch.allclose(both[:1], negative, atol=1e-5)
    assert free.record["guidance"] == 1.0


def test_solvers_of_ours_take_the_schedulers_place(made):
    _, bayes, call, _ = made("unet2d")
    many = {"num_inference_steps": 2, "uncertainty": Ensemble(members=2)}
    coarse = bayes(solver=DDIM(num_steps=100), **many).images
    fine = bayes(solver=DDIM(num_steps=200), **many).images
    assert torch.allclose(coarse, fine, atol=0.02)


def test_a_posterior_is_kept_and_refused_for_another_network(made, tmp_path):
    pipe, bayes, call, _ = made("dit")
    bayes.save(tmp_path)
    again = BayesianPipeline.load(pipe, tmp_path)
    quick = {"uncertainty": Ensemble(members=3)} | call
    assert torch.equal(again(**quick).variance, bayes(**quick).variance)
    other = copy.copy(pipe)
    other.transformer = copy.deepcopy(pipe.transformer)
    next(other.transformer.parameters()).data += 1e-3
    with pytest.raises(UserError, match="another network"):
        BayesianPipeline.load(other, tmp_path)
    with pytest.raises(UserError, match=r"has no posterior\.json"):
        BayesianPipeline.load(pipe, tmp_path / "none")


def test_images_come_from_tensors_and_data_sets(made):
    pipe, bayes, _, images = made("unet2d")
    rows = [(image, 0) for image in images]
    again = BayesianPipeline.of(pipe, prior_precision=1e6).fit(rows, batch_size=6)
    assert torch.equal(again.posterior.curvature.gram, bayes.posterior.curvature.gram)
    for bad, reason in (
        (images * 3, "bring them to"), ([], "at least one"), (3, "got int"),
        ([images[0], images[0, :, :1]], "of one size"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            BayesianPipeline.of(pipe).fit(bad, batch_size=6)


def test_an_output_is_saved_as_pictures(made, tmp_path):
    _, bayes, call, _ = made("dit")
    out = bayes(uncertainty=Ensemble(members=2), **call)
    out.save(tmp_path)
    assert len(list((tmp_path / "png").glob("*.png"))) == 2
    assert "seed" in (tmp_path / "record.json").read_text()
    assert out.scores["map.sum"].shape == (1,)


def test_what_cannot_be_followed_is_refused_in_one_line(made):
    pipe, bayes, call, images = made("sd")
    with pytest.raises(UserError, match="no posterior yet"):
        BayesianPipeline.of(pipe)("a cat")
    with pytest.raises(UserError, match="takes no class labels"):
        bayes("a cat", class_labels=[1])
    with pytest.raises(UserError, match="3 prompts for 12 images"):
        BayesianPipeline.of(pipe).fit(images, prompts=["a", "b", "c"])
    with pytest.raises(UserError, match="takes prompts"):
        BayesianPipeline.of(pipe).fit(images)
    with pytest.raises(UserError, match="takes no 'hight'.*height"):
        bayes("a cat", hight=16)
    with pytest.raises(UserError, match="does not run with these arguments"):
        bayes("a cat", prompt_embeds=torch.zeros(1))
    with pytest.raises(UserError, match="guidance_rescale=0"):
        bayes("a cat", **{k: v for k, v in call.items() if k != "prompt"}, guidance_rescale=0.7)
    guarded = copy.copy(pipe)
    guarded.safety_checker = torch.nn.Identity()
    with pytest.raises(UserError, match="safety_checker=None"):
        BayesianPipeline.of(guarded)
    with pytest.raises(UserError, match="is no pipeline"):
        BayesianPipeline.of(torch.nn.Linear(2, 2))
    clipped = copy.copy(PIPELINES["unet2d"]())
    clipped.scheduler = type(clipped.scheduler).from_config(
        clipped.scheduler.config, clip_sample=True
    )
    own = BayesianPipeline.of(clipped)
    assert "clip_sample" in str(own.doctor())
    own.posterior, own.schedule = made("unet2d")[1].posterior, made("unet2d")[1].schedule
    with pytest.raises(UserError, match="clip_sample"):
        own(num_inference_steps=4)


def test_a_head_that_is_none_is_refused():
    pipe = PIPELINES["unet2d"]()
    pipe.unet.conv_out = torch.nn.ConvTranspose2d(pipe.unet.conv_out.in_channels, 3, 1)
    with pytest.raises(UserError, match=r"last layer .*, module\.conv_out, is no head"):
        FollowedPipeline(pipe).for_classes([], {})
    pipe.unet.conv_out = torch.nn.Sequential(
        torch.nn.Conv2d(pipe.unet.config.block_out_channels[0], 3, 3, padding=1), torch.nn.Tanh()
    )
    with pytest.raises(UserError, match="followed by"):
        FollowedPipeline(pipe).for_classes([], {})


def test_what_would_be_followed_wrongly_is_refused(made):
    pipe, bayes, call, images = made("sd")
    given = {k: v for k, v in call.items() if k != "prompt"}
    for more, reason in (
        ({"latents": torch.zeros(1, 4, 8, 12)}, "give seed="),
        ({"generator": torch.Generator()}, "give seed="),
        ({"num_images_per_prompt": 2}, "give num_images="),
        ({"callback_on_step_end": lambda *a: a[-1]}, "may change the state"),
    ):
        with pytest.raises(UserError, match=reason):
            bayes("a cat", **given, **more)
    for bad, reason in (
        ({"seed": [1]}, "seed"), ({"uncertainty": "linearised"}, "no estimator"),
        ({"solver": "ddim"}, "no solver"), ({"num_inference_steps": 0}, "num_inference_steps"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason):
            bayes("a cat", **given | bad)
    with pytest.raises(UserError, match="no 'structur'.*structure"):
        BayesianPipeline.of(pipe, structur="full")
    with pytest.raises(UserError, match="no 'drawz'.*draws"):
        BayesianPipeline.of(pipe).fit(images, prompts=["a"] * 12, drawz=2)

    other = copy.copy(pipe)
    own = BayesianPipeline.of(other)
    own.posterior, own.schedule = bayes.posterior, bayes.schedule
    other.scheduler = type(pipe.scheduler).from_config(
        pipe.scheduler.config, prediction_type="v_prediction"
    )
    with pytest.raises(UserError, match="another schedule or prediction"):
        own("a cat", **given)
    other.scheduler = pipe.scheduler
    other.vae = copy.deepcopy(pipe.vae)
    with pytest.raises(UserError, match="vae is another one"):
        own("a cat", **given)


def test_an_image_to_begin_with_is_refused(made):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, _, _, images = made("sd")
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    other = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    arguments = {"image": torch.rand(1, 3, 16, 16), "strength": 1.0}
    with pytest.raises(UserError, match="does not start from noise alone"):
        BayesianPipeline.of(other, arguments).fit(images[:2], prompts=["a", "b"])


def test_the_noise_of_a_steps_own_argument_is_followed(made):
    pipe, bayes, call, _ = made("sd")
    assert checks.scheduler_error(bayes, pipe, call | {"eta": 1.0}) < 1e-5


def test_guidance_is_kept_by_solvers_of_ours(made):
    _, bayes, call, _ = made("sd")
    given = {k: v for k, v in call.items() if k != "prompt"} | {"uncertainty": Ensemble(members=2)}
    guided = bayes("a cat", solver=DDIM(num_steps=4), **given)
    assert guided.record["guidance"] == 3.0
    free = bayes("a cat", solver=DDIM(num_steps=4), **given | {"guidance_scale": 1.0})
    assert not torch.allclose(guided.images, free.images, atol=1e-4)


def test_one_step_is_enough(made):
    pipe, bayes, call, _ = made("sd")
    assert checks.scheduler_error(bayes, pipe, call | {"num_inference_steps": 1}) < 1e-5


def test_images_of_a_folder_keep_the_order_of_their_names(tmp_path):
    from PIL import Image

    for number in range(12):
        Image.new("L", (4, 4), 20 * number).save(tmp_path / f"{number:03}.png")
    read = TrainingImages.of(tmp_path)
    assert [int(image[0, 0, 0]) for image in read.items] == [20 * n for n in range(12)]


def test_half_precision_is_summed_wide(made):
    pipe, bayes, _, images = made("unet2d")
    half = copy.copy(pipe)
    half.unet = copy.deepcopy(pipe.unet).to(torch.bfloat16)
    own = BayesianPipeline.of(half, prior_precision=1e6).fit(images, batch_size=6)
    full: HeadPosterior = bayes.posterior
    assert own.posterior.curvature.gram.dtype == torch.float64
    difference = own.posterior.curvature.gram - full.curvature.gram
    assert float(difference.norm() / full.curvature.gram.norm()) < 0.02
    out = own(num_inference_steps=3, uncertainty=Ensemble(members=3))
    assert out.variance.isfinite().all()
    assert float(out.variance.mean()) > 0
