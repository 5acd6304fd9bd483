"""How long the pieces of a run take: a few timed calls of a network that was never trained."""

import copy
import logging
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from torch import Tensor, nn

from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.gram import head_matrix
from bayesdiff.laplace.head import HeadGeometry
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.models import GenerativeModel
from bayesdiff.options.targets import taken
from bayesdiff.runs.build import Run, precision
from bayesdiff.solvers import Field, Solver
from bayesdiff.uncertainty import Estimator, Starts, starts_of
from bayesdiff.uncertainty.members.base import NetworkMembers
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS
from bayesdiff.uncertainty.sensitivities.refined import Refined

_CPU_ROWS = 64  # a CPU evaluates larger batches in parts of this size
_DIRECTIONS = 8


def seconds_of(call: Callable[[], object], device: torch.device, repeats: int = 3) -> float:
    """Fastest of a few calls after one that warms up; what else runs here only adds to it."""
    found = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - started)
        if sum(found) > 5:  # slow enough to be known well
            break
    return min(found[1:] or found)


@dataclass(frozen=True)
class Probe:
    """Timings of one network on one kind of image, each made once when it is asked for.

    Attributes:
        run: gives network, data and device; its network is copied, not changed.
    """

    run: Run

    @cached_property
    def model(self) -> GenerativeModel:
        """A copy of the network."""
        return copy.deepcopy(self.run.model).to(self.run.device).eval()

    def batch(self, size: int) -> tuple[Tensor, Tensor | None]:
        """Training images and labels, the first ones over and over."""
        data, device = self.run.data.data, self.run.device
        chosen = torch.arange(size) % len(data.images)
        labels = None if data.labels is None else data.labels[chosen].to(device)
        conditional = bool(self.model.num_classes)
        return data.space.encode(data.images[chosen]).to(device), labels if conditional else None

    def evaluation(self, size: int) -> float:
        """Seconds per image of one network evaluation in batches of ``size``."""
        size = min(size, _CPU_ROWS) if self.run.device.type == "cpu" else size
        x, labels = self.batch(size)
        field = Field(self.model, labels, size)
        with torch.inference_mode():
            return seconds_of(lambda: field(x, 0.5), self.run.device) / size

    def product(self, name: str, size: int) -> float:
        """Seconds per counted evaluation of an image's derivative along directions."""
        size = max(1, min(size, _CPU_ROWS // _DIRECTIONS))
        x, labels = self.batch(size)
        with torch.no_grad():
            field = Field(self.model, labels, size)
            output, d = field(x, 0.5), torch.randn(_DIRECTIONS, *x.shape).to(x)
            counted = field.evaluations
            call = PRODUCTS[name]
            seconds = seconds_of(lambda: call(field, x, output, d, 0.5), self.run.device, 1)
            calls = 2 if seconds < 5 else 1
            return seconds * calls / max(1, field.evaluations - counted) / size

    @cached_property
    def training_step(self) -> float:
        """Seconds of an optimiser step at the real batch size, gradients and weights included."""
        run, model = self.run, copy.deepcopy(self.model).train()
        x_1, labels = self.batch(run.cfg.data.batch_size)
        optimizer = instantiate(taken(run.cfg.model.optimizer), _convert_="all")(
            model.parameters()
        )
        mixed = "bf16" in precision(run.cfg, run.device)

        def context() -> AbstractContextManager[Any]:
            kind = run.device.type
            return torch.autocast(kind, torch.bfloat16) if mixed else nullcontext()

        def step() -> None:
            t = model.path.last_time * torch.rand(len(x_1), device=x_1.device)
            x_t, target = model.corrupt(x_1, torch.randn_like(x_1), t)
            optimizer.zero_grad()
            with context():
                loss = F.mse_loss(model(x_t, t, labels).float(), target)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()

        return seconds_of(step, run.device)

    def curvature(self, size: int) -> float:
        """Seconds per image and draw of the pass, in batches of ``size``."""
        data = self.run.data.data
        count = min(size, len(data.images))
        labels = None if data.labels is None else data.labels[:count]

        def call() -> Curvature:
            batch = {"batch_size": count, "source": ""}
            with quiet():
                return fit_curvature(self.model, data.images[:count], labels, **batch)  # type: ignore[arg-type]

        return seconds_of(call, self.run.device, 1) / count

    @cached_property
    def classifier(self) -> tuple[float, float]:
        """Seconds to train the scores' classifier, and per image to extract its features."""
        from bayesdiff.metrics import classifier

        data, device = self.run.data.data, self.run.device
        batches = classifier._batches(
            len(data.images), classifier._epochs(len(data.images)), torch.Generator()
        )
        stride = 4 if max(data.images.shape[2:]) > 32 else 2
        network = classifier.Classifier(data.channels, data.num_classes, stride=stride)
        network = network.to(memory_format=torch.channels_last).to(device)
        few = batches[:3]
        assert data.labels is not None
        labels = data.labels.to(device)

        def train() -> None:
            classifier._fit(network.train(), data.images.to(device), labels, few)

        seconds = seconds_of(train, device, 1) / len(few) * len(batches)
        size = min(self.run.cfg.metrics.batch_size, len(data.images))
        images = data.images[:size].to(device)
        with torch.inference_mode():
            extracting = seconds_of(lambda: network.eval().features(images), device)
        return seconds, extracting / size

    def estimator(self, estimator: Estimator, size: int) -> float:
        """Seconds per counted evaluation of an estimator that holds ``size`` inputs at once."""
        name = getattr(estimator, "derivative", None)
        if name in PRODUCTS and not isinstance(estimator, Refined):
            return self.product(str(name), size)
        return self.evaluation(size)


class _Stub(nn.Module):
    """A network of no cost that counts the images it is evaluated at."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.head = nn.Conv2d(2, channels, 1)
        self.count = 0

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Two smooth numbers per pixel."""
        self.count += len(x)
        mean = x.mean(1, keepdim=True)
        return torch.cat([mean, mean.sin()], 1)

    def fold(self, output: Tensor) -> Tensor:
        """Pixels are the head's outputs."""
        return output

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction."""
        return self.head(self.features(x, t, y))


@dataclass(frozen=True)
class Counts:
    """Network evaluations of a cell.

    Attributes:
        image: per image without uncertainty.
        map: per image with its map.
        check: per image with the members of a reference.
        fit: of the estimator's own preparation, over all its images.
    """

    image: int
    map: int
    check: int
    fit: int


def count(run: Run, solver: Solver, estimator: Estimator) -> Counts:
    """Count them with a network of no cost in the model's place; what is counted is real."""
    from bayesdiff.metrics.validation import reference_of

    model, channels = run.model, run.data.data.channels
    stub, classes = _Stub(channels), model.num_classes
    never = torch.optim.SGD  # it is never trained
    twin = GenerativeModel(stub, model.path, model.prediction, never, classes).eval()
    starts = starts_of(twin, solver, 0, (channels, 8, 8), torch.device("cpu"))
    posterior = _posterior(stub)
    ready, spent = _countable(estimator, twin, model), 0
    if isinstance(ready, Refined):  # a refiner's images cost the same each
        few = replace(ready, train_images=24, epochs=1)
        ready, first = _counted(few, stub, starts, posterior)
        _, second = _counted(replace(few, train_images=32), stub, starts, posterior)
        spent = first + round((second - first) / 8 * (estimator.train_images - 24))  # type: ignore[attr-defined]
    elif not isinstance(ready, NetworkMembers):
        ready, spent = _counted(ready, stub, starts, posterior)
    start = starts([0])
    guided = 1 if solver.guidance == 1 or not classes else 2
    return Counts(
        image=guided * sum(len(step.times) for step in start.steps()),
        map=ready(start, posterior).nfe,
        check=reference_of(estimator)(starts([0]), posterior).nfe,
        fit=spent,
    )


def _counted(
    estimator: Estimator, stub: _Stub, starts: Starts, posterior: HeadPosterior
) -> tuple[Estimator, int]:
    """The estimator made ready, and the evaluations that took."""
    before = stub.count
    with quiet():
        return estimator.fit(starts, posterior), stub.count - before


@contextmanager
def quiet() -> Generator[None, None, None]:
    """What a network of no cost gives rise to is no news."""
    logger = logging.getLogger("bayesdiff")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _posterior(stub: _Stub) -> HeadPosterior:
    """Any posterior; how often the network is evaluated does not depend on it."""
    geometry = HeadGeometry.of(stub.head)
    mean = head_matrix(stub.head)
    gram = 100 * torch.eye(geometry.size, dtype=torch.float64)
    curvature = Curvature(gram, 100, 1, 1.0, 100, mean, "", geometry)
    return HeadPosterior.fit(
        curvature, structure="full", sigma_noise=1.0, prior_precision=1.0, n_eff=None, rank=None
    )


def _countable(estimator: Estimator, twin: GenerativeModel, model: GenerativeModel) -> Estimator:
    """The estimator with what the real network would give it."""
    if isinstance(estimator, NetworkMembers):
        return replace(estimator, networks=(twin,) * max(2, estimator.planned))
    if getattr(estimator, "draws", None) == "all":
        size = HeadGeometry.of(model.net.head).size * len(head_matrix(model.net.head))
        return replace(estimator, **cast(Any, {"draws": size}))
    return estimator
