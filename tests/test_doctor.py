"""Traps of diffusers' schedulers: each is named where it is, and nowhere else."""

import diffusers
import numpy as np
import pytest
import torch
from test_probing import CASES, SINGLE, VP, made

from bayesdiff.pretrained.doctor import diagnose

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
DDIM = {"clip_sample": False, "steps": 10}
TRAPS = [
    ("DDIM", {}, "clip_sample=True clips", "clip_sample=False"),
    ("CMStochasticIterative", {}, "clip_denoised=True clips", "clip_denoised=False"),
    ("UniPCMultistep", {"thresholding": True, **VP}, "thresholding=True", "thresholding=False"),
    (
        "DDPM",
        {"clip_sample": False, "variance_type": "learned_range"},
        "variance_type=learned_range",
        "variance_type=fixed_small",
    ),
    (
        "DDIM",
        {"timestep_spacing": "linspace", **DDIM},
        "a step lands on time step 899 while the loop visits 888 next",
        "timestep_spacing=trailing",
    ),
    (
        "DDIM",
        {"timestep_spacing": "linspace", "prediction_type": "v_prediction", **DDIM},
        "a step lands on time step 899 while the loop visits 888 next",
        "timestep_spacing=trailing",
    ),
    (
        "PNDM",
        {"timestep_spacing": "linspace", "skip_prk_steps": True, "steps": 10, **VP},
        "a step lands on time step 899 while the loop visits 888 next",
        "timestep_spacing=trailing",
    ),
    (
        "FlowMatchEulerDiscrete",
        {"shift": 3.0},
        "shift=3 is applied twice, so that the last noise level is 0.0089 and not 0.0030",
        "scheduler.set_timesteps(sigmas=numpy.linspace(1, 1 / 1000, steps))",
    ),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}, "shift=3 is applied twice", "use shift=1"),
    (
        "DDIM",
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", **DDIM},
        "the first time step 999 has no signal",
        "rescale_betas_zero_snr=False",
    ),
    *[
        (
            name,
            {"steps": 20, **COSINE, **config},
            "the first step, from time step 999, where the signal is 4.9e-05, makes of an error "
            "in the predicted noise one 1,",
            "timestep_spacing=leading",
        )
        for name, config in (
            ("DDIM", {"clip_sample": False, "timestep_spacing": "trailing"}),
            (SINGLE, {}),
        )
    ],
    (
        "DPMSolverMultistep",
        {"use_karras_sigmas": True, "steps": 20, **COSINE},
        "time step 998 is visited at the noise levels 2.029e+04 and 1.455e+04",
        "use_karras_sigmas=False",
    ),
]


@pytest.mark.parametrize(("name", "config", "what", "cure"), TRAPS)
def test_a_trap_is_named_with_its_cure(name, config, what, cure):
    scheduler = made(name, **config)
    before = scheduler.timesteps.clone()
    (finding,) = [each for each in diagnose(scheduler) if what in each.what]
    assert what in finding.what and cure in finding.cure and finding.why
    assert "\n" not in finding.what + finding.why + finding.cure
    assert scheduler.timesteps.equal(before)


def test_an_error_grows_by_as_much_as_is_said():
    """A network that is off by 1 % at its first answer, on an image that is 0."""
    scheduler = made("DDIM", clip_sample=False, timestep_spacing="trailing", steps=20, **COSINE)
    (finding,) = diagnose(scheduler)
    growth = float(finding.what.split()[-4].replace(",", ""))
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    right, wrong = (scheduler.step(e * x, 999, x).prev_sample for e in (1.0, 1.01))
    assert float(right - wrong) / 0.01 == pytest.approx(growth, rel=1e-2)


SOUND = [
    *[
        (name, config)
        for name, config, _ in CASES
        if config.get("shift", 1) == 1
        # Cosine betas from the last on, unclipped.
        and (name, config.get("prediction_type")) != ("UnCLIP", None)
    ],
    *[("DDIM", {"timestep_spacing": spacing, **DDIM}) for spacing in ("leading", "trailing")],
    # Every step is a third of a time step short, which does not add up.
    ("DDIM", {"timestep_spacing": "trailing", "clip_sample": False, "steps": 30}),
    ("DDIM", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", **DDIM}),
    ("DPMSolverMultistep", {"variance_type": "learned_range", **VP}),
    ("DPMSolverMultistep", {"use_karras_sigmas": True, **VP, "steps": 20}),
    ("DDIM", {"clip_sample": False, "timestep_spacing": "leading", "steps": 20, **COSINE}),
    ("DDPM", {"clip_sample": False, "steps": 1000, **COSINE}),
    (
        "DDIM",
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", **COSINE, **DDIM},
    ),
]


@pytest.mark.parametrize(
    ("name", "config"), SOUND, ids=[f"{name}-{i}" for i, (name, _) in enumerate(SOUND)]
)
def test_a_sound_scheduler_has_no_findings(name, config):
    assert diagnose(made(name, **config)) == ()


def test_the_cures_cure():
    linspace = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    trailing = diffusers.DDIMScheduler.from_config(linspace.config, timestep_spacing="trailing")
    trailing.set_timesteps(10)
    shifted = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    shifted.set_timesteps(sigmas=np.linspace(1, 1 / 1000, 6))
    assert diagnose(trailing) == diagnose(shifted) == ()
    assert float(shifted.sigmas[-2]) == pytest.approx(0.0030, abs=1e-4)
