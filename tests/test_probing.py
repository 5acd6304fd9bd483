"""Steps found by probing do what the scheduler's own loop does."""

import inspect
import re
from copy import deepcopy

import diffusers
import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor

from bayesdiff.checks import UserError
from bayesdiff.pretrained.probing import probed_steps
from bayesdiff.solvers import integrate
from bayesdiff.solvers.integrate import held_after

SHAPE = (2, 3, 5, 4)


def made(name, steps=6, **config):
    scheduler = getattr(diffusers, f"{name}Scheduler")(**config)
    scheduler.set_timesteps(steps)
    if name == "ScoreSdeVe":
        scheduler.set_sigmas(steps)
    return scheduler


def time_of(t):
    return min(max(1 - t / 1000, 0.0), 1.0)


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
        result = step(network(u, time_of(float(t))), t, x, **more)
        last = i + 1 == len(scheduler.timesteps)  # where a score's pipeline adds no noise
        x = getattr(result, "prev_sample_mean" if last else "prev_sample", result.prev_sample)
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
    ("ScoreSdeVe", {"correct_steps": 0, "sigma_max": 0.6}, {}),
    ("EDMEuler", {}, {}),
    ("EDMDPMSolverMultistep", {}, {}),
    ("CMStochasticIterative", {"clip_denoised": False}, {}),
]


@pytest.mark.parametrize(
    ("name", "config", "options"), CASES, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(CASES)]
)
def test_steps_do_what_the_scheduler_does(name, config, options):
    scheduler = made(name, **config)
    if "stochastic_sampling" in config and not hasattr(
        inspect.getmodule(type(scheduler)), "randn_tensor"
    ):
        pytest.skip("older diffusers draw this noise from no generator")
    assert error(scheduler, **options) < 1e-6


@pytest.mark.parametrize(
    ("name", "config", "held"),
    [
        ("DDIM", {"clip_sample": False}, 0),
        ("EulerDiscrete", VP, 0),
        (MULTI, {"algorithm_type": "sde-dpmsolver++", **VP}, 1),
        ("HeunDiscrete", VP, 1),
        ("KDPM2AncestralDiscrete", VP, 1),
        ("EDMDPMSolverMultistep", {}, 1),
        (SINGLE, {"solver_order": 3, **VP}, 1),
        ("UniPCMultistep", VP, 3),
        ("LMSDiscrete", VP, 3),
        ("PNDM", {"skip_prk_steps": True, **VP}, 3),
    ],
)
def test_no_more_is_kept_than_the_method_needs(name, config, held):
    """An order of k holds k - 1 combinations: of DPM-Solver++ data predictions, not x and g."""
    steps = probed_steps(made(name, steps=9, **config), time_of)
    assert max(held_after(steps)) == held
    assert all(len(step.kept) <= 1 for step in steps)
    assert all(step.inputs == ((1.0,),) for step in steps[1:])


def test_coefficients_are_those_of_the_formula():
    """DDIM in its textbook form, at float64 to the last digits."""
    scheduler = made("DDIM", clip_sample=False)
    squares = scheduler.alphas_cumprod.double().sqrt(), (1 - scheduler.alphas_cumprod).sqrt()
    for step, t in zip(
        probed_steps(scheduler, time_of), scheduler.timesteps.tolist(), strict=True
    ):
        end = t - 1000 // 6
        alpha, sigma = (float(square[t]) for square in squares)
        alpha_end, sigma_end = (
            float(s[end]) if end >= 0 else 1.0 - i for i, s in enumerate(squares)
        )
        assert step.output == pytest.approx(
            (alpha_end / alpha, sigma_end - alpha_end / alpha * sigma), abs=1e-6
        )
        assert step.times == (time_of(t),) and step.noise == 0.0


def test_ends_are_the_next_evaluations():
    scheduler = made("HeunDiscrete", **VP)
    steps = probed_steps(scheduler, time_of)
    assert [step.times[0] for step in steps] == [time_of(float(t)) for t in scheduler.timesteps]
    assert [step.end for step in steps] == [*(step.times[0] for step in steps[1:]), 1.0]


def test_the_scheduler_stays_as_it_is():
    scheduler = made(MULTI, **VP)
    before, shared = deepcopy(vars(scheduler)), torch.get_rng_state()
    probed_steps(scheduler, time_of)
    assert str(vars(scheduler)) == str(before)
    assert torch.equal(torch.get_rng_state(), shared)


def test_a_field_of_our_sign():
    scheduler = made("FlowMatchEulerDiscrete", shift=3.0)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected, _ = own_loop(scheduler, x)
    steps = probed_steps(scheduler, time_of, -1.0)
    sample = integrate(lambda x, t: -network(x, t), steps, x, torch.zeros_like)
    assert torch.allclose(sample, expected, atol=1e-6)
    assert all(step.output[1] > 0 for step in steps)


def test_own_noise_levels():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert error(scheduler) < 1e-6
    scheduler = diffusers.DDPMScheduler(clip_sample=False)
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert error(scheduler) < 1e-6


class OwnNoise(diffusers.EulerDiscreteScheduler):
    """Draws from a generator that nobody gave it, as a Brownian tree does."""

    def step(self, *arguments, **options):
        output = super().step(*arguments, **options)
        drawn = torch.randn(output.prev_sample.shape, generator=torch.Generator().manual_seed(5))
        output.prev_sample = output.prev_sample + drawn
        return output


class SharedNoise(diffusers.EulerDiscreteScheduler):
    def step(self, *arguments, **options):
        output = super().step(*arguments, **options)
        output.prev_sample = output.prev_sample + torch.randn(output.prev_sample.shape)
        return output


class TwoDraws(diffusers.EulerDiscreteScheduler):
    def step(self, output, t, x, generator=None):
        moved = super().step(output, t, x, generator=generator)
        for _ in range(2):
            drawn = randn_tensor(x.shape, generator=generator, dtype=x.dtype)
            moved.prev_sample = moved.prev_sample + drawn
        return moved


class Squared(diffusers.EulerDiscreteScheduler):
    def step(self, output, t, x, generator=None):
        return super().step(output + 1e-3 * output**2, t, x, generator=generator)


class Clamped(diffusers.EulerDiscreteScheduler):
    """Affine as long as no output is large."""

    def step(self, output, t, x, generator=None):
        return super().step(output.clamp(-5, 5), t, x, generator=generator)


def ready(scheduler):
    scheduler.set_timesteps(6)
    return scheduler


AFFINE = "is not affine in its states, outputs and noise; use a solver of ours"
REFUSED = [
    (lambda: made("DDIM"), r"DDIMScheduler: clip_sample=True .*; use clip_sample=False"),
    (lambda: made("DDPM"), r"clip_sample=True .*; use clip_sample=False"),
    (lambda: made("CMStochasticIterative"), r"clip_denoised=True .*; use clip_denoised=False"),
    (lambda: made(MULTI, thresholding=True, **VP), r"thresholding=True .*; use thresholding=F"),
    (
        lambda: made("DDPM", clip_sample=False, variance_type="learned_range"),
        r"variance_type=learned_range .*; use variance_type=fixed_small",
    ),
    (
        lambda: made(
            "DDIM", clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing"
        ),
        r"first time step 999 has no signal .*; use rescale_betas_zero_snr=False",
    ),
    (
        lambda: made("UniPCMultistep", predict_x0=False),
        r"has no finite step at time step \d+; .* final_sigmas_type=sigma_min",
    ),
    (lambda: made("ScoreSdeVe"), r"correct_steps=0"),
    (lambda: ready(OwnNoise()), "OwnNoise has a noise source of its own.*; use a solver of ours"),
    (lambda: ready(SharedNoise()), "SharedNoise has a noise source of its own"),
    (lambda: ready(TwoDraws()), "TwoDraws has a noise source of its own"),
    (lambda: ready(Squared()), f"Squared {AFFINE}"),
    (lambda: ready(Clamped()), f"Clamped {AFFINE}"),
    (lambda: diffusers.DDIMScheduler(), r"call scheduler\.set_timesteps\(\.\.\.\) first"),
    (object, "object is no scheduler with timesteps and step"),
]


@pytest.mark.parametrize(("scheduler", "message"), REFUSED)
def test_refusals_name_the_cause_and_the_cure(scheduler, message):
    with pytest.raises(UserError) as caught:
        probed_steps(scheduler(), time_of)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_cures_cure():
    for scheduler in (
        diffusers.DDIMScheduler.from_config(diffusers.DDIMScheduler().config, clip_sample=False),
        diffusers.DDPMScheduler(clip_sample=False, variance_type="fixed_small"),
    ):
        assert error(ready(scheduler)) < 1e-12
    corrected = made("ScoreSdeVe")
    corrected.register_to_config(correct_steps=0)
    assert error(corrected) < 1e-6


def test_a_loop_that_has_begun_is_refused():
    scheduler = made("EulerDiscrete", **VP)
    x = torch.zeros(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(UserError, match=r"middle of a loop; call scheduler\.set_timesteps"):
        probed_steps(scheduler, time_of)


def test_bad_arguments():
    scheduler = made("DDIM", clip_sample=False)
    with pytest.raises(UserError, match=r"step takes no 'churn'; leave it out of step_kwargs"):
        probed_steps(scheduler, time_of, step_kwargs={"churn": 1})
    with pytest.raises(UserError, match=r"prediction_output_sign must be 1 or -1, got 0"):
        probed_steps(scheduler, time_of, 0)
    with pytest.raises(
        UserError, match=r"times_of\(830\) is 830; it must give a time in \[0, 1\]"
    ):
        probed_steps(scheduler, lambda t: t)
