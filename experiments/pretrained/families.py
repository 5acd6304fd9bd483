"""Small random networks of every family: split, curvature, schedulers and maps against the truth.

    python experiments/pretrained/families.py [FAMILY ...]

Each pipeline is saved as a folder and loaded from it. Writes ``<family>.*`` into results.json.
"""

import copy
import json
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

import pretrained_checks as checks  # noqa: E402
import test_network_pipeline as uvit  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from pipelines import CALLS, PIPELINES, SCHEDULERS  # noqa: E402

from bayesdiff.checks import UserError  # noqa: E402
from bayesdiff.laplace.posterior import HeadPosterior  # noqa: E402
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline  # noqa: E402
from bayesdiff.pretrained.schedule import schedule_key  # noqa: E402

FAMILIES = (
    "unet2d",
    "adm",
    "ncsnpp",
    "sd",
    "sd_v",
    "sdxl",
    "dit",
    "pixart",
    "sd3",
    "flux",
    "uvit",
)
IMAGES, MEMBERS = 20, 256


def made(name):
    """The pipeline, read back from a folder where diffusers can write one."""
    if name == "uvit":
        pipe = uvit.uvit(True, 8.0)
        return pipe, uvit.CALL, [pipe.scheduler]
    pipe = PIPELINES[name]()
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        if name != "adm":  # from_pretrained gives every other one as it was
            pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None).to("cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe, CALLS[name], SCHEDULERS[name]


def worst(bayes, pipe, call, schedulers):
    """Largest error over the schedulers that say what was trained, and those refused, by name."""
    errors, refused = {}, {}
    for number, scheduler in enumerate(schedulers):
        other = copy.copy(pipe)
        other.scheduler = scheduler
        again = BayesianPipeline(other, bayes.followed.arguments)
        called = f"{number}-{type(scheduler).__name__}"
        try:
            # Random networks were trained under no schedule: each scheduler's own will do.
            again.posterior, again.schedule = bayes.posterior, schedule_key(scheduler)
            errors[called] = checks.scheduler_error(again, other, call)
        except UserError as error:
            refused[called] = str(error)
    return errors, refused


def figures(name):
    """All figures of one family."""
    pipe, call, schedulers = made(name)
    if name == "adm":  # its own scheduler takes the noise's variance from the network
        pipe.scheduler = schedulers[1]
    with checks.double_by_default():
        wide, _, images = checks.fitted(pipe, call, 6, wide=True)
        shown = None if wide.followed.condition is None else torch.tensor([0, 1] * 3)
        curvature = checks.curvature_error(wide, images, shown)
    bayes, call, _ = checks.fitted(pipe, call, 12, prior_precision=1e6)
    errors, refused = worst(bayes, pipe, call, schedulers)
    bayes.posterior = HeadPosterior.fit(bayes.posterior.curvature, prior_precision=1e6)
    return {
        f"{name}.split_error": checks.split_error(bayes),
        f"{name}.curvature_error": curvature,
        f"{name}.scheduler_error": max(errors.values()),
        f"{name}.schedulers": len(errors),
        f"{name}.refused": refused,
        f"{name}.image_rank": checks.image_rank(bayes, call, IMAGES, MEMBERS),
    }


def main():
    """Measure the families that are asked for, or all."""
    path = HERE / "results.json"
    for name in sys.argv[1:] or FAMILIES:
        found = figures(name)
        results = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(results | found, indent=2, sort_keys=True) + "\n")
        print({k: v for k, v in found.items() if not k.endswith("refused")}, flush=True)


if __name__ == "__main__":
    main()
