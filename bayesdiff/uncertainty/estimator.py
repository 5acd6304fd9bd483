"""What every estimator is: a call that turns the start of a batch into images with their maps."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

from omegaconf import DictConfig

from bayesdiff.checks import UserError, at_least, positive, seed_of
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import require_pixels
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.likelihoods import likelihood_of
from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Solver
from bayesdiff.uncertainty.calibration import check_calibrate
from bayesdiff.uncertainty.data_variance import check_probes, step_at, with_data_variance
from bayesdiff.uncertainty.given import check_chosen, check_times, check_validation
from bayesdiff.uncertainty.samples import UNITS, Samples
from bayesdiff.uncertainty.start import Start, Starts

# Settings that change no map: how the work is cut up, which samples it is done for, and what is
# made of it afterwards.
WITHOUT_EFFECT = (
    *("batch_size", "max_memory", "validate", "validate_images", "validate_members"),
    *("labels", "numbers", "export"),
    "few_maps",  # whatever it chose has said so
    *("calibrate", "calibrate_images", "calibrate_per_time"),  # what was made is scaled afterwards
)
# Options that change nothing at these values: maps are those from before there were such options.
AS_BEFORE = (("aleatoric", 0), ("aleatoric_time", None), ("likelihood_probes", 0))


class Training(Protocol):
    """The run that an estimator belongs to, for those that read its files or compare others'."""

    @property
    def cfg(self) -> DictConfig:
        """Its resolved configuration."""

    @property
    def data(self) -> ImageDataModule:
        """Images it is trained on."""

    @property
    def model(self) -> GenerativeModel:
        """Its network, trained or not."""

    @property
    def folder(self) -> Path:
        """Its run folder, which need not be there yet."""


def check_derivative(model: GenerativeModel, who: str) -> None:
    """Refuse a model whose emission is drawn, and has no derivative.

    Args:
        model: trained or not.
        who: needs it, for the message.

    Raises:
        UserError: if it has none.
    """
    if not likelihood_of(model).differentiable:
        raise UserError(
            f"{who} needs a derivative of the prediction, which a drawn one has not; use "
            "model.likelihood.sampled=false, with model.likelihood.final=mean where that is set, "
            "or uncertainty=ensemble"
        )


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Carries the posterior of the head through a solver.

    Args:
        num_images: images that get a map (read by the pipeline, as the next two).
        labels: classes of these images, by number or name, in turn; None for all.
        numbers: of the samples that get a map, in place of 0, 1, ...; None for those.
        batch_size: images at once, fewer where ``max_memory`` asks for it.
        max_memory: GiB that the network's evaluations for one batch may take, see
            ``images_at_once``.
        seed: of everything that the estimate draws.
        times: in (0, 1); state and variance of every image are kept at the first time of the
            solver that is not before them.
        units: ``model`` for images in [-1, 1], ``unit`` for [0, 1]: what is stored and shown.
        validate: whether the maps are compared with a reference ensemble.
        validate_images: how many of them.
        validate_members: members of the reference.
        export: ``png`` for files of single images and maps, None for none.
        aleatoric: probes for the variance of the data given the sample's state on the way, beside
            the map, see ``data_variance``; ``all`` for its exact value, 0 for none.
        aleatoric_time: of that state; None where data and noise weigh the same.
        calibrate: what the size of the maps is fitted to: a number of further trainings from other
            seeds, run folders or checkpoints of some, ``held_out`` for the held-out error of the
            network's output; None for maps as they are (read by the pipeline, as the next two).
        calibrate_images: that this compares, which are not among those mapped.
        calibrate_per_time: whether each of ``times`` gets a factor of its own.
        likelihood_probes: random directions behind the log-likelihood of every image, followed
            along its own trajectory, 0 for none; an estimator that ``carries_density`` has it.

    Example:
        After the example of ``starts_of``:

        >>> from bayesdiff.uncertainty import Ensemble
        >>> samples = Ensemble(members=4, times=[0.5]).mapped(starts, [0, 1, 2], posterior)
        >>> samples.images.shape, bool((samples.variance >= 0).all())
        (torch.Size([3, 1, 8, 8]), True)
        >>> samples.requested_times, samples.state_variance.shape
        (tensor([0.5000]), torch.Size([1, 3, 1, 8, 8]))
    """

    num_images: int = 64
    labels: Sequence[int | str] | None = None
    numbers: Sequence[int] | None = None
    batch_size: int = 64
    max_memory: float = 4.0
    seed: int = 0
    times: Sequence[float] = ()
    units: str = "model"
    validate: bool = False
    validate_images: int = 16
    validate_members: int = 32
    export: str | None = None
    aleatoric: int | str = 0
    aleatoric_time: float | None = None
    calibrate: int | str | Sequence[str] | None = None
    calibrate_images: int = 64
    calibrate_per_time: bool = False
    likelihood_probes: int = 0

    # What a user types for it, as in uncertainty=ensemble.
    name: ClassVar[str]
    # Whether it needs the derivative of the network's prediction.
    differentiates: ClassVar[bool] = False
    # Whether it can follow the density of its images.
    carries_density: ClassVar[bool] = False
    # Whether its maps are the doing of the head's posterior.
    of_posterior: ClassVar[bool] = True
    # Whether it looks at states as images.
    of_pixels: ClassVar[bool] = False
    # The stage of ``fit`` whose result stays in the run folder; empty where nothing does.
    prepares: ClassVar[str] = ""

    def __post_init__(self) -> None:
        at_least("uncertainty.num_images", self.num_images)
        at_least("uncertainty.batch_size", self.batch_size)
        seed_of("uncertainty.seed", self.seed)
        at_least("uncertainty.likelihood_probes", self.likelihood_probes, 0)
        positive("uncertainty.max_memory", self.max_memory, "give GiB above 0")
        if self.units not in UNITS:
            raise UserError(
                f"unknown uncertainty.units {self.units!r}; choose from {', '.join(UNITS)}"
            )
        check_chosen(self.labels, self.numbers)
        check_times(self.times)
        given = self.validate, self.validate_images, self.validate_members
        check_validation(*given, self.map_count)
        check_probes(self.aleatoric, self.aleatoric_time)
        options = self.calibrate_images, self.calibrate_per_time, self.times, self.validate
        check_calibrate(self.calibrate, *options)

    @abstractmethod
    def __call__(self, start: Start, posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance."""

    @abstractmethod
    def check(self, solver: Solver) -> None:
        """Refuse settings that do not fit the solver."""

    @property
    def map_count(self) -> int:
        """Images that get a map."""
        return self.num_images if self.numbers is None else len(self.numbers)

    @property
    def restarts(self) -> bool:
        """Whether maps can begin in the middle of a trajectory."""
        return True

    @abstractmethod
    def copies(self, solver: Solver) -> int:
        """Network inputs per image that are held at once."""

    def evaluations(self, start: Start) -> float | None:
        """Network evaluations of an image with its map, None where only a batch can tell."""
        return None

    def check_run(self, run: Training) -> None:
        """Refuse, before any work, a run that cannot have these maps."""
        self.check_model(run.model)

    def check_model(self, model: GenerativeModel) -> None:
        """Refuse, before any work, a model that cannot have these maps."""
        if self.differentiates:
            check_derivative(model, f"uncertainty={self.name}")

    def check_data(self, data: ImageData) -> None:
        """Refuse, before any work, states that cannot have these maps; most can.

        Raises:
            UserError: for units of pictures where there are none.
        """
        if self.of_pixels:
            cure = "use uncertainty=ensemble or linearised"
            require_pixels(data, f"uncertainty={self.name}", cure)
        if self.units != "model" and not data.space.pictures:
            raise UserError(
                f"uncertainty.units={self.units} is of pictures, and {data.name} has none; "
                "leave it at model"
            )

    def mapped(self, starts: Starts, numbers: Sequence[int], posterior: HeadPosterior) -> Samples:
        """Images of one batch with their variance, and that of the data where it is asked for.

        Args:
            starts: gives their start.
            numbers: of the samples.
            posterior: of the head.
        """
        samples = self(starts(numbers), posterior)
        if not self.aleatoric:
            return samples
        asked = self.aleatoric, self.aleatoric_time, self.seed
        return with_data_variance(samples, starts(numbers), *asked)

    def check_aleatoric(self, start: Start) -> None:
        """Refuse, before any work, what has no variance of the data on the way.

        Raises:
            UserError: for values that are decoded from states; and a drawn prediction, or a solver
                without a state on the way.
        """
        if not self.aleatoric:
            return
        check_derivative(start.model, "uncertainty.aleatoric")
        if start.decoder is not None:
            raise UserError(
                "uncertainty.aleatoric is a variance of states, and these are decoded to what is "
                "shown; use uncertainty.aleatoric=0"
            )
        step_at(start, self.aleatoric_time)

    def check_decoded(self) -> None:  # noqa: B027 - most can
        """Refuse states that are decoded, with a ``UserError``."""

    def sources(self, run: Training) -> list[Any]:
        """What the maps come from beside weights, posterior and settings, for their key."""
        return []

    def for_run(self, run: Training) -> Self:
        """The estimator with what it reads of the run beside its model, before ``fit``."""
        return self

    def fit(self, starts: Starts, posterior: HeadPosterior, folder: Path | None = None) -> Self:
        """The estimator made ready for this model, solver and posterior; most need nothing.

        Args:
            starts: gives the start of the samples with these numbers.
            posterior: of the head.
            folder: the run folder, None for none.
        """
        return self

    def prepared(self, start: Start, posterior: HeadPosterior, folder: Path) -> tuple[str, bool]:
        """Key of what ``fit`` leaves in the run folder, and whether it is there."""
        return "", False
