"""``model=pretrained``: the stages of a run on a folder that diffusers has written."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import compose_list
from hydra.errors import InstantiationException

pytest.importorskip("diffusers")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DDPMPipeline,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from pipelines import PIPELINES  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.pipeline import prepare, run  # noqa: E402
from bayesdiff.pretrained import command  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.solvers import SampleNoise  # noqa: E402
from bayesdiff.storage.artefacts import read_arrays  # noqa: E402
from bayesdiff.sweeps.plan.cells import look  # noqa: E402
from bayesdiff.uncertainty import Ensemble  # noqa: E402

EULER = "solver.scheduler=EulerDiscreteScheduler"
SMALL = (
    "data=digits", "uncertainty=ensemble", "uncertainty.members=3", "uncertainty.num_images=6",
    "metrics.num_images=0", "solver.num_steps=3", "report.pdf=false",
)  # fmt: skip


def of_digits(classes=11):
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2,
        "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1,
    }  # fmt: skip
    size = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": classes}
    unet = UNet2DModel(**size, **blocks).eval()
    schedule = {"beta_end": 0.002, "clip_sample": False, "timestep_spacing": "trailing"}
    return DDPMPipeline(unet, DDIMScheduler(**schedule))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("pipeline")
    of_digits().save_pretrained(where)
    return where


def configured(folder, out, *more):
    words = ["model=pretrained", f"model.path={folder}", f"output_dir={out}", *SMALL, *more]
    return compose_list(words)


def test_a_run_makes_the_maps_of_the_python_interface(folder, tmp_path):
    result = run(configured(folder, tmp_path, "solver.guidance=2"))
    assert result.weights == "those that the network came with"
    made = read_arrays(result.samples)
    assert made["labels"].tolist() == [0, 1, 2, 3, 4, 5]
    again = run(configured(folder, tmp_path, "solver.guidance=2"))
    assert again.samples == result.samples and again.metrics == result.metrics

    planned = look([], configured(folder, tmp_path, "solver.guidance=2"))
    assert not planned.error and all(work.made for work in planned.works)
    other = look([], configured(folder, tmp_path, "solver.guidance=3"))
    assert {work.stage for work in other.works if not work.made} == {"maps", "report"}
    (captions,) = tmp_path.glob("*/*/figures/captions.json")
    said = json.loads(captions.read_text())["samples"]["caption"].replace("\u00a0", " ")
    assert f"digits, pretrained {folder.name} (noise), DDIMScheduler, 3 steps, seed 0" in said

    cfg = configured(folder, tmp_path, "solver.guidance=2")
    this, *_ = prepare(cfg)
    data = this.data.data
    bayes = BayesianPipeline.of(of_digits()).fit(
        data.images, labels=data.labels.tolist(), batch_size=256
    )
    out = bayes(
        class_labels=range(6), guidance_scale=2.0, num_inference_steps=3, seed=0,
        uncertainty=Ensemble(members=3),
    )  # fmt: skip
    assert torch.allclose(out.samples.images, made["images"], atol=1e-4)
    assert torch.allclose(out.samples.variance, made["variance"], rtol=1e-3, atol=1e-7)


def test_another_scheduler_takes_the_pipelines_place(folder, tmp_path):
    own = command.solver(str(folder), 4)
    other = command.solver(str(folder), 4, scheduler="DPMSolverMultistepScheduler")
    assert other.called == "DPMSolverMultistepScheduler" and own.called == "DDIMScheduler"
    assert other.own != own.own
    karras = command.solver(
        str(folder), 4, scheduler="EulerDiscreteScheduler", options={"use_karras_sigmas": True}
    )
    assert len(karras.own) == 4


def test_a_run_is_named_by_the_pipelines_folder(folder, tmp_path):
    plain, *_ = prepare(configured(folder, tmp_path))
    assert re.fullmatch(f"digits-pretrained-{folder.name}-[0-9a-f]{{8}}", plain.folder.name)
    other, *_ = prepare(configured(folder, tmp_path, "seed=3"))
    assert other.folder.name.startswith(f"digits-pretrained-{folder.name}-seed_3-")


def test_another_scheduler_is_examined_with_the_steps_that_it_gets(tmp_path, caplog):
    pipe = of_digits()
    pipe.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipe.save_pretrained(tmp_path)
    trailing = {"options": {"timestep_spacing": "trailing"}}
    with caplog.at_level("WARNING"):
        command.solver(str(tmp_path), 4)
    assert "first step" not in caplog.text
    with caplog.at_level("WARNING"):
        command.solver(str(tmp_path), 4, **trailing)
        command.solver(str(tmp_path), 4, **trailing)
    assert caplog.text.count("the first step, from time step 999") == 1


def test_another_scheduler_starts_from_the_noise_that_it_asks_for(folder, tmp_path):
    """DDPMPipeline scales neither noise nor states: in its loop these come out grey."""
    made = read_arrays(run(configured(folder, tmp_path, EULER)).samples)
    pipe = of_digits()
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(3)
    x = SampleNoise(0, range(6), (1, 8, 8))() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            seen = scheduler.scale_model_input(x, t)
            output = pipe.unet(seen, t, class_labels=torch.arange(6)).sample
        x = scheduler.step(output, t, x).prev_sample
    assert torch.allclose(made["images"], x, atol=1e-4)


def test_a_score_network_runs_from_the_command_line(tmp_path):
    PIPELINES["ncsnpp"]().save_pretrained(tmp_path / "ncsnpp")
    images = np.random.default_rng(0).integers(0, 255, (24, 3, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", images=images)
    words = "data=array", f"data.root={tmp_path / 'rgb.npz'}"
    cfg = configured(tmp_path / "ncsnpp", tmp_path / "out", *words)
    made = read_arrays(run(cfg).samples)
    assert made["variance"].shape == (6, 3, 8, 8) and bool((made["variance"] > 0).all())
    bayes = BayesianPipeline.of(PIPELINES["ncsnpp"]()).fit(images)
    out = bayes(num_images=6, num_inference_steps=3, uncertainty=Ensemble(members=3))
    assert torch.allclose(out.samples.images, made["images"], atol=1e-3)


def test_cells_of_one_process_keep_their_own_conditions(folder, tmp_path):
    first, *_ = prepare(configured(folder, tmp_path))
    before = [row for row in first.model.condition.table.given]
    other, *_ = prepare(
        configured(folder, tmp_path, "model.condition.labels=[9,8,7,6,5,4,3,2,1,0]")
    )
    again, *_ = prepare(configured(folder, tmp_path))
    for mine, kept, third in zip(
        before, first.model.condition.table.given, again.model.condition.table.given, strict=True
    ):
        for key, value in mine.items():
            assert torch.equal(value, kept[key]) and torch.equal(value, third[key])
    assert other.model.condition.table is not first.model.condition.table
    assert first.key == again.key != other.key


def test_latents_have_maps_of_pixels(tmp_path):
    PIPELINES["dit"]().save_pretrained(tmp_path / "dit")
    side = 16
    images = np.random.default_rng(0).integers(0, 255, (24, 3, side, side), dtype=np.uint8)
    np.savez(tmp_path / "rgb.npz", images=images, labels=np.arange(24) % 3)
    cfg = configured(
        tmp_path / "dit",
        tmp_path / "out",
        "data=array",
        f"data.root={tmp_path / 'rgb.npz'}",
        "model.condition.labels=[7,8,9]",
    )
    made = read_arrays(run(cfg).samples)
    assert made["variance"].shape == (6, 3, side, side)
    assert made["latent_variance"].shape[1] == 4
    with pytest.raises(UserError, match="do not go through the pipeline's encoder"):
        prepare(configured(tmp_path / "dit", tmp_path / "out", "model.condition.labels=null"))


@pytest.mark.parametrize(
    "more, reason",
    [
        (["model.path=/nowhere/at/all"], "no folder at model.path=/nowhere/at/all"),
        (["model.path=."], "no model_index.json"),
        (["solver.scheduler=DDIMSchedular"], "no scheduler 'DDIMSchedular'.*DDIMScheduler"),
        (["solver.options={karras: true}"], "has no option 'karras'"),
        (["model.condition.labels=[1,2]"], "2 prompts or labels and digits has 10 classes"),
        (["data=moons"], "makes pictures, and moons has none"),
        (["solver.num_steps=0"], "solver.num_steps"),
        (["uncertainty.skip_interval=2"], "skip_interval"),
    ],
)
def test_bad_input_is_refused_in_one_line(folder, tmp_path, more, reason):
    with pytest.raises((UserError, InstantiationException)) as error:
        prepare(configured(folder, tmp_path, *more))
    refused = error.value if isinstance(error.value, UserError) else error.value.__cause__
    assert isinstance(refused, UserError)
    assert re.search(reason, str(refused))
    assert "\n" not in str(refused)


def test_a_folder_with_foreign_code_runs_none_of_it(tmp_path, folder):
    of_digits().save_pretrained(tmp_path / "odd")
    (tmp_path / "odd" / "pipeline.py").write_text("raise SystemExit('ran')\n")
    index = tmp_path / "odd" / "model_index.json"
    content = json.loads(index.read_text())
    content["_class_name"] = ["pipeline", "Odd"]
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match="cannot be loaded"):
        command.opened(str(tmp_path / "odd"))
