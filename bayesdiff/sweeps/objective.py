"""What a search looks for: a metric's name, whether less of it is better, what it follows from."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError

log = logging.getLogger(__name__)

Direction = Literal["minimize", "maximize"]
_SCORES = re.compile(r"(real/)?(fid|is|is_sd|kid|kid_sd|precision|recall|density|coverage|cmmd)@")
_LESS = re.compile(r"(real/)?(fid|kid|cmmd)@|nfe$|(summed_variance|sampler_noise)/")
_MORE = re.compile(
    r"(real/)?(is|precision|recall|density|coverage)@|validation/.*rank$|laplace/log_evidence"
    r"|classifier_test_accuracy|.*/(z|\w*gain)(@|$)"
)
_OF_MAPS = r"summed_variance/|sampler_noise/|validation/"
DEFAULT = "fid@"
# Parts of the configuration that cannot move a metric; what is trained moves all of them.
_WITHOUT_EFFECT = {
    rf"{_SCORES.pattern}|classifier_test": ("laplace", "uncertainty"),
    r"laplace/": ("solver", "uncertainty", "metrics"),
    rf"{_OF_MAPS}": ("metrics",),
    r"nfe$": ("laplace", "metrics"),
}


def direction_of(objective: str, given: str | None) -> Direction:
    """``minimize`` or ``maximize``: what is given, else what the metric is better in.

    Raises:
        UserError: if it is neither, or nobody knows.
    """
    if given is not None:
        if given not in ("minimize", "maximize"):
            raise UserError(f"direction={given} is none; give minimize or maximize")
        return cast(Direction, given)
    less, more = _LESS.match(objective), _MORE.match(objective)
    if bool(less) == bool(more):
        raise UserError(
            f"whether less of objective={objective} is better is not known; add "
            "direction=minimize or direction=maximize"
        )
    return "minimize" if less else "maximize"


def value_of(objective: str, metrics: Mapping[str, Any]) -> float | None:
    """The metric of this name, else the first whose name begins so, None where there is none."""
    names = (
        [objective] if objective in metrics else [n for n in metrics if n.startswith(objective)]
    )
    value = metrics[names[0]] if names else None
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def check_objective(objective: Any, config: DictConfig, searched: Iterable[str]) -> None:
    """Refuse before the first cell an objective that no cell has, or that no key could move.

    Args:
        objective: a name, or the beginning of one.
        config: of the sweep.
        searched: keys.

    Raises:
        UserError: one line with the cure.
    """
    if not isinstance(objective, str) or not objective:
        raise UserError(f"objective={objective} is no metric; give one, such as objective=fid@")
    keys = [key.partition("@")[0] for key in searched]
    _check_made(objective, config, keys)
    idle = [place for name, place in _WITHOUT_EFFECT.items() if re.match(name, objective)]
    places = idle[0] if idle else ()
    without = [key for key in keys if re.split(r"[./]", key)[0] in places]
    if without and len(without) == len(keys):
        raise UserError(
            f"objective={objective} does not depend on {', '.join(without)}; search other keys, "
            "or give another objective, such as laplace/log_evidence or validation/image_rank"
        )
    if without:
        log.warning("objective=%s does not depend on %s", objective, ", ".join(without))


def _check_made(objective: str, config: DictConfig, keys: list[str]) -> None:
    """Whether cells of this configuration have such a metric.

    Raises:
        UserError: if they have none.
    """

    def is_set(key: str) -> bool:
        return key in keys or bool(OmegaConf.select(config, key))

    study = objective.partition("/")[0]
    if _SCORES.match(objective) or objective.startswith("classifier_test"):
        if not is_set("metrics.num_images"):
            raise UserError(
                f"metrics.num_images=0 leaves a search without objective={objective}; give 2 or "
                "more images"
            )
    elif objective.startswith("validation/"):
        if not is_set("uncertainty.validate"):
            raise UserError(f"objective={objective} needs uncertainty.validate=true")
    elif objective.startswith("laplace/block_"):
        if "laplace.subset" not in keys and config.laplace.subset != "last_block":
            raise UserError(f"objective={objective} needs laplace.subset=last_block")
    elif study in config and not re.match("laplace/", objective):
        if not is_set(study):
            raise UserError(f"objective={objective} needs that study; add an experiment= with it")
    elif not re.match(rf"nfe$|laplace/|{_OF_MAPS}", objective):
        raise UserError(
            f"objective={objective} is no metric; metrics.json of a run has their names, such as "
            "fid@, cmmd@, laplace/log_evidence, validation/image_rank, summed_variance/mean"
        )
