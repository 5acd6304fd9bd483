"""The default: few sensitivities with few products, refined by a network trained once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bayesdiff.artefacts import key_of, weights_key, write_atomic
from bayesdiff.checks import UserError, at_least, positive
from bayesdiff.device import autocast_dtype
from bayesdiff.distributed import barrier, rank
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.progress import track
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty.estimator import Estimator
from bayesdiff.uncertainty.linearised import Followed, directions, evaluations, follow
from bayesdiff.uncertainty.pilot import DRAWS, FIRST, Pilot
from bayesdiff.uncertainty.refiner import FLOOR, Evidence, Refiner, loss, overlap, train_refiner
from bayesdiff.uncertainty.response import Rule, spread_nodes
from bayesdiff.uncertainty.samples import Samples, Starts, Trajectory
from bayesdiff.uncertainty.tangent import PRODUCTS, Product, differences

log = logging.getLogger(__name__)

_TARGET_DRAWS = 3
_BATCH = 8  # training images that share their target draws
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class Refined(Estimator):
    """Sensitivities on a budget, then a small network that knows what maps look like.

    Live part, for every image: a few weight directions are followed as by ``Linearised``, each
    with ``products`` network evaluations over the whole trajectory, as many directions as the
    ``budget`` pays for. Refinement: a network reads that map, the image and the features that the
    sampler has computed anyway, and returns the map. It is trained once per model, posterior and
    solver on ``train_images`` images with independent sensitivities as targets, checked on a tenth
    of them, and kept in the run folder under the key of all it depends on: any change of weights,
    posterior, solver or settings trains another one. A refiner that does not beat the live map on
    the held-out images is refused.

    Args:
        budget: network evaluations for the map, as a share of the image's own; at least two
            directions are followed. In bfloat16 they take half the time of the image's.
        products: products J d of each direction.
        derivative: ``difference`` or ``bfloat16``, see ``Linearised``; ``auto`` takes the second
            where the device gains from it.
        train_images: images the refiner learns from.
        epochs: passes over them.
        noise_draws: directions of a stochastic solver's own noise; 0 leaves them out. They cost
            one evaluation each at every step.
        fitted: rule and refiner; made by ``fit``.
    """

    budget: float = 1.5
    products: int = 3
    derivative: str = "auto"
    train_images: int = 1500
    epochs: int = 30
    noise_draws: int = 4
    fitted: tuple[Rule, Refiner] | None = None

    name: ClassVar[str] = "refined"

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("uncertainty.budget", self.budget, "give a number above 0")
        at_least("uncertainty.products", self.products)
        if self.derivative not in ("auto", "difference", "bfloat16"):
            raise UserError(
                f"unknown uncertainty.derivative {self.derivative!r}; "
                "choose auto, difference or bfloat16"
            )
        at_least("uncertainty.train_images", self.train_images, 20)
        at_least("uncertainty.epochs", self.epochs)
        at_least("uncertainty.noise_draws", self.noise_draws, 0)

    def check(self, solver: Solver) -> None:
        """Every solver is served."""

    def copies(self, solver: Solver) -> int:
        """Network inputs per image held at once; a step has at most four evaluations."""
        noise = self.noise_draws if solver.family == "diffusion" else 0
        return 1 + noise + self.draws(4 * solver.num_steps)

    def draws(self, count: int) -> int:
        """Directions that the budget pays for along ``count`` evaluations."""
        return max(2, int(self.budget * count / self.products + 1e-9))

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """With rule and refiner, read from the run folder or trained now.

        Raises:
            UserError: if the file vanishes, or the refiner is no better than the live map.
        """
        key = self.key(starts([0]), posterior)
        path = None if folder is None else folder / f"refiner-{key[:8]}.safetensors"
        fitted = load(path, key) if path and path.is_file() else None
        barrier()  # nobody writes before everybody has looked
        if fitted is None and (rank() == 0 or path is None):
            fitted = self.train(starts, posterior)
            if path is not None:
                save(path, key, *fitted)
        barrier()
        if fitted is None and path is not None:
            fitted = load(path, key)
        if fitted is None:
            raise UserError(f"{path} vanished while it was needed; run the same command again")
        device = starts([0]).device
        return replace(self, fitted=(fitted[0], fitted[1].to(device)))

    def key(self, start: Trajectory, posterior: HeadPosterior) -> str:
        """Changes with all that rule and refiner depend on."""
        numbers = [
            [s.times, s.inputs, s.output, s.noise, s.kept, s.history] for s in start.steps()
        ]
        width = [posterior.sigma_noise, posterior.prior_precision, posterior.n_eff]
        mine = [self.budget, self.products, self.derivative, self.train_images, self.epochs]
        return key_of(
            weights_key(start.model),
            [posterior.curvature.source, posterior.structure, *width],
            [numbers, start.solver.guidance],
            [start.noise.seed, self.seed, mine],
        )

    @torch.no_grad()
    def train(self, starts: Starts, posterior: HeadPosterior) -> tuple[Rule, Refiner]:
        """Rule and refiner for this model, posterior and solver."""
        count = evaluations(starts([0]))
        product = self.product(starts([0]))
        pilot = Pilot.follow(starts, directions(posterior, DRAWS, self.seed + 1), differences)
        rule = pilot.rule(spread_nodes(count, self.products), product)
        live = self.directions(posterior, count)
        seen, targets = [], []
        numbers = torch.arange(self.train_images) + FIRST + 1000
        for place, part in enumerate(track(numbers.split(_BATCH), "refiner's images")):
            fresh = directions(posterior, _TARGET_DRAWS, self.seed + 2 + place)
            followed = self.follow(starts(part.tolist()), torch.cat([live, fresh]), rule)
            d = sensitivities(followed, rule)
            seen.append(evidence(followed, d[: len(live)]))
            targets.append(d[len(live) :].transpose(0, 1))
        return rule, self.refiner(Evidence.join(seen), torch.cat(targets))

    def refiner(self, everything: Evidence, target: Tensor) -> Refiner:
        """Train on all but a tenth of the images, and compare with the live map on that.

        Raises:
            UserError: if the refiner is no better there.
        """
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
            raise UserError(
                f"the refiner is no better than the live map (held-out loss {after:.3g} against "
                f"{before:.3g}); raise uncertainty.train_images={self.train_images}, or use "
                "uncertainty=linearised"
            )
        return refiner

    def product(self, start: Trajectory) -> Product:
        """How this device computes J d best."""
        name = self.derivative
        if name == "auto":
            name = "bfloat16" if autocast_dtype(start.device) else "difference"
        return PRODUCTS[name]

    def follow(
        self, start: Trajectory, deltas: Tensor, rule: Rule, noise_draws: int = 0
    ) -> Followed:
        """A batch with these sensitivities."""
        product = self.product(start)
        deltas = deltas.to(start.device)
        return follow(start, deltas, 1 / len(deltas), product, rule, noise_draws, self.seed)

    def directions(self, posterior: HeadPosterior, count: int) -> Tensor:
        """The live directions: the same for all images, so that ranks among images are steady."""
        return directions(posterior, self.draws(count), self.seed)

    @torch.no_grad()
    def __call__(self, start: Trajectory, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their refined variance.

        Raises:
            ValueError: before ``fit``.
        """
        if self.fitted is None:
            raise ValueError("refined needs fit(...) before the first batch")
        rule, refiner = self.fitted
        deltas = self.directions(posterior, evaluations(start))
        followed = self.follow(start, deltas, rule, self.noise_draws)
        seen = evidence(followed, sensitivities(followed, rule))
        # A posterior without variance leaves nothing to refine.
        some = seen.variance.flatten(1).amax(1) > FLOOR
        refined = refiner(seen).exp() * some[:, None, None, None]
        # Earlier times keep the live map's shape, at the level that the refined one ends with.
        level = refined.flatten(1).sum(1) / seen.variance.flatten(1).sum(1).clamp(min=FLOOR)
        variance = followed.variance * level[:, None, None, None]
        variance[-1] = refined
        label = f"refined, {len(deltas)} draws of {len(rule.nodes)} products"
        return replace(followed, variance=variance).samples(start, label, self.times)


def sensitivities(followed: Followed, rule: Rule) -> Tensor:
    """Sensitivities at the end ``(M, B, C, H, W)``, of the size that the pilot found."""
    return followed.sensitivities * float(rule.correction[-1]) ** 0.5


def evidence(followed: Followed, d: Tensor) -> Evidence:
    """What the refiner reads of a batch with live sensitivities ``d (M, B, C, H, W)``."""
    return Evidence(
        images=followed.states[-1],
        features=torch.cat(followed.features, 1).half(),  # precise enough, and small
        variance=d.square().mean(0),
        overlap=overlap(d),
    )


def save(path: Path, key: str, rule: Rule, refiner: Refiner) -> None:
    """Write rule and refiner with their key."""
    tensors = {f"refiner.{k}": v.cpu().contiguous() for k, v in refiner.state_dict().items()}
    tensors |= {"rule.coefficients": rule.coefficients, "rule.correction": rule.correction}
    tensors |= {"rule.nodes": torch.tensor(sorted(rule.nodes))}
    write_atomic(
        path, lambda file: save_file(tensors, file, metadata={"key": key, **shape(refiner)})
    )


def shape(refiner: Refiner) -> dict[str, str]:
    """What a refiner is built from, as safetensors metadata."""
    pixels = refiner.out.out_channels // 2
    numbers = {
        "channels": pixels // refiner.patch**2,
        "features": refiner.read_features.in_channels,
        "patch": refiner.patch,
    }
    return {name: str(number) for name, number in numbers.items()}


def load(path: Path, key: str) -> tuple[Rule, Refiner] | None:
    """Rule and refiner of this key; None for a file of another key or a damaged one."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = dict(file.metadata() or {})
            if found.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        numbers: Sequence[int] = [int(found[name]) for name in ("channels", "features", "patch")]
        refiner = Refiner(*numbers)
        prefix = "refiner."
        refiner.load_state_dict(
            {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
        )
        nodes = frozenset(tensors["rule.nodes"].tolist())
        rule = Rule(nodes, tensors["rule.coefficients"], tensors["rule.correction"])
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        log.warning("%s is damaged (%s) and is made again", path.name, type(error).__name__)
        return None
    return rule, refiner.eval()
