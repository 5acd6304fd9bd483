"""What a search looks for: a metric's name, whether less of it is better, what it follows from."""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

from omegaconf import DictConfig, OmegaConf

from bayesdiff.checks import UserError
from bayesdiff.options.spelling import near

log = logging.getLogger(__name__)

Direction = Literal["minimize", "maximize"]
_OF_POINTS = "sliced_wasserstein|energy_distance"
_SCORES = re.compile(
    r"(real/)?(fid|is|is_sd|kid|kid_sd|precision|recall|density|coverage|cmmd"
    rf"|{_OF_POINTS})@"
)
_LESS = re.compile(
    rf"(real/)?(fid|kid|cmmd|{_OF_POINTS})@|nfe$|(summed_variance|sampler_noise|aleatoric)/"
)
_MORE = re.compile(
    r"(real/)?(is|precision|recall|density|coverage)@|validation/.*rank$|laplace/log_evidence"
    r"|classifier_test_accuracy|.*/(z|\w*gain)(@|$)"
)
_OF_MAPS = r"summed_variance/|sampler_noise/|aleatoric/|validation/"
DEFAULT = "fid@"
# Parts of the configuration that cannot move a metric; what is trained moves these.
_WITHOUT_EFFECT = {
    _SCORES.pattern: ("laplace", "uncertainty"),
    r"laplace/": ("solver", "uncertainty", "metrics"),
    rf"{_OF_MAPS}": ("metrics",),
    r"nfe$": ("laplace", "metrics"),
}
# Metrics of real images and of the classifier that sees them: nothing else moves them.
_OF_DATA = re.compile("real/|classifier_test")
_MOVES_DATA = ("data", "corruption", "metrics", "experiment", "debug")
# All that there is by the first part of a name; a class may have any name.
_NAMES = {
    "laplace": (
        "eigenvalue_min", "eigenvalue_max", "effective_parameters", "parameters", "log_evidence",
        "sigma_noise", "prior_precision", "n_eff", "distance_from_optimum",
        "block_effective_parameters", "block_parameters", "block_log_evidence",
    ),
    "validation": (
        *(
            f"{name}{end}"
            for name in ("image_rank", "pixel_rank", "log_ratio", "calibration_z2", "coverage95")
            for end in ("", "_low", "_high")
        ),
        "log_ratio_sd", "pixels",
    ),
    "summed_variance": ("mean", "sd", "negative_share", "class_"),
    "sampler_noise": ("mean",),
    "aleatoric": ("mean", "negative_share"),
}  # fmt: skip


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


def name_of(objective: str, metrics: Iterable[str]) -> str | None:
    """The metric of this name, else the first whose name begins so, None where there is none."""
    names = list(metrics)
    if objective in names:
        return objective
    return next((name for name in names if name.startswith(objective)), None)


def value_of(objective: str, metrics: Mapping[str, Any]) -> float | None:
    """The objective's value; None where there is none, or none that can be compared."""
    name = name_of(objective, metrics)
    value = None if name is None else metrics[name]
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
    keys = [key.lstrip("+~").partition("@")[0] for key in searched]
    _check_made(objective, config, keys)
    without = [key for key in keys if not _moves(re.split(r"[./]", key)[0], objective)]
    if without and len(without) == len(keys):
        raise UserError(
            f"objective={objective} does not depend on {', '.join(without)}; search other keys, "
            "or give another objective, such as laplace/log_evidence or validation/image_rank"
        )
    if without:
        log.warning("objective=%s does not depend on %s", objective, ", ".join(without))


def _moves(place: str, objective: str) -> bool:
    """Whether a part of the configuration can move a metric."""
    if _OF_DATA.match(objective):
        return place in _MOVES_DATA
    return not any(
        re.match(name, objective) and place in places for name, places in _WITHOUT_EFFECT.items()
    )


def _check_made(objective: str, config: DictConfig, keys: list[str]) -> None:
    """Whether cells of this configuration have such a metric."""
    # With all that it needs: not before a search begins.
    from bayesdiff.studies.study import makes_a_study, open_places

    def is_set(key: str) -> bool:
        return key in keys or bool(OmegaConf.select(config, key))

    first, _, last = objective.partition("/")
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
        if "laplace.subset" not in keys and config.laplace.subset == "head":
            raise UserError(f"objective={objective} needs laplace.subset=last_block or all")
    elif first in open_places() or makes_a_study(config.get(first)):
        if not is_set(first):
            raise UserError(f"objective={objective} needs that study; add an experiment= with it")
    elif objective != "nfe" and first not in _NAMES:
        raise UserError(
            f"objective={objective} is no metric; metrics.json of a run has their names, such as "
            "fid@, cmmd@, laplace/log_evidence, validation/image_rank, summed_variance/mean"
        )
    if first in _NAMES and not _is_there(last, _NAMES[first]):
        raise UserError(
            f"objective={objective} is no metric{near(last, _NAMES[first])}; there are "
            f"{', '.join(f'{first}/{name}' for name in _NAMES[first])}"
        )


def _is_there(name: str, names: Iterable[str]) -> bool:
    """Whether it is one of these, the beginning of one, or of a class."""
    of_class = "class_" in names and name.startswith("class_")
    return bool(name) and (of_class or any(each.startswith(name) for each in names))
