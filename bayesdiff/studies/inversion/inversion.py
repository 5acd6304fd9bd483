"""Is the trained flow a map that can be turned around, and what does it make of data?

Held-out data go to latents and back along the run's deterministic solver. What comes back says how
exact the map is at this number of steps; the latents, whether the model has found the normal
distribution that it starts samples from; and flows with heads drawn from the posterior, how far
either hangs on the weights. Of a flow, of diffusion and of an inflationary flow alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.machine.ranks import rank
from bayesdiff.machine.shared_rows import Rows
from bayesdiff.paths.coefficient import like
from bayesdiff.report import table
from bayesdiff.runs.build import Run
from bayesdiff.runs.invertible import save_latents
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.stages import made_rows
from bayesdiff.solvers import SampleNoise, Solver
from bayesdiff.solvers.encode import backward
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.studies.inversion import animation, figures, results
from bayesdiff.studies.inversion.shown import Shown
from bayesdiff.studies.inversion.trip import RoundTrip, expected_variance, left_noise
from bayesdiff.studies.study import Place, Report, Study, conditions
from bayesdiff.uncertainty import Estimator

STARTS = ("clean", "noised")
_HEADLINES = ("round_trip_mse", "latent_variance", "latent_kurtosis", "weights_share")
# Other draws than the run's estimators have.
_SALT = 1_000_033


@dataclass(frozen=True, kw_only=True)
class Inversion(Study):
    """Which data take the round trip, and from what.

    Args:
        num_images: held-out images or points, in a fixed random order; None for all.
        start: ``clean``, data as they are; ``noised``, with the noise that the path has at t = 1.
        members: flows with heads drawn from the posterior, at least 2, or 0 for none.
        animation: whether points get ``inversion.gif``, their way to latents and back.
        bootstrap: samples of the intervals over images.
        batch_size: images at once; each is there once more for every member.
        seed: of order, noise, heads and intervals.

    Example:
        >>> study = Inversion(num_images=4000)
        >>> latents = torch.randn(study.num_images, 2)  # as of a model that is right
        >>> found = results.of_latents(latents)
        >>> round(found["latent_variance"], 1), abs(round(found["latent_kurtosis"]))
        (1.0, 0)
    """

    num_images: int | None = 256
    start: str = "clean"
    members: int = 8
    animation: bool = True
    bootstrap: int = 1000
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_images is not None:
            at_least("inversion.num_images", self.num_images, 4)
        if self.start not in STARTS:
            raise UserError(f"unknown inversion.start {self.start!r}; choose from clean, noised")
        if at_least("inversion.members", self.members, 0) == 1:
            raise UserError("inversion.members=1 has no variance; give 2 or more, or 0")
        if not isinstance(self.animation, bool):
            raise UserError(f"inversion.animation must be true or false, got {self.animation!r}")
        at_least("inversion.bootstrap", self.bootstrap, 2)
        at_least("inversion.batch_size", self.batch_size)
        seed_of("inversion.seed", self.seed)

    def check_data(self, data: ImageData, name: str) -> None:
        """Any data."""

    def check(self, run: Run, solver: Solver, estimator: Estimator) -> None:
        """Refuse what is no map, and more images than there are.

        Raises:
            UserError: for a path that does not end in data, a solver or a likelihood that draws,
                noise that a path does not have, and data that are not there.
        """
        model, data = run.model, run.data.data
        if not model.path.ends_in_data:
            raise UserError(
                f"inversion follows a flow between noise and data, and samples of a "
                f"{model.path.family} model end in a prediction; use model=flow, diffusion or "
                "inflation"
            )
        if likelihood_of(model).draws:
            raise UserError(
                f"inversion needs a deterministic map, and model.likelihood="
                f"{likelihood_of(model).name} draws on the way; use likelihood=gaussian"
            )
        if solver.stochastic:
            raise UserError(
                f"inversion needs a deterministic solver, solver={solver.name} draws noise; use "
                "solver=ddim, heun or another without noise"
            )
        backward(solver, model.path, model.prediction)
        if self.start == "noised" and left_noise(model.path) is None:
            raise UserError(
                "inversion.start=noised adds the noise that a path has at t = 1, and that of this "
                f"{model.path.family} model has none there; use inversion.start=clean"
            )
        there = len(data.test_images)
        if (self.num_images or 4) > there:
            raise UserError(
                f"inversion.num_images={self.num_images} is more than the {there} held-out images "
                f"of {data.name}; use fewer, at least 4"
            )

    def made_from(self, at: Setup) -> list[Any]:
        """The network, the solver and the posterior."""
        return [at.made_from]

    def make(self, at: Setup, place: Place) -> Report | None:
        """Both ways, kept as ``round_trips.npz``, and what they say."""
        trip, noised = self._trip(at), self.start == "noised"
        file = Artefact(place.folder / "round_trips.npz", place.key)
        rows = self._rows(at, trip, file)
        if rank():
            return None
        model, space, start = at.run.model, at.run.data.space, at.solver
        save_latents(place.folder / "latents.safetensors", rows["latents"], at.weights, start)
        rows = standardised(rows, like(model.path.noise_scale, rows["latents"]))
        expected = expected_variance(
            model.path, noised, space.shape, getattr(space, "spread", 1.0)
        )
        record = self._record(at, rows, expected)
        record["conditions"]["nfe"] = trip.nfe
        made_of = conditions({k: v for k, v in at.settings.items() if k != "uncertainty.name"})
        shown = Shown(record, rows, model.path, space, expected, trip.times, made_of)
        if shown.points and self.animation:
            animation.write(place.folder / "inversion.gif", shown)
        numbers = {k: v for k, v in record.items() if isinstance(v, float)}
        return Report(
            record,
            figures.every(shown),
            {"table.md": _figures_of(record), "dimensions.md": table.markdown(record["groups"])},
            scalars={k: v for k, v in numbers.items() if not k.endswith(("_low", "_high"))},
            headlines={name: numbers[name] for name in _HEADLINES if name in numbers},
        )

    def _trip(self, at: Setup) -> RoundTrip:
        heads = None
        if self.members:
            generator = torch.Generator().manual_seed(self.seed + _SALT)
            heads = at.posterior.draw(self.members, generator)
        space = at.run.data.space
        frames = 0 if space.pictures else animation.FRAMES // 2
        model = at.run.model.to(at.run.device).eval()
        return RoundTrip(model, at.solver, space, heads, frames)

    def _rows(self, at: Setup, trip: RoundTrip, file: Artefact) -> Rows:
        """Both ways of all data."""
        run, data, model = at.run, at.run.data.data, at.run.model
        order = torch.randperm(
            len(data.test_images), generator=torch.Generator().manual_seed(self.seed)
        )[: self.num_images]
        given = None
        if model.condition is not None:
            given = getattr(data, f"test_{model.condition.field}")
        noise = left_noise(model.path) if self.start == "noised" else None

        def batch(numbers: list[int]) -> Rows:
            chosen = order[numbers]
            x_1 = trip.space.encode(data.test_images[chosen].to(run.device))
            x_1 = likelihood_of(model).values(x_1)
            if noise is not None:
                x_0 = SampleNoise(self.seed, numbers, x_1.shape[1:])().to(x_1)
                x_1 = x_1 + like(noise, x_1) * x_0
            condition = None if given is None else given[chosen].to(run.device)
            return {"number": chosen, **trip(x_1, condition)}

        each = trip.nfe * (1 + self.members)
        return made_rows(file, range(len(order)), self.batch_size, batch, "round trips", each)

    def _record(self, at: Setup, rows: Rows, expected: Tensor) -> dict[str, Any]:
        """All numbers, as in results.json."""
        chance: dict[str, Any] = {"seed": self.seed, "resamples": self.bootstrap, "level": 0.95}
        found: dict[str, Any] = results.round_trip(rows, at.run.data.space.pictures, chance)
        found |= results.of_latents(rows["latents"])
        if self.members:
            found |= results.of_weights(rows, chance)
        found["groups"] = results.groups(at.run.model.path, found["coordinates"], expected)
        made = {"images": len(rows["data"]), "start": self.start, "members": self.members}
        return {"conditions": {**made, "solver": at.solver.name, "seed": self.seed}, **found}


def standardised(rows: Rows, scale: Any) -> Rows:
    """Latents, and their variance, over the standard deviation of the noise at t = 0."""
    made = {"latents": rows["latents"] / scale}
    if "latent_variance" in rows:
        made["latent_variance"] = rows["latent_variance"] / scale**2
    return {**rows, **made}


def _figures_of(record: Mapping[str, Any]) -> str:
    """Markdown of all single numbers, with their intervals where they have some."""
    ends = ("_low", "_high")
    return table.markdown(
        [
            {"figure": name, "value": value, **{e[1:]: record.get(f"{name}{e}") for e in ends}}
            for name, value in record.items()
            if isinstance(value, float) and not name.endswith(ends)
        ]
    )
