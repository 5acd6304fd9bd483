"""Whether a pipeline's loop is one that can be followed: from noise, in whole, and alike."""

import logging
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError
from bayesdiff.pretrained.doctor import Finding
from bayesdiff.pretrained.listening import Heard

log = logging.getLogger(__name__)

# Arguments of pipelines that a Bayesian one has its own way for.
OURS = {
    "generator": "give seed=",
    "latents": "give seed=",
    "num_images_per_prompt": "give num_images=",
    "num_images": "give num_images=",
    "batch_size": "give num_images=",
    "output_type": "leave it out, images are tensors",
    "return_dict": "leave it out",
    "callback_on_step_end": "leave it out, a callback may change the state",
    "callback": "leave it out, a callback may change the state",
}


def noise_finding(who: str, heard: Heard) -> tuple[Finding, ...]:
    """First noise that a pipeline does not scale as its scheduler asks for.

    Args:
        who: name of the pipeline.
        heard: a run of it.
    """
    if (factor := heard.unscaled_by) == 1:
        return ()
    return (
        Finding(
            f"{who} starts from noise of sd 1",
            f"its scheduler asks for {factor:.3g}, and images come out grey and smooth",
            "give a scheduler with init_noise_sigma=1, such as DDIMScheduler",
        ),
    )


@cache
def warn_once(line: str) -> None:
    """Into the log, once of a process: cells of a sweep have the same scheduler."""
    log.warning("%s", line)


def check_start(heard: Heard, generator: torch.Generator, who: str) -> None:
    """Refuse a loop that begins with something else than its noise.

    The first state's values must be those that the generator gives, in any order, times one
    number: images, masks and latents of a user's own are something else.

    Args:
        heard: a run of the pipeline, whose first draws were of a generator like this.
        generator: as it was before.
        who: name of the pipeline.

    Raises:
        UserError: one line with what could be the reason.
    """
    first = heard.steps[0].sample[:1].flatten()
    state = first.double().cpu().sort().values
    for dtype in {first.dtype, torch.float32}:  # some draw wide and cast
        drawn = torch.randn(first.numel(), generator=generator.clone_state(), dtype=dtype)
        noise = drawn.double().sort().values
        size = float(state.norm() / noise.norm())
        if torch.allclose(state, size * noise, rtol=2e-2, atol=2e-3 * size):
            return
    raise UserError(
        f"{who} does not start from noise alone; bayesdiff follows pipelines without an image to "
        "begin with, and without latents="
    )


def check_loop(heard: Heard, who: str) -> None:
    """Refuse a loop that is cut, changed on the way, or not the same at all steps.

    Args:
        heard: a run of the pipeline.
        who: name of the pipeline.

    Raises:
        UserError: one line with what could be the reason.
    """
    asked, taken = len(heard.scheduler.timesteps), len(heard.steps)
    if taken != asked:
        raise UserError(
            f"{who} takes {taken} of the {asked} steps of its scheduler; bayesdiff follows whole "
            "loops: leave denoising_end, strength and the like out"
        )
    for before, after in pairwise(heard.steps):
        if not torch.equal(_first(before.result), _first(after.sample)):
            raise UserError(
                f"{who} changes the state between two steps; leave callbacks and the like out"
            )
    ends = [0, *(step.calls for step in heard.steps)]
    counts = {end - begin for begin, end in pairwise(ends)}
    if len(counts) > 1:
        raise UserError(
            f"{who} calls its network {' or '.join(map(str, sorted(counts)))} times at a step; "
            "bayesdiff follows steps that are alike: leave guidance over a part of them out"
        )


def check_weights(heard: Heard, weights: list[float], states: int, who: str) -> None:
    """Refuse guidance that is another one at other steps.

    Args:
        heard: a run of the pipeline.
        weights: of the outputs at the first step.
        states: channels of a state.
        who: name of the pipeline.

    Raises:
        UserError: if one step combines its outputs otherwise.
    """
    begin = 0
    for step in heard.steps:
        outputs = torch.cat([call.output for call in heard.calls[begin : step.calls]])[:, :states]
        begin = step.calls
        given = step.output[:1, :states].double()
        if len(outputs) != len(weights):
            raise UserError(f"{who} evaluates another number of outputs at some steps")
        own = sum(w * out.double() for w, out in zip(weights, outputs, strict=True))
        tolerance = 1e-3 if step.output.dtype in (torch.float32, torch.float64) else 5e-2
        if float((own - given[0]).abs().max()) > tolerance * float(given.abs().max()):
            raise UserError(
                f"{who} combines the network's outputs otherwise at some steps; bayesdiff follows "
                "guidance that is the same at all of them, and not rescaled"
            )


def _first(state: Any) -> Tensor:
    first: Tensor = state[:1]
    return first
