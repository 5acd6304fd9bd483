"""Two processes on CPU give what one process gives: curvature, images, maps, and weights."""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trained, compose_list, smallest, train_py

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.record import Curvature
from bayesdiff.metrics import classifier
from bayesdiff.report import board
from bayesdiff.storage.artefacts import read_json
from bayesdiff.storage.checkpoints import read_checkpoint

VALIDATE = (
    "uncertainty.validate=true",
    "uncertainty.validate_images=3",
    "uncertainty.validate_members=2",
)
TWO = ("trainer=ddp", "trainer.devices=2")
# What a training leaves in its folder beside what follows from it.
OF_TRAINING = (".hydra/", ".locks/fit", "checkpoints/", "fit.json", "tensorboard/")
# Several batches of everything, and numbers of them that two processes cannot share evenly.
BATCHES = ("laplace.batch_size=24", "metrics.batch_size=5", "uncertainty.batch_size=3")
# Five blocks of images; more batches in a block than processes.
FILTERED = (
    "experiment=filtering",
    "filtering.num_images=40",
    "filtering.seeds=[0]",
    "filtering.keep=[0.5]",
    "filtering.main_keep=0.5",
    "filtering.members=2",
    "filtering.aleatoric_draws=2",
    "filtering.subsets=3",
    "filtering.draws=2",
    "~filtering.maps.published",
)


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch, one_thread):
    """The other process has one thread too."""
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])


def files(folder: Path) -> list[str]:
    """Names of all files; those of TensorBoard hold a time and a process number."""
    names = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return sorted(re.sub(r"tfevents\..*?(\.report)?$", r"tfevents\1", name) for name in names)


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def classifiers_for(trained: Trained, output_dir: Path) -> None:
    """Give the command both its classifiers: it would train them for longer than the tests do."""
    cache = shutil.copytree(trained.output_dir / "cache", output_dir / "cache")
    (quick,) = cache.glob("classifier-*")
    images = pipeline.build(compose_list(smallest(output_dir))).data.data
    epochs = classifier._epochs(len(images.images))
    for seed in (0, 1):
        shutil.copy(quick, classifier.cache_path(cache, images.fingerprint, seed, epochs))


@dataclass(frozen=True)
class Runs:
    """What two processes made in one command, and what one made of the same training.

    Attributes:
        folder: of both runs, ``one`` and ``two``.
        one: a single process's, from the checkpoint of the two.
        said: by the two.
        options: of the training.
    """

    folder: Path
    one: pipeline.Result
    said: str
    options: tuple[str, ...]


@pytest.fixture(scope="module")
def runs(trained: Trained, tmp_path_factory) -> Runs:
    """A training and all that follows in two processes; what follows in one as well."""
    folder = tmp_path_factory.mktemp("runs")
    options = ("trainer.max_epochs=2", "callbacks.ema.decay=0.9", "model.warmup_steps=2")
    options += ("data.flip=true",)
    fixed = [*options, *FILTERED, *BATCHES, *VALIDATE]
    classifiers_for(trained, folder)
    done = train_py(folder, *smallest(folder, *fixed, *TWO, f"run_dir={folder}/two"))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for path in (folder / "cache").glob("reference-*"):
        path.unlink()  # its features too are shared out
    fixed += ["fit=false", f"ckpt_path={folder}/two/checkpoints/last.ckpt"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "write", lambda *args, **kwargs: [])
        patch.setattr(board, "write_study", lambda *args, **kwargs: [])
        one = pipeline.run(compose_list(smallest(folder, *fixed, f"run_dir={folder}/one")))
    torch.set_num_threads(threads)
    return Runs(folder, one, done.stdout, options)


def test_the_same_curvature_images_and_maps(runs):
    one, folder = runs.one, runs.folder
    assert len(re.findall(r"\bnfe\b", runs.said)) == 1
    two = folder / "two"
    single, shared = (Curvature.load(next(at.glob("curvature-*"))) for at in (folder / "one", two))
    assert shared.source == single.source
    torch.testing.assert_close(shared.gram, single.gram, rtol=1e-9, atol=0)
    assert shared.squared_error == pytest.approx(single.squared_error, rel=1e-9)
    (first,), (second,) = ((folder / n).glob("images-*.npz") for n in ("one", "two"))
    assert first.name == second.name
    assert np.array_equal(arrays(first)["images"], arrays(second)["images"])
    maps = arrays(two / one.samples.name)
    for name, value in arrays(one.samples).items():
        if name == "variance" or name.startswith(("summed", "frame_variance")):
            np.testing.assert_allclose(maps[name], value, rtol=1e-5)
        else:
            assert np.array_equal(maps[name], value), name
    compared = [
        read_json(path) for n in ("one", "two") for path in (folder / n).glob("validation-*")
    ]
    first_rows, second_rows = (record["images"] for record in compared)
    for name in ("estimate", "reference", "z2"):
        np.testing.assert_allclose(second_rows[name], first_rows[name], rtol=1e-4)
    scored = [read_json(path) for n in ("one", "two") for path in (folder / n).glob("scores-*")]
    assert scored[1]["metrics"] == pytest.approx(scored[0]["metrics"], rel=1e-9, nan_ok=True)
    assert len(list((folder / "cache").glob("reference-*"))) == 1
    names = [name for name in files(two) if "figures/" not in name and ".report" not in name]
    assert [name for name in names if not name.startswith(OF_TRAINING)] == files(folder / "one")


def test_the_same_gains_of_every_score(runs):
    (study,) = runs.one.studies
    first, second = (
        read_json(runs.folder / name / study.name / "results.json") for name in ("one", "two")
    )
    assert first == second
    assert len(first["seeds"]["0"]) > 50


def test_the_same_weights_from_a_shared_training(runs, tmp_path):
    options = [*runs.options, "metrics.num_images=0"]
    one = pipeline.run(compose_list(smallest(tmp_path, *options))).folder.parent
    two = runs.folder / "two"
    first, second = (
        read_checkpoint(f / "checkpoints" / "last.ckpt")["state_dict"] for f in (one, two)
    )
    model = pipeline.build(compose_list(smallest(tmp_path, *options))).model
    moved = [(first[name] - start).abs().max() for name, start in model.state_dict().items()]
    assert max(moved) > 1e-3
    for name, value in first.items():
        # A bias in front of a norm has no gradient; Adam makes steps of its rounding errors.
        atol = 1e-3 if name.endswith(".bias") else 1e-5
        torch.testing.assert_close(second[name], value, rtol=0, atol=atol, msg=name)
    x, t = (
        torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.full((4,), 0.5),
    )
    outputs = []
    for state in (first, second):
        model.load_state_dict(state)
        outputs.append(model.eval()(x, t, torch.arange(4)))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
    assert len(list((two / "tensorboard").glob("events.*"))) == 1


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["data.batch_size=127"], ["data.batch_size=127", "2 processes", "multiple"]),
        (["trainer.strategy=ddp_spawn"], ["trainer.strategy=ddp_spawn", "trainer=ddp or fsdp"]),
        (["trainer.devices=0"], ["trainer.devices", "got 0"]),
        (["trainer.devices=two"], ["trainer.devices", "'two'"]),
    ],
)
def test_refused_before_processes_start(overrides, fragments, tmp_path, monkeypatch):
    def launched(*_):
        raise AssertionError("processes were started")

    monkeypatch.setattr(pipeline, "launch", launched)
    with pytest.raises(UserError) as error:
        pipeline.prepare(compose_list(smallest(tmp_path, *TWO, *overrides)))
    assert all(fragment in str(error.value) for fragment in fragments), str(error.value)
