"""One composer of small configurations, and one small finished run that many tests read."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs"

SMALLEST = (
    "net=tiny",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
    "callbacks.samples=null",
    "solver.num_steps=3",
    "laplace.num_images=64",
    "metrics.num_images=12",
    "uncertainty.num_images=4",
    "uncertainty.batch_size=2",
    "report.pdf=false",
)

# As few draws as each estimator takes.
DRAWS = {
    "ensemble": ("uncertainty.members=2", "uncertainty.noise_members=2"),
    "linearised": ("uncertainty.draws=2",),
    "refined": ("uncertainty.train_images=24", "uncertainty.epochs=1"),
    "published": ("uncertainty.mc_samples=2",),
    "total_variance": ("uncertainty.mc_samples=2",),
    "cross_covariance": ("uncertainty.members=2", "uncertainty.head_draws=4"),
    "variance_head": ("uncertainty.probes=2", "uncertainty.fit_images=64"),
}


# Files of many seconds, the longest first: with a file per worker at a time they must not be last.
LONG = (
    "readme faults ddp sharding bad_input repair rivals refined filtering sweep linearised "
    "corruption startup combinations planner classifier likelihood moments structures"
).split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files come first, the others in their order; so all workers end together."""
    places = {f"test_{name}": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session", autouse=True)
def digits_read_once() -> Iterator[None]:
    """scikit-learn would parse them for every run."""
    import sklearn.datasets

    once = cache(sklearn.datasets.load_digits)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sklearn.datasets, "load_digits", lambda: copy.deepcopy(once()))
        yield


@pytest.fixture(scope="session", autouse=True)
def figures_drawn_once() -> Iterator[None]:
    """Reports draw a figure once; the next of its name, size and titles gets its pixels.

    Figures are made, captioned and kept as ever: drawing them is half of the smallest run.
    """
    from matplotlib.figure import Figure

    from bayesdiff.report import figures, style

    drawn: dict[tuple, bytes] = {}

    def save(figure: Figure, path: Path, *, pdf: bool = True) -> Path:
        size = tuple(figure.get_size_inches().round(2))
        kind = (Path(path).name, size, tuple(axes.get_title() for axes in figure.axes))
        if kind not in drawn:
            drawn[kind] = style.save(figure, path, pdf=pdf).read_bytes()
            return Path(path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Figure, "savefig", lambda _, to, **__: Path(to).write_bytes(drawn[kind]))
            return style.save(figure, path, pdf=pdf)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "save", save)
        yield


@pytest.fixture
def every_figure_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at the pixels of reports."""
    from bayesdiff.report import figures, style

    monkeypatch.setattr(figures, "save", style.save)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums and rows of a batch round differently with another number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def without_pdf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures as PNG alone: drawing each twice is what ``test_figure_files`` is for."""
    monkeypatch.setattr("bayesdiff.report.style._save_pdf", lambda figure, file, *_: None)


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure of a run or a study is made at all."""
    from bayesdiff.report import board

    for name in ("write", "write_study"):
        monkeypatch.setattr(board, name, lambda *args, **kwargs: [])


Compose = Callable[..., DictConfig]
# One pass over the digits is enough for a feature space of tests.
QUICK_CLASSIFIER = ("bayesdiff.metrics.classifier._epochs", lambda size: 1)


def smallest(output_dir: Path, *overrides: str) -> list[str]:
    """Overrides of a run of seconds; the given ones come last and win."""
    chosen = [o.removeprefix("uncertainty=") for o in overrides if o.startswith("uncertainty=")]
    # The default trains a network of its own, which a run of seconds has no images for.
    estimator = () if chosen else ("uncertainty=ensemble",)
    draws = DRAWS.get(chosen[-1] if chosen else "ensemble", ())
    return [*SMALLEST, *estimator, *draws, f"output_dir={output_dir}", *overrides]


def train_py(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in ``folder``; callbacks of the tests are found."""
    return python_in(folder, ROOT / "train.py", *overrides)


def python_in(folder: Path, script: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a script in ``folder``; what the tests define is found."""
    inherited = {k: v for k, v in os.environ.items() if not re.search("RANK|WORLD_|^PL_|HYDRA", k)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, str(script), *words],
        cwd=folder,
        env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def scalars(folder: Path) -> dict[str, list[float]]:
    """Curves in a TensorBoard folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def hydra_composes(overrides: list[str], name: str = "train", **options: bool) -> DictConfig:
    """What Hydra makes of these arguments, in 0.1 s."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return hydra_compose(name, overrides, **options)


@cache
def composed_once(choices: tuple[str, ...], name: str) -> DictConfig:
    """The configuration of a choice of groups, to copy."""
    return hydra_composes(list(choices), name)


@cache
def parsed_once(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def is_value(word: str) -> bool:
    """Whether an override sets a value after the groups are chosen; where unsure, not."""
    key = re.match(r"(?:\+\+?|~)?([\w.]+)(?:=|$)", word)
    return bool(key) and not key[1].startswith("hydra") and not (CONFIGS / key[1]).is_dir()


def compose_list(overrides: list[str], name: str = "train", **options: bool) -> DictConfig:
    """The configuration that train.py, or sweep.py, would get from these arguments.

    Hydra composes each choice of groups once; values are then set by Hydra's own function.
    """
    if not options:
        choices = tuple(word for word in overrides if not is_value(word))
        try:
            values = [parsed_once(word) for word in overrides if is_value(word)]
            if not any(value.is_sweep_override() for value in values):
                cfg = copy.deepcopy(composed_once(choices, name))
                ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
                return cfg
        except Exception:  # Hydra says what is wrong
            pass
    return hydra_composes(overrides, name, **options)


@pytest.fixture
def compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compose:
    """``compose(*overrides)``: the smallest run, in a folder of its own."""
    monkeypatch.setattr(*QUICK_CLASSIFIER)
    return lambda *overrides: compose_list(smallest(tmp_path, *overrides))


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        output_dir: holds the run folder, and the cache of classifier and reference.
        folder: the run folder.
        cell: the folder of its numbers and pictures.
        samples: its images with their maps.
    """

    output_dir: Path
    folder: Path
    cell: Path
    samples: Path
    metrics: dict[str, float]

    @property
    def curvature(self) -> Path:
        (path,) = self.folder.glob("curvature-*.safetensors")
        return path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"

    def copy_to(self, output_dir: Path) -> "Trained":
        """The same run in another place, so that a test can change it."""
        shutil.copytree(self.output_dir, output_dir, dirs_exist_ok=True)
        return Trained(
            output_dir,
            output_dir / self.folder.name,
            output_dir / self.folder.name / self.cell.name,
            output_dir / self.folder.name / self.samples.name,
            self.metrics,
        )


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The smallest run on digits, every stage real, pictures included."""
    from bayesdiff import pipeline

    output_dir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*QUICK_CLASSIFIER)
        result = pipeline.run(compose_list(smallest(output_dir)))
    found = result.folder.parent, result.folder, result.samples, result.metrics
    return Trained(output_dir, *found)


@pytest.fixture
def copied(trained: Trained, tmp_path: Path) -> Trained:
    """A copy of the finished run where ``compose`` looks."""
    return trained.copy_to(tmp_path)
