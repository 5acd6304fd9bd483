"""Scores of images from outside of this package: ``scores`` of the configuration.

A score is a callable that gives one number per image, the higher, the more uncertain; it is given
what its arguments name. ``scores=mine`` adds ``mine``, which is then called ``own.mine`` wherever
a score is named.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_uint8
from bayesdiff.options.values import plain
from bayesdiff.runs.build import Run
from bayesdiff.runs.scores import judge
from bayesdiff.storage.source_code import code_of
from bayesdiff.uncertainty import Samples
from bayesdiff.uncertainty.scores.of_maps_and_images import MAP_SCORES

PREFIX = "own."
Given = Mapping[str, Tensor | None]

OF_MEMBERS = frozenset({"members", "member_features", "member_logits"})
# Of the classifier of the data that no study is judged by.
OF_CLASSIFIER = frozenset({"features", "logits", "member_features", "member_logits"})
# What a score can ask for: images and members in [-1, 1], maps in the square of these units.
INPUTS = frozenset({"images", "variance", "labels"}) | OF_MEMBERS | OF_CLASSIFIER


@dataclass(frozen=True)
class OwnScore:
    """A score with what it reads.

    Attributes:
        name: as others call it, ``own.mine``.
        of: the user's callable.
        reads: names of ``INPUTS`` that it takes.
    """

    name: str
    of: Callable[..., Tensor]
    reads: frozenset[str]

    @property
    def of_map(self) -> bool:
        """Whether it reads the map."""
        return "variance" in self.reads

    def of_estimator(self, estimator: str) -> str:
        """What it is called where several estimators have maps."""
        return f"{estimator}.{self.name.removeprefix(PREFIX)}"

    @property
    def of_posterior(self) -> bool:
        """Whether it sees anything of other weights."""
        return self.of_map or bool(self.reads & OF_MEMBERS)

    def __call__(self, given: Given) -> Tensor:
        """The score ``(N,)`` of these inputs, float64 on the CPU.

        Raises:
            UserError: if it gives anything else.
        """
        option = f"scores.{self.name.removeprefix(PREFIX)}"
        made = self.of(**{name: given[name] for name in self.reads})
        count = next(len(value) for value in given.values() if value is not None)
        if not isinstance(made, Tensor) or made.shape != (count,):
            shape = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise UserError(
                f"{option} must give one number per image, a tensor ({count},), got {shape}"
            )
        odd = torch.zeros(count) if made.is_complex() else made.isfinite()
        if not odd.all():
            place = int(odd.long().argmin())
            raise UserError(
                f"{option} gives {made[place].item()} for image {place} of {count}; give a finite "
                "number for every image"
            )
        return made.detach().double().cpu()


def own_scores(made: Mapping[str, Any] | None) -> dict[str, OwnScore]:
    """Scores by their whole names.

    Args:
        made: callables by name, None for none.

    Raises:
        UserError: for what is no callable, or asks for what there is not.
    """
    if made is not None and not isinstance(made, Mapping):
        raise UserError(
            f"scores={made!r} are none; choose by name, and write NAME: {{_target_: ...}} in "
            "the file"
        )
    found = {}
    for name, of in (made or {}).items():
        if not callable(of):
            raise UserError(
                f"scores.{name}={of!r} is no callable; give its _target_, and _partial_: true "
                "where that is a function"
            )
        if name in MAP_SCORES:
            raise UserError(f"scores.{name} has the name of map.{name}; give it another")
        found[f"{PREFIX}{name}"] = OwnScore(f"{PREFIX}{name}", of, _reads(str(name), of))
    return found


def scores_of_run(cfg: DictConfig) -> dict[str, OwnScore]:
    """Those that a configuration has."""
    options = cfg.get("scores")
    made = instantiate(options, _convert_="all") if isinstance(options, DictConfig) else options
    return own_scores(made)


def source_of(cfg: DictConfig, names: Iterable[str]) -> list[Any]:
    """What the scores with these names come from, for keys; nothing where none is of one's own."""
    options = plain(cfg.get("scores")) or {}
    own = {n: options[k] for n in names if (k := n.removeprefix(PREFIX)) != n and k in options}
    return [own, code_of(own)] if own else []


def try_scores(scores: Iterable[OwnScore], run: Run) -> None:
    """Compute each once, of random inputs.

    Raises:
        UserError: for one that does not give a number per image, or changes what it is given.
    """  # noqa: DOC502 - raised one level down
    generator = torch.Generator().manual_seed(0)
    shape, kinds = run.data.data.images.shape[1:], max(run.data.data.num_classes, 2)

    def some(*sizes: int) -> Tensor:
        return torch.rand(3, *sizes, generator=generator)

    given = {
        "images": 2 * some(*shape) - 1,
        "variance": some(*shape),
        "labels": torch.arange(3) % kinds if run.model.condition is not None else None,
        "members": 2 * some(2, *shape) - 1,
        "features": some(128),
        "logits": some(kinds),
        "member_features": some(2, 128),
        "member_logits": some(2, kinds),
    }
    before = {name: None if value is None else value.clone() for name, value in given.items()}
    for score in scores:
        score(given)
        for name in sorted(score.reads):
            value, was = given[name], before[name]
            if value is not None and was is not None and not torch.equal(value, was):
                raise UserError(
                    f"scores.{score.name.removeprefix(PREFIX)} changes its {name}, which others "
                    f"read after it; work on {name}.clone()"
                )


def inputs_of(
    scores: Iterable[OwnScore], run: Run, samples: Samples, members: Tensor | None
) -> dict[str, Tensor | None]:
    """What these scores are given, of a set of images.

    Args:
        scores: that will be computed.
        run: gives the classifier, which is not the one that studies are judged by.
        samples: images with their maps, in [-1, 1].
        members: uint8 ``(N, M, C, H, W)``, or None.

    Raises:
        UserError: for a score of members where there are none.
    """
    reads = frozenset[str]().union(*(score.reads for score in scores))
    if reads & OF_MEMBERS and members is None:
        raise UserError("scores of members need some; give filtering.members, 2 or more")
    given: dict[str, Tensor | None] = {
        "images": samples.images,
        "variance": samples.variance,
        "labels": samples.labels,
        "members": None if members is None else members.float() / 127.5 - 1,
    }
    if reads & OF_CLASSIFIER:
        given |= _seen(run, reads, samples, members)
    return given


def _seen(
    run: Run, reads: frozenset[str], samples: Samples, members: Tensor | None
) -> dict[str, Tensor | None]:
    """Features and logits of images, and of members."""
    from bayesdiff.metrics.features import extract

    scorer, _ = judge(run, run.cfg.metrics.seed + 1)
    size = run.cfg.metrics.batch_size
    read = extract(scorer, to_uint8(samples.images), size)
    found: dict[str, Tensor | None] = {"features": read.features, "logits": read.logits}
    if members is not None and reads & OF_MEMBERS:
        read = extract(scorer, members.flatten(0, 1), size)
        found["member_features"] = read.features.unflatten(0, members.shape[:2])
        found["member_logits"] = read.logits.unflatten(0, members.shape[:2])
    return found


def _reads(name: str, of: Callable[..., Any]) -> frozenset[str]:
    """Inputs that a callable takes.

    Raises:
        UserError: if it needs anything else.
    """
    try:
        parameters = inspect.signature(of.forward if isinstance(of, nn.Module) else of).parameters
    except ValueError as error:  # a partial with options that its function does not take
        raise UserError(
            f"scores.{name} does not work: {error.__cause__ or error}; its YAML gives an option "
            "that the function has not, or two files have a score of this name"
        ) from error
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    takes = {key: each for key, each in parameters.items() if each.kind in kinds}
    missing = [k for k, v in takes.items() if v.default is v.empty and k not in INPUTS]
    if missing or not INPUTS & takes.keys():
        raise UserError(
            f"scores.{name} asks for {', '.join(missing) or 'nothing'}; a score is given those of "
            f"{', '.join(sorted(INPUTS))} that its arguments name"
        )
    return frozenset(takes) & INPUTS
