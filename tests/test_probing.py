"""Steps found by probing do what the scheduler's own loop does."""

from copy import deepcopy

import diffusers
import pytest
import torch

from bayesdiff.pretrained.probing import probed_steps
from bayesdiff.solvers import integrate

SHAPE = (2, 3, 5, 4)


def made(name, steps=6, **config):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    if name == "ScoreSdeVe":
        scheduler.set_sigmas(steps)
    return scheduler


def time_of(t):
    return 1 - t / 1000


def network(x, t):
    """Nonlinear in the input, the pixel and the time."""
    bias = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).reshape(x.shape[1:])
    return torch.tanh(0.7 * x + bias) + 0.3 * torch.sin(5 * t + x)


def own_loop(scheduler, x, **options):
    """The scheduler's samples, and the noise of the steps in order."""
    scheduler, noise = deepcopy(scheduler), []
    generator = torch.Generator().manual_seed(7)
    x = x * getattr(scheduler, "init_noise_sigma", 1.0)
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    takes = step.__code__.co_varnames[: step.__code__.co_argcount]
    for i, t in enumerate(scheduler.timesteps):
        u = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        before, more = generator.clone_state(), dict(options)
        if "generator" in takes:
            more["generator"] = generator
        if "prev_timestep" in takes:
            more["prev_timestep"] = [*scheduler.timesteps[1:], None][i]
        x = step(network(u, time_of(float(t))), t, x, **more).prev_sample
        noise.append(None)
        for dtype in (torch.float64, torch.float32):
            twin = before.clone_state()
            z = torch.randn(SHAPE, generator=twin, dtype=dtype)
            if torch.equal(twin.get_state(), generator.get_state()):
                noise[-1] = z.double()
    return x, noise


def error(scheduler, **options):
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, noise = own_loop(scheduler, x, **options)
    steps = probed_steps(scheduler, time_of, step_kwargs=options)
    drawn = iter(z for z, step in zip(noise, steps, strict=True) if step.stochastic)
    sample = integrate(network, steps, x, lambda: next(drawn))
    assert next(drawn, None) is None
    return float((sample - expected).abs().max() / expected.abs().max())


VP = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MULTI, SINGLE, EULER = "DPMSolverMultistep", "DPMSolverSinglestep", "EulerDiscrete"
CASES = [
    ("DDIM", {"clip_sample": False}, {}),
    ("DDIM", {"clip_sample": False, "prediction_type": "v_prediction", **VP}, {"eta": 0.7}),
    ("DDIM", {"clip_sample": False, "prediction_type": "sample"}, {"eta": 1.0}),
    ("DDPM", {"clip_sample": False}, {}),
    ("DDPM", {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    ("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}, {}),
    ("PNDM", {"steps": 10}, {}),
    ("PNDM", {"skip_prk_steps": True, **VP}, {}),
    ("LMSDiscrete", VP, {}),
    ("LMSDiscrete", {"use_karras_sigmas": True, **VP}, {}),
    ("DEISMultistep", {}, {}),
    ("DEISMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}, {}),
    ("IPNDM", {}, {}),
    ("UniPCMultistep", VP, {}),
    ("UniPCMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}, {}),
    (
        "UniPCMultistep",
        {"predict_x0": False, "solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {},
    ),
    ("UniPCMultistep", {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {}),
    *[
        (MULTI, {"algorithm_type": kind, "solver_order": order, "steps": 7, **VP, **more}, {})
        for kind, orders, more in (
            ("dpmsolver", (1, 2, 3), {"final_sigmas_type": "sigma_min"}),
            ("dpmsolver++", (1, 2, 3), {}),
            ("sde-dpmsolver++", (1, 2), {}),
            ("sde-dpmsolver", (1, 2), {"final_sigmas_type": "sigma_min"}),
        )
        for order in orders
    ],
    (MULTI, {"use_karras_sigmas": True, **VP}, {}),
    (MULTI, {"euler_at_final": True, "solver_type": "heun", **VP}, {}),
    (MULTI, {"lower_order_final": False, "solver_order": 3, **VP}, {}),
    (MULTI, {"prediction_type": "flow_prediction", "use_flow_sigmas": True}, {}),
    (MULTI, {"prediction_type": "sample", "algorithm_type": "sde-dpmsolver++", **VP}, {}),
    *[(SINGLE, {"solver_order": order, "steps": 7, **VP}, {}) for order in (1, 2, 3)],
    (SINGLE, {"algorithm_type": "sde-dpmsolver++", **VP}, {}),
    *[
        (EULER, {"timestep_spacing": spacing, **VP}, {})
        for spacing in ("leading", "trailing", "linspace")
    ],
    (EULER, {"use_karras_sigmas": True, **VP}, {}),
    (EULER, {"prediction_type": "v_prediction", **VP}, {"s_churn": 2.0}),
    ("EulerAncestralDiscrete", VP, {}),
    ("EulerAncestralDiscrete", {"prediction_type": "v_prediction", **VP}, {}),
    ("HeunDiscrete", VP, {}),
    ("HeunDiscrete", {"prediction_type": "v_prediction", "use_karras_sigmas": True, **VP}, {}),
    ("KDPM2Discrete", VP, {}),
    ("KDPM2AncestralDiscrete", VP, {}),
    ("KDPM2AncestralDiscrete", {"prediction_type": "v_prediction", **VP}, {}),
    ("FlowMatchEulerDiscrete", {}, {}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}, {}),
    ("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, {}),
    ("FlowMatchHeunDiscrete", {"shift": 3.0}, {}),
    ("SASolver", VP, {}),
    ("SASolver", {"algorithm_type": "noise_prediction", **VP}, {}),
    ("SASolver", {"predictor_order": 3, "corrector_order": 3, **VP}, {}),
    ("TCD", {}, {}),
    ("TCD", {}, {"eta": 0.0}),
    ("LCM", {}, {}),
    ("UnCLIP", {"clip_sample": False}, {}),
    ("UnCLIP", {"clip_sample": False, "prediction_type": "sample"}, {}),
    ("ScoreSdeVe", {"correct_steps": 0}, {}),
    ("EDMEuler", {}, {}),
    ("EDMDPMSolverMultistep", {}, {}),
    ("CMStochasticIterative", {"clip_denoised": False}, {}),
]


@pytest.mark.parametrize(
    ("name", "config", "options"), CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]
)
def test_steps_do_what_the_scheduler_does(name, config, options):
    assert error(made(name, **config), **options) < 1e-6
