"""Does the model of memory and time (``BayesianPipeline.needs``) foretell what a run takes?

    python experiments/pretrained/memory.py [NOTE]   # some minutes of one core, timed

Measured: networks of 5 to 60 million weights on a CPU, one process each, resident memory at most
and processor seconds. Modelled: large networks of diffusers, run on the meta device, which
computes nothing.
NOTE says what else ran. Writes ``memory.*`` into results.json.
"""

import ctypes
import gc
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    UNet2DModel,
)
from large import table
from torch import nn

from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline
from bayesdiff.solvers import Field
from bayesdiff.uncertainty import Ensemble, Linearised
from bayesdiff.uncertainty.sensitivities.products import derivatives

HERE = Path(__file__).parent
MIB = 2**20
SCHEDULE = {"beta_schedule": "linear", "clip_sample": False, "timestep_spacing": "trailing"}
STEPS, IMAGES = 2, 2
ESTIMATORS = {
    "ensemble": Ensemble(members=6, noise_members=0),
    "difference": Linearised(draws=6, derivative="difference"),
    "exact": Linearised(draws=4),
}


def unet(*widths):
    """A pipeline of states 4x32x32 that are images."""
    deep = ("AttnDownBlock2D",) * (len(widths) - 1)
    up = ("AttnUpBlock2D",) * (len(widths) - 1)
    net = UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        down_block_types=("DownBlock2D", *deep),
        up_block_types=(*up, "UpBlock2D"),
        attention_head_dim=32,
    )
    return DDPMPipeline(net.eval(), DDIMScheduler(**SCHEDULE)), {}


def dit(layers, width):
    """A pipeline of latents 4x32x32 of 64x64 pixels."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(64, 64),
        latent_channels=4,
        sample_size=64,
    )
    net = DiTTransformer2DModel(
        num_attention_heads=width // 64,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        sample_size=32,
        num_embeds_ada_norm=1000,
    )
    pipe = DiTPipeline(net.eval(), vae.eval(), DDIMScheduler(**SCHEDULE))
    return pipe, {"guidance_scale": 1.0}


CASES = {
    "unet-small": lambda: unet(64, 128),
    "unet": lambda: unet(128, 256, 384),
    "dit-small": lambda: dit(4, 256),
    "dit": lambda: dit(10, 512),
}
TINY = {"unet": lambda: unet(32, 32, 32), "dit": lambda: dit(1, 64)}
STAGES = ("fit", *ESTIMATORS)
FITTED, BATCH = 24, 24


def resident(name):
    """Bytes of this process, VmRSS now or VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def one(case, stage):
    """Measure one stage of one case in this process, after the same with a network of nothing."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    run(TINY[case.split("-")[0]], stage)
    empty = settled()
    pipe, images, shown, call = made(CASES[case])
    bayes = BayesianPipeline.of(pipe)
    estimator = ESTIMATORS.get(stage)
    needs = bayes.needs(
        STEPS, estimator, num_images=IMAGES, fitted_to=len(images), batch_size=BATCH, **call
    )
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    found = {"weights": sum(p.numel() for part in parts for p in part.parameters())}
    foretold = needs.weights + (needs.fit if estimator is None else needs.maps)
    before = settled()
    Path("/proc/self/clear_refs").write_text("5")
    if estimator is None:
        bayes.fit(images, batch_size=BATCH, **shown)
    else:
        fit_to_two(bayes, images, shown)
        seconds = map_images(bayes, estimator, shown, call)
        model, coder = next(iter(bayes.followed._models.values()))
        forward, decode = seconds_of(model, coder, estimator)
        # What a product repeats of the image's own evaluation is in the product's time.
        found["foretold_seconds"] = IMAGES * (needs.evaluations * forward)
        found["foretold_seconds"] += IMAGES * estimator.copies(DDIM) * decode
        found |= {"seconds": seconds, "forward": forward, "decode": decode}
    found |= {
        "measured_mib": (resident("VmHWM") - empty) / MIB,
        "foretold_mib": foretold / MIB,
        "there_before_mib": (before - empty) / MIB,
    }
    print(json.dumps(found))


def made(case):
    """A pipeline, images of its size, what they show, and arguments of its calls."""
    pipe, call = case()
    classes = isinstance(pipe, DiTPipeline)
    size = (3, 64, 64) if classes else (4, 32, 32)
    return pipe, torch.rand(FITTED, *size), {"labels": [1] * FITTED} if classes else {}, call


def fit_to_two(bayes, images, shown):
    """The least posterior."""
    given = {name: values[:2] for name, values in shown.items()}
    bayes.fit(images[:2], batch_size=1, **given)


def map_images(bayes, estimator, shown, call):
    """Seconds of the processor for maps of some images."""
    asked = {"class_labels": [1, 2]} if shown else {"num_images": IMAGES}
    started = time.process_time()
    bayes(uncertainty=estimator, num_inference_steps=STEPS, **asked, **call)
    return time.process_time() - started


def run(case, stage):
    """A stage from the beginning to the end."""
    pipe, images, shown, call = made(case)
    bayes = BayesianPipeline.of(pipe)
    if stage == "fit":
        bayes.fit(images, batch_size=BATCH, **shown)
    else:
        fit_to_two(bayes, images, shown)
        bayes.needs(STEPS, ESTIMATORS[stage], **call)
        map_images(bayes, ESTIMATORS[stage], shown, call)


def settled():
    """Bytes of this process, freed memory given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident("VmRSS")


class DDIM:
    """A solver that draws no noise, for ``copies``."""

    stochastic = False


def seconds_of(model, coder, estimator):
    """Seconds of one network input of the maps, and of one decoding."""
    rows = estimator.copies(DDIM) - 1
    x = torch.randn(IMAGES, *coder.shape)
    y = None if model.condition is None else torch.zeros(IMAGES, dtype=torch.long)
    field = Field(model, y, IMAGES)
    if getattr(estimator, "derivative", "") == "exact":
        output, d = field(x, 0.5), torch.randn(rows, *x.shape)
        forward = timed(lambda: derivatives(field, x, output, d, 0.5), IMAGES * (1 + rows))
    else:
        many = x.repeat(rows, *[1] * (x.dim() - 1))
        forward = timed(lambda: field.features(many, 0.5), IMAGES * rows)
    return forward, 0.0 if coder.coder is None else timed(lambda: coder.decode(x[:1]), 1)


@torch.no_grad()
def timed(function, count):
    """Seconds of the processor for one of so many, the better of two runs."""
    function()
    seconds = []
    for _ in range(2):
        started = time.process_time()
        function()
        seconds.append(time.process_time() - started)
    return min(seconds) / count


def main():
    """All cases and stages, each in a process of its own, then the large networks."""
    found = {"memory.note": sys.argv[1] if len(sys.argv) > 1 else ""}
    for case in CASES:
        for stage in STAGES[:2] if case.endswith("small") else STAGES:
            command = [sys.executable, __file__, "--one", case, stage]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(case, stage, row, flush=True)
            found |= {f"memory.{case}.{stage}.{name}": value for name, value in row.items()}
    found |= table()
    path = HERE / "results.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = {name: value for name, value in kept.items() if not name.startswith("memory.")}
    path.write_text(json.dumps(kept | found, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(*sys.argv[2:])
    else:
        main()
