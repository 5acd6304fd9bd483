"""Code length of held-out images under a Bayesian flow network, by the number of transmissions."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, listed, positive, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows, shared_rows
from bayesdiff.models.objectives import BayesianFlowLoss
from bayesdiff.report import table
from bayesdiff.report.layout import chart
from bayesdiff.report.style import style
from bayesdiff.runs.build import Run, plain
from bayesdiff.runs.fit_key import network_code
from bayesdiff.runs.setup import Setup
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import weights_key
from bayesdiff.studies.code_length.nats import independent_pixels, nats_of
from bayesdiff.studies.study import Place, Report, Study, conditions, without
from bayesdiff.uncertainty import Estimator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_QUANTILE = 1.96  # of 95 %
_NOT_OF_THE_NETWORK = (
    *("solver.", "uncertainty.", "laplace"),
    *("structure", "subset", "sigma_noise", "prior_precision", "n_eff"),
)
# Levels further from the curve than this are in the caption alone.
_NEAR = 1.5


@dataclass(frozen=True, kw_only=True)
class CodeLength(Study):
    """Upper bounds of -ln p(x) of test images: ``nats.nats_of`` says what is added up.

    Args:
        num_images: test images, in a fixed random order; None for all.
        n_steps: numbers of transmissions; continuous time is always among them.
        draws: network evaluations of an image for each of them; all steps of up to so many.
        test_draws: how often grey test images are made black and white anew.
        spread: of numbers whose likelihood has none at the end; None for the belief's own.
        batch_size: images at once.
        seed: of order, noise and times.

    Example:
        >>> CodeLength(num_images=100, n_steps=[10, 100]).n_steps  # transmissions
        [10, 100]
        >>> images = 255 * (torch.arange(100) % 2).view(100, 1, 1, 1).expand(100, 1, 8, 8)
        >>> round(independent_pixels(images, images) / 64 / math.log(2), 3)  # bits of a fair coin
        1.0
    """

    num_images: int | None = 1000
    n_steps: Sequence[int] = (10, 25, 50, 100)
    draws: int = 25
    test_draws: int = 1
    spread: float | None = None
    batch_size: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images is not None:
            at_least("code_length.num_images", self.num_images, 2)
        listed("code_length.n_steps", self.n_steps, "[10,100]")
        for n in self.n_steps:
            at_least("code_length.n_steps", n)
        at_least("code_length.draws", self.draws)
        at_least("code_length.test_draws", self.test_draws)
        at_least("code_length.batch_size", self.batch_size)
        seed_of("code_length.seed", self.seed)
        if self.spread is not None:
            positive("code_length.spread", self.spread)

    def check_data(self, data: ImageData, name: str) -> None:
        """Any data."""

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse other models, and more images or draws than there are.

        Raises:
            UserError: one line with the cure.
        """
        if not isinstance(run.model.objective, BayesianFlowLoss):
            raise UserError(
                "code_length is about Bayesian flow networks by their bound, this is a "
                f"{run.model.path.family} model with another loss; use model=bfn as it is, or "
                "report.sorted_by=[likelihood.bits_per_dim] for others"
            )
        data, there = run.data.data, len(run.data.data.test_images)
        if (self.num_images or 0) > there:
            raise UserError(
                f"code_length.num_images={self.num_images} is more than the {there} test images; "
                "use null for all"
            )
        if self.test_draws > 1 and data.intensities is None:
            raise UserError(
                f"code_length.test_draws={self.test_draws} is about images that are made black "
                "and white, see data.binarise=dynamic; use code_length.test_draws=1"
            )

    def made_from(self, at: Setup) -> list[Any]:
        """The network and its data; no solver and no posterior."""
        cfg, data = at.run.cfg, at.run.data.data
        network = [weights_key(at.run.model), cfg.model.prediction, plain(cfg.path)]
        return [*network, plain(cfg.model).get("likelihood"), *network_code(cfg), data.fingerprint]

    def make(self, at: Setup, place: Place) -> Report | None:
        """The bounds of all images, and what they come to."""
        run, data = at.run, at.run.data.data
        nats: dict[str, Tensor] = {}
        for draw in range(self.test_draws):
            found = self._nats(run, draw)
            nats = {name: nats.get(name, 0) + value for name, value in found.items()}
        if rank():
            return None
        nats = {name: value / self.test_draws for name, value in nats.items()}
        values = data.images[0].numel()
        rows = list(_rows(nats, values))
        levels = {}
        if _black_and_white(data):
            levels["independent_pixels"] = independent_pixels(data.images, data.test_images)
        if data.intensities is not None:
            levels["binarisation_alone"] = data.intensities.entropy()
        whole = next(row for row in rows if row["n"] == "inf")
        results = {
            "images": len(nats["final"]), "test_draws": self.test_draws, "draws": self.draws,
            "rows": rows, "levels": levels,
        }  # fmt: skip
        made_of = conditions(without(at.settings, *_NOT_OF_THE_NETWORK))
        known = "".join(f" {n.replace('_', ' ')}: {v:.1f} nats;" for n, v in levels.items())
        caption = (
            f"{len(nats['final'])} test images, {self.draws} evaluations of each for each point; "
            f"bars: 95 % over images;{known} {made_of}"
        )
        shown = {"nats_per_image": whole["nats"], "bits_per_dim": whole["bits_per_dim"]}
        return Report(
            results,
            [("code_length/by_steps", by_steps(rows, levels, caption))],
            {"table.md": table.markdown(rows)},
            scalars=shown,
            headlines=shown,
        )

    def _nats(self, run: Run, draw: int) -> Rows:
        """Of one draw of the test images."""
        data, model = run.data.data, run.model.to(run.device).eval()
        images = data.test_images if not draw else data.intensities.tests(draw)  # type: ignore
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        order = order[: self.num_images]
        given = None
        if model.condition is not None:
            given = getattr(data, f"test_{model.condition.field}")
        spread = self.spread
        if spread is None:
            end = model.path.coefficients(torch.ones((), dtype=torch.float64))
            spread = float(end.sigma)  # of a belief N(mu, sigma^2): alpha^2 + sigma^2 = 1

        def batch(numbers: list[int]) -> Rows:
            chosen = order[numbers]
            x_1 = run.data.space.encode(images[chosen]).to(run.device)
            y = None if given is None else given[chosen].to(run.device)
            found = nats_of(
                model, x_1, y, numbers, [*self.n_steps, None],
                draws=self.draws, seed=self.seed + 1_000 * draw, spread=spread,
            )  # fmt: skip
            return {name: value.cpu() for name, value in found.items()}

        each = self.draws + sum(min(n, self.draws) for n in self.n_steps) + 1
        return shared_rows(range(len(order)), self.batch_size, batch, "code length", each)


def _rows(nats: Mapping[str, Tensor], values: int) -> Iterator[dict[str, Any]]:
    """One row for each number of transmissions: means over images, and their standard errors."""
    final = nats["final"]
    for name, steps in nats.items():
        if name == "final":
            continue
        whole = steps + final
        yield {
            "n": name.removeprefix("n="),
            "transmitted": float(steps.mean()),
            "final": float(final.mean()),
            "nats": float(whole.mean()),
            "standard_error": float(whole.std()) / math.sqrt(len(whole)),
            "bits_per_dim": float(whole.mean()) / values / math.log(2),
        }


def _black_and_white(data: ImageData) -> bool:
    images = data.images
    return images.dtype == torch.uint8 and bool(((images == 0) | (images == 255)).all())


@style()
def by_steps(
    rows: Sequence[Mapping[str, Any]], levels: Mapping[str, float], caption: str
) -> "Figure":
    """Nats per image against the number of transmissions, continuous time at the right end."""
    figure, axes = chart(560, 360, "Code length by the number of transmissions", caption)
    panel, places = axes[0, 0], range(len(rows))
    bars = [_QUANTILE * row["standard_error"] for row in rows]
    panel.errorbar(places, [row["nats"] for row in rows], bars, fmt="o-", capsize=3)
    for name, level in levels.items():
        if level < _NEAR * max(row["nats"] for row in rows):
            panel.axhline(level, color="0.6", linestyle="--", linewidth=1)
            panel.annotate(
                name.replace("_", " "), (places[-1], level), ha="right", va="bottom", color="0.4"
            )
    panel.set_xticks(places, [row["n"].replace("inf", "continuous") for row in rows])
    panel.set(xlabel="transmissions n", ylabel="nats per image")
    return figure
