"""What is wrong with a scheduler of diffusers, each with the line that cures it."""

from dataclasses import dataclass
from typing import Any

from bayesdiff.pretrained.loop import setting


@dataclass(frozen=True)
class Finding:
    """A setting that spoils the samples or their uncertainty.

    Attributes:
        what: the setting.
        why: what it does.
        cure: what to do instead.
    """

    what: str
    why: str
    cure: str


def affinity_findings(scheduler: Any) -> tuple[Finding, ...]:
    """Settings that keep its steps from being affine in the network's output."""
    return tuple(_affinity(scheduler))


def _affinity(scheduler: Any) -> list[Finding]:
    found = []
    for name in ("clip_sample", "clip_denoised"):
        if setting(scheduler, name):
            found.append(
                Finding(
                    f"{name}=True",
                    "clipping makes a step nonlinear in the network's output",
                    f"set scheduler.register_to_config({name}=False)",
                )
            )
    if setting(scheduler, "thresholding"):
        found.append(
            Finding(
                "thresholding=True",
                "thresholding divides by a quantile of the network's own output",
                "set scheduler.register_to_config(thresholding=False)",
            )
        )
    return found
