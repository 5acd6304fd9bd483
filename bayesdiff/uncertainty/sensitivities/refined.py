"""The default: few sensitivities with few products, refined by a network trained once."""

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.machine.device import autocast_dtype
from bayesdiff.machine.progress import track
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Solver, integrate
from bayesdiff.storage.artefacts import key_of, weights_key
from bayesdiff.uncertainty.estimator import Estimator, Training
from bayesdiff.uncertainty.samples import Samples, check_skip_interval
from bayesdiff.uncertainty.sensitivities import refiner_file
from bayesdiff.uncertainty.sensitivities.linearised import (
    DIRECTIONS,
    Followed,
    directions,
    evaluations,
    follow,
)
from bayesdiff.uncertainty.sensitivities.pilot_images import DRAWS, FIRST, Pilot, noise_of
from bayesdiff.uncertainty.sensitivities.predicted_products import Rule, spread_nodes
from bayesdiff.uncertainty.sensitivities.products import (
    PRODUCTS,
    Product,
    RememberingField,
    TangentField,
    differences,
)
from bayesdiff.uncertainty.sensitivities.refiner import (
    FLOOR,
    Evidence,
    Refiner,
    evidence,
    loss,
    train_refiner,
)
from bayesdiff.uncertainty.start import Start, Starts

log = logging.getLogger(__name__)
_MOST_DRAWS, TARGET_DRAWS, TARGET_PRODUCTS = 64, 2, 8
_BATCH, _HELD_OUT = 8, 0.1  # training images that share their target draws; share not trained on


@dataclass(frozen=True, kw_only=True)
class Refined(Estimator):
    """Sensitivities on a budget, then a small network that knows what maps look like.

    Live part, for every image: a few weight directions are followed as by ``Linearised``, each
    with ``products`` network evaluations over the whole trajectory, as many directions as the
    ``budget`` pays for. Refinement: a network reads that map, the image and the features that the
    sampler has computed anyway, and returns the map. It is trained once per model, posterior and
    solver on ``train_images`` images with independent sensitivities as targets, checked on a tenth
    of them, and kept in the run folder under the key of all it depends on: any change of weights,
    solver or settings trains another one. Maps scale with a common factor of all variances, so
    posteriors of one curvature share a refiner where, beside that factor, no direction is more
    than 10 % from the one it is trained for, see ``representative``. A refiner that does not beat
    the live map on the held-out images is refused, with a warning, and the live map stands.
    Training, unbounded by ``max_memory``, takes about 2.7 ``train_images`` trajectories.

    Args:
        budget: network evaluations for the map, as a share of the image's own; at least 2 and at
            most 64 directions are followed. In bfloat16 they take half the time of the image's.
        products: products J d of each direction.
        derivative: ``difference`` or ``bfloat16``, see ``Linearised``; ``auto`` takes the second
            where the device gains from it.
        train_images: images the refiner learns from.
        epochs: passes over them.
        noise_draws: directions of a stochastic solver's own noise; 0 leaves them out. They cost
            one evaluation each at every step.
        skip_interval: network evaluations per product, in place of ``products``.
        few_maps: ``ensemble`` or ``refined``, what makes too few maps, see ``for_few_maps``.
        fitted: rule, refiner, and the logarithm of this posterior's variance over the one that the
            refiner was trained for; made by ``fit``.

    Example:
        >>> estimator = Refined(budget=1.4, products=2)
        >>> estimator.draws(50)  # along 50 evaluations 1.4 * 50 products are paid, 2 of each
        35
    """

    budget: float = 1.4
    products: int = 2
    derivative: str = "auto"
    train_images: int = 1000
    epochs: int = 30
    noise_draws: int = 4
    skip_interval: int | None = None
    few_maps: str = "refined"
    fitted: tuple[Rule, Refiner, float] | None = None

    name: ClassVar[str] = "refined"
    differentiates: ClassVar[bool] = True
    of_pixels: ClassVar[bool] = True
    prepares: ClassVar[str] = "refiner"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("uncertainty.budget", self.budget, "give a number above 0")
        at_least("uncertainty.products", self.products)
        if self.derivative not in ("auto", "difference", "bfloat16"):
            raise UserError(
                f"unknown uncertainty.derivative {self.derivative!r}; "
                "choose auto, difference or bfloat16"
            )
        if self.few_maps not in ("ensemble", "refined"):
            raise UserError(f"uncertainty.few_maps={self.few_maps!r}; choose ensemble or refined")
        at_least("uncertainty.train_images", self.train_images, 20)
        at_least("uncertainty.epochs", self.epochs)
        at_least("uncertainty.noise_draws", self.noise_draws, 0)

    def check(self, solver: Solver) -> None:
        """Every solver is served; a skip interval must not exceed its steps."""
        if self.skip_interval is not None:
            check_skip_interval(self.skip_interval, solver)

    @property
    def restarts(self) -> bool:
        """The refiner knows whole trajectories alone."""
        return False

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once."""
        noise = self.noise_draws if solver.stochastic else 0
        return 1 + noise + self.draws(solver.stages * solver.num_steps)

    def evaluations(self, start: Start) -> float:
        """Of image, products, and a stochastic solver's own noise, not of the training."""
        count = evaluations(start)
        noise = self.noise_draws if any(step.stochastic for step in start.steps()) else 0
        return start.nfe * (1 + self.draws(count) * len(self.nodes(count)) / count + noise)

    def nodes(self, count: int) -> frozenset[int]:
        """Which of ``count`` evaluations get a product."""
        if self.skip_interval is None:
            return spread_nodes(count, self.products)
        return spread_nodes(count, max(1, count // self.skip_interval))

    def draws(self, count: int) -> int:
        """Directions that the budget pays for along ``count`` evaluations."""
        paid = int(self.budget * count / max(1, len(self.nodes(count))) + 1e-9)
        return min(max(2, paid), _MOST_DRAWS)

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse a head on tokens, whose features are no image that the refiner could read."""
        super().check_model(model)
        refiner_file.check_features(model.net.head)

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With rule and refiner, read from the run folder or trained now."""
        near, shift = refiner_file.representative(posterior)
        if folder is None:
            rule, refiner = self.train(starts, near)
        else:
            key = self.key(starts([0]), posterior)
            rule, refiner = refiner_file.once(folder, key, lambda: self.train(starts, near))
        return replace(self, fitted=(rule, refiner.to(starts([0]).device), shift))

    def sources(self, run: Training) -> list[Any]:
        """How directions are drawn: those of other versions made other maps."""
        return [DIRECTIONS]

    def key(self, start: Start, posterior: HeadPosterior) -> str:
        """Changes with all that rule and refiner depend on; the same for posteriors that share."""
        near, _ = refiner_file.representative(posterior)
        numbers = [step.numbers() for step in start.steps()]
        mine = [self.budget, self.products, self.skip_interval, self.product(start).__name__]
        return key_of(
            weights_key(start.model),
            [near.curvature.source, *near.settings, *refiner_file.signature(near)],
            [numbers, start.solver.guidance, start.noise.seed],
            [DIRECTIONS, *mine, self.train_images, self.epochs, self.seed],
        )

    def prepared(self, start: Start, posterior: HeadPosterior, folder: Path) -> tuple[str, bool]:
        """Key of the refiner, and whether it is there."""
        key = self.key(start, posterior)
        return key, refiner_file.load(refiner_file.path_of(folder, key), key) is not None

    @torch.no_grad()
    def train(self, starts: Starts, posterior: HeadPosterior) -> tuple[Rule, Refiner]:
        """Rule and refiner for this model, posterior and solver."""
        count = evaluations(starts([0]))
        pilot = Pilot.follow(starts, directions(posterior, DRAWS, self.seed + 1), differences)
        rule = pilot.rule(self.nodes(count), self.product(starts([0])))
        careful = pilot.rule(spread_nodes(count, TARGET_PRODUCTS), differences)
        live = self.directions(posterior, count)
        seen, targets = [], []
        numbers = (torch.arange(self.train_images) + FIRST + 1000).split(_BATCH)
        log.info("refiner: a network to be trained once, on maps of %d images", self.train_images)
        for place, part in enumerate(track(numbers, "refiner's images", "images", len)):
            fresh = directions(posterior, TARGET_DRAWS, self.seed + 2 + place)
            start = starts(part.tolist())
            given, target = self.lesson(start, (live, rule), (fresh, careful))
            seen.append(given)
            targets.append(target)
        return rule, self.refiner(Evidence.join(seen), torch.cat(targets))

    def lesson(
        self, start: Start, live: tuple[Tensor, Rule], fresh: tuple[Tensor, Rule]
    ) -> tuple[Evidence, Tensor]:
        """Evidence of a batch, and independent sensitivities ``(B, M, C, H, W)`` as its target.

        The target's products are more and better; image and features are computed once for both.
        """
        field = RememberingField(
            start.model, start.condition, len(start.noise.indices), start.solver.guidance
        )
        (deltas, rule), (others, careful) = live, fresh
        mine = TangentField(field, deltas.to(start.device), self.product(start), rule)
        theirs = TangentField(field, others.to(start.device), differences, careful)
        count, noise = 1 + len(deltas), noise_of(start, len(deltas) + len(others))

        def together(rows: Tensor, t: float) -> Tensor:
            first = mine(rows[:count], t)
            return torch.cat([first, theirs(torch.cat([rows[:1], rows[count:]]), t)[1:]])

        x_0 = start.initial()
        rows = torch.cat([x_0[None], x_0.new_zeros(count - 1 + len(others), *x_0.shape)])
        end = integrate(together, start.steps(), rows, noise)
        size, target_size = (float(r.correction[-1]) ** 0.5 for r in (rule, careful))
        given = evidence(end[0], list(mine.features.values()), size * end[1:count])
        return given, target_size * end[count:].transpose(0, 1)

    def refiner(self, everything: Evidence, target: Tensor) -> Refiner:
        """Trained on all but a tenth of the images; refused if it does not help on that."""
        kept = max(2, int(_HELD_OUT * len(target)))
        patch = everything.images.shape[-1] // everything.features.shape[-1]
        if everything.variance.max() <= FLOOR:  # a certain posterior: nothing to learn
            return Refiner(everything.images.shape[1], everything.features.shape[1], patch).eval()
        with torch.enable_grad():
            refiner = train_refiner(
                everything[kept:], target[kept:], patch=patch, epochs=self.epochs, seed=self.seed
            )
        held_out = everything[:kept]
        before = float(loss(held_out.variance.clamp(min=FLOOR).log(), target[:kept]))
        after = float(loss(refiner(held_out), target[:kept]))
        log.info("refiner: held-out loss %.3f, of the live map %.3f", after, before)
        if not after < before:
            refiner.helps.zero_()  # type: ignore[operator]
            log.warning(
                "the refiner is no better than the live map on held-out images (loss %.3g against "
                "%.3g), so the live map stands; uncertainty.train_images=%d may be too few",
                *(after, before, self.train_images),
            )
        return refiner

    def product(self, start: Start) -> Product:
        """How this device computes J d best."""
        name = self.derivative
        if name == "auto":
            name = "bfloat16" if autocast_dtype(start.device) else "difference"
        return PRODUCTS[name]

    def follow(self, start: Start, deltas: Tensor, rule: Rule, noise_draws: int = 0) -> Followed:
        """A batch with these sensitivities."""
        product = self.product(start)
        deltas = deltas.to(start.device)
        return follow(start, deltas, 1 / len(deltas), product, rule, noise_draws, self.seed)

    def directions(self, posterior: HeadPosterior, count: int) -> Tensor:
        """The live directions: the same for all images, so that ranks among images are steady."""
        return directions(posterior, self.draws(count), self.seed)

    @torch.no_grad()
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their refined variance."""
        if self.fitted is None:
            raise ValueError("refined needs fit(...) before the first batch")
        rule, refiner, shift = self.fitted
        deltas = self.directions(posterior, evaluations(start))
        followed = self.follow(start, deltas, rule, self.noise_draws)
        # In the scale that the refiner was trained for.
        size = math.exp(-shift / 2) * float(rule.correction[-1]) ** 0.5
        seen = evidence(followed.states[-1], followed.features, size * followed.sensitivities)
        # A posterior without variance leaves nothing to refine.
        some = seen.variance.flatten(1).amax(1) > FLOOR
        refined = refiner(seen).exp() * some[:, None, None, None]
        # Earlier times keep the live map's shape, at the level that the refined one ends with.
        level = refined.flatten(1).sum(1) / seen.variance.flatten(1).sum(1).clamp(min=FLOOR)
        variance = followed.variance * level[:, None, None, None]
        variance[-1] = refined * math.exp(shift)
        refused = "" if refiner.helps else ", refiner refused"
        label = f"refined, {len(deltas)} draws of {len(rule.nodes)} products{refused}"
        return replace(followed, variance=variance).samples(start, label, self.times)
