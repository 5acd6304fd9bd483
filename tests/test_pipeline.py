"""The whole pipeline on digits: what it leaves, what it does again, and what it must not."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Compose, Trained, smallest
from omegaconf import OmegaConf
from PIL import Image

from bayesdiff import pipeline
from bayesdiff.data.spaces import to_uint8
from bayesdiff.laplace import callback
from bayesdiff.report import board, table
from bayesdiff.runs import scores, stages, training
from bayesdiff.runs.setup import Setup
from bayesdiff.storage.artefacts import Artefact, key_of, weights_key
from bayesdiff.uncertainty import Ensemble


@pytest.fixture
def work(monkeypatch) -> Counter:
    """Counts the calls that cost something."""
    calls: Counter = Counter()

    def count(name, real):
        def counted(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        return counted

    for name, owner, attribute in (
        ("train", training, "train"),
        ("pass", callback, "fit_curvature"),
        ("integrate", stages, "integrate"),
        ("maps", Ensemble, "__call__"),
        ("score", scores.FeatureScores, "__call__"),
    ):
        monkeypatch.setattr(owner, attribute, count(name, getattr(owner, attribute)))
    # Drawing takes seconds; the session's finished run has drawn everything once.
    monkeypatch.setattr(board, "write", count("report", lambda *args, **kwargs: []))
    return calls


def arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def test_the_run_folder_holds_every_artefact(trained: Trained):
    for name in (
        ".hydra/config.yaml",
        "checkpoints/last.ckpt",
        "fit.json",
        "run.log",
        trained.curvature.name,
    ):
        assert (trained.folder / name).stat().st_size > 0, name
    assert list((trained.folder / "tensorboard").glob("events.*"))
    assert list((trained.cell / "tensorboard").glob("events.*"))
    assert trained.samples.stat().st_size > 0
    for name in ("metrics.json", ".hydra/config.yaml"):
        assert (trained.cell / name).stat().st_size > 0, name
    figures = {path.stem for path in (trained.cell / "figures").glob("*.png")}
    assert {"samples", "image_and_map", "over_time", "scores", "extremes"} <= figures
    assert not list(trained.output_dir.rglob(".writable"))
    hidden = {path.name for path in trained.output_dir.rglob(".*")}
    assert hidden == {".hydra", ".locks"}


def test_a_number_carries_its_conditions(trained: Trained):
    record = json.loads((trained.cell / "metrics.json").read_text())
    metrics, settings = record["metrics"], record["settings"]
    assert metrics == trained.metrics
    wanted = {"fid@12/classifier", "is@12/classifier", "kid@12/classifier", "nfe"}
    assert wanted | {f"real/{name}" for name in wanted if "@" in name} <= set(metrics)
    assert {"laplace/effective_parameters", "laplace/log_evidence"} <= set(metrics)
    assert settings["solver.name"] == "euler" and settings["solver.num_steps"] == 3
    assert settings["uncertainty.name"] == "ensemble" and settings["seed"] == 0
    assert settings["sigma_noise"] > 0  # mle, as a number
    assert metrics["nfe"] == 3 + 1 + 2 * 2  # image, shared first step, two members
    assert record["weights"] == json.loads((trained.folder / "fit.json").read_text())["weights"]


def test_the_stored_configuration_is_resolved_and_composes_the_same_run(trained: Trained):
    for path in (trained.folder, trained.cell):
        text = (path / ".hydra" / "config.yaml").read_text()
        assert "${" not in text
        cfg = OmegaConf.create(text)
        assert (cfg.net.channels, cfg.solver.num_steps) == ([8, 16], 3)


def test_running_again_redoes_nothing(copied: Trained, compose: Compose, work: Counter):
    def times():
        made = (path for path in copied.output_dir.rglob("*.*") if path.name != "run.log")
        files = (path for path in made if ".locks" not in path.parts)
        return {path: path.stat().st_mtime_ns for path in files}

    before = times()
    result = pipeline.run(compose())
    assert work == {}
    assert result.metrics == copied.metrics and result.folder == copied.cell
    assert times() == before


def test_a_new_prior_redoes_the_maps_alone(copied: Trained, compose: Compose, work: Counter):
    result = pipeline.run(compose("laplace.prior_precision=500"))
    assert work == {"maps": 2, "report": 1}
    first, second = arrays(copied.samples), arrays(result.samples)
    assert np.array_equal(first["images"], second["images"])
    assert second["variance"].mean() < first["variance"].mean()


def test_a_new_solver_redoes_images_and_maps(copied: Trained, compose: Compose, work: Counter):
    result = pipeline.run(compose("solver=heun", "solver.num_steps=2"))
    assert work == {"integrate": 1, "maps": 2, "score": 1, "report": 1}
    assert result.folder.name.startswith("heun-ensemble-")


def test_another_pass_over_the_data_is_made_anew(copied: Trained, compose: Compose, work: Counter):
    pipeline.run(compose("laplace.draws=2"))
    assert work == {"pass": 1, "maps": 2, "report": 1}
    pipeline.run(compose("laplace.draws=2"))
    assert work == {"pass": 1, "maps": 2, "report": 1}


def test_words_and_the_numbers_they_stand_for_are_one_cell(
    copied: Trained, compose: Compose, work: Counter
):
    settings = json.loads((copied.cell / "metrics.json").read_text())["settings"]
    result = pipeline.run(compose(f"laplace.sigma_noise={settings['sigma_noise']!r}"))
    assert work == {} and result.folder == copied.cell


@pytest.mark.parametrize(
    "broken",
    ["metrics.json", "samples-*.npz", "fit.json", "images-*.npz", "curvature-*"],
)
def test_a_missing_artefact_is_made_again(
    broken: str, copied: Trained, compose: Compose, work: Counter
):
    """Whatever is deleted comes back, and everything else stays."""
    paths = [*copied.folder.glob(broken), *copied.cell.glob(broken)]
    assert len(paths) == 1
    before = paths[0].read_bytes()
    paths[0].unlink()
    result = pipeline.run(compose())
    assert result.metrics == copied.metrics
    if broken in ("samples-*.npz", "images-*.npz"):
        new, old = arrays(paths[0]), copied.output_dir / "old.npz"
        old.write_bytes(before)
        assert all(np.array_equal(value, new[name]) for name, value in arrays(old).items())
    expected = {
        "metrics.json": {"report": 1},
        "samples-*.npz": {"maps": 2},
        "fit.json": {},  # the checkpoint says that all epochs are done
        "images-*.npz": {"integrate": 1},
        "curvature-*": {"pass": 1},
    }
    assert work == expected[broken]


def test_half_written_arrays_are_made_again(copied: Trained, compose: Compose, work: Counter):
    path = copied.samples
    path.write_bytes(path.read_bytes()[:500])
    pipeline.run(compose())
    assert work == {"maps": 2}
    assert len(arrays(path)["images"]) == 4


def prepared(cfg):
    """A run with its trained weights, and the solver."""
    this, solver, _, laplace = pipeline.prepare(cfg)
    pipeline.fit(this, laplace)
    this.model.eval()
    return this, solver


def test_the_same_images_for_every_batch_size(copied: Trained, compose: Compose):
    made = {}
    for size in (12, 5, 1):
        this, solver = prepared(compose(f"metrics.batch_size={size}"))
        path = copied.output_dir / f"{size}.npz"
        made[size] = stages.make_images(this, solver, 12, Artefact(path, str(size))).int()
    # Different batch sizes round differently in float32, which may tip a uint8 over.
    for size in (5, 1):
        assert (made[size] - made[12]).abs().max() <= 1
        assert (made[size] != made[12]).float().mean() < 0.01


def test_maps_belong_to_the_images_that_are_scored(trained: Trained):
    samples = arrays(trained.samples)
    (path,) = trained.folder.glob("images-*.npz")
    scored = torch.from_numpy(arrays(path)["images"][:4]).int()
    shown = to_uint8(torch.from_numpy(samples["images"])).int()
    assert (shown - scored).abs().max() <= 1
    assert (shown != scored).float().mean() < 0.01
    assert samples["labels"].tolist() == [0, 1, 2, 3]
    assert (samples["variance"] >= 0).all() and samples["variance"].any()


def test_another_seed_makes_other_images(copied: Trained, compose: Compose, work: Counter):
    fixed = ["fit=false", f"ckpt_path={copied.checkpoint}", "metrics.num_images=0"]
    first = pipeline.run(compose(*fixed, "seed=1"))
    second = pipeline.run(compose(*fixed, "seed=2"))
    one, two = (arrays(result.samples)["images"] for result in (first, second))
    assert np.abs(one - two).mean() > 0.1
    assert work["train"] == 0


def test_sampling_leaves_the_weights_alone(copied: Trained, compose: Compose, work: Counter):
    this, solver, estimator, laplace = pipeline.prepare(compose())
    before = pipeline.fit(this, laplace)
    this.model.eval()
    posterior = laplace.fit(this.model, this.data.data)
    path = copied.output_dir / "new.npz"
    stages.make_images(this, solver, 6, Artefact(path, "new"))
    stages.make_maps(Setup(this, solver, estimator, posterior, before), Artefact(path, "maps"))
    assert work["pass"] == 0 and work["maps"] == 2
    assert weights_key(this.model) == before


def test_a_checkpoint_taken_as_it_is(trained: Trained, compose: Compose, work: Counter, tmp_path):
    """fit=false on a copied checkpoint: the same weights, curvature and maps, no training."""
    copy = tmp_path / "elsewhere" / "model.ckpt"
    copy.parent.mkdir()
    copy.write_bytes(trained.checkpoint.read_bytes())
    result = pipeline.run(
        compose("fit=false", f"ckpt_path={copy}", f"run_dir={tmp_path / 'mine'}")
    )
    assert work["train"] == 0 and work["pass"] == 1
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["weights"] == json.loads((trained.folder / "fit.json").read_text())["weights"]
    assert result.folder.parent == tmp_path / "mine"
    assert result.folder.name == trained.cell.name
    assert result.metrics == pytest.approx(trained.metrics, rel=1e-6)


def test_fit_false_reads_this_runs_own_checkpoint_as_last(
    copied: Trained, compose: Compose, work: Counter
):
    result = pipeline.run(compose("fit=false", "ckpt_path=last"))
    assert work == {} and result.folder == copied.cell


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_diffusion(solver: str, compose: Compose, work: Counter, tmp_path):
    overrides = ["model=diffusion", f"solver={solver}", "metrics.num_images=0"]
    result = pipeline.run(compose(*overrides))
    assert work["train"] == 1
    samples = arrays(result.samples)
    assert np.isfinite(samples["images"]).all() and (samples["variance"] >= 0).all()
    assert result.settings["model"] == "diffusion"
    assert result.folder.name.startswith(solver)


def test_published_and_guidance(copied: Trained, compose: Compose, work: Counter):
    plain = pipeline.run(compose("uncertainty=published", "metrics.num_images=0"))
    assert work["train"] == work["pass"] == 0
    record = json.loads((plain.folder / "metrics.json").read_text())
    assert record["estimator"].startswith("published")
    guided = pipeline.run(compose("solver.guidance=2", "metrics.num_images=0"))
    one, two = (arrays(result.samples) for result in (plain, guided))
    assert np.array_equal(one["images"], arrays(copied.samples)["images"])
    assert np.abs(one["images"] - two["images"]).max() > 1e-3
    assert guided.metrics["nfe"] == 2 * copied.metrics["nfe"]


def test_what_changes_no_map_makes_no_new_map(copied: Trained, compose: Compose, work: Counter):
    for option in ("uncertainty.batch_size=3", "uncertainty.max_memory=1.5"):
        assert pipeline.run(compose(option)).folder == copied.cell
    assert work == {}


def test_maps_do_not_depend_on_the_memory_they_are_given(
    copied: Trained, compose: Compose, work: Counter
):
    made = {}
    for memory in (4.0, 5e-4):
        cfg = compose(f"uncertainty.max_memory={memory}", "uncertainty.batch_size=4")
        this, solver, estimator, laplace = pipeline.prepare(cfg)
        weights = pipeline.fit(this, laplace)
        this.model.eval()
        posterior = laplace.fit(this.model, this.data.data)
        path = copied.output_dir / f"{memory}.npz"
        setup = Setup(this, solver, estimator, posterior, weights)
        before = work["maps"]
        made[memory] = stages.make_maps(setup, Artefact(path, "key"))
        made[memory, "batches"] = work["maps"] - before
    assert made[4.0, "batches"] == 1 and made[5e-4, "batches"] == 4
    for name in ("images", "variance", "summed"):
        one, other = (getattr(made[memory], name) for memory in (4.0, 5e-4))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_an_estimator_is_made_ready_only_where_maps_are_made(
    copied: Trained, compose: Compose, work: Counter, monkeypatch
):
    folders = []

    def ready(self, starts, posterior, folder=None):
        assert starts([5, 6]).labels.tolist() == [5, 6] and posterior.n_eff > 0
        folders.append(folder)
        return self

    monkeypatch.setattr(Ensemble, "fit", ready)
    pipeline.run(compose())
    assert folders == []
    pipeline.run(compose("uncertainty.seed=1"))
    assert folders == [copied.folder] and work["maps"] == 2


def test_a_folder_of_ones_own_never_mixes_two_predictions_or_paths(
    compose: Compose, work: Counter, tmp_path, monkeypatch
):
    """The same weights, told to predict something else, are another sampler."""
    mine = ["model=diffusion", f"run_dir={tmp_path / 'mine'}", "metrics.num_images=4"]
    first = pipeline.run(compose(*mine))
    again = ["fit=false", f"ckpt_path={first.folder.parent / 'checkpoints' / 'last.ckpt'}"]
    monkeypatch.setattr(training, "require_same_kind", lambda *_: None)
    second = pipeline.run(compose(*mine, *again, "model.prediction=noise"))
    third = pipeline.run(compose(*mine, *again, "path=vp_linear"))
    assert len({result.folder for result in (first, second, third)}) == 3
    assert work["integrate"] == 3 and work["maps"] == 6
    assert len(list((tmp_path / "mine").glob("images-*.npz"))) == 3


def test_requested_times_and_units_are_stored_with_the_maps(
    copied: Trained, compose: Compose, work: Counter
):
    """Images and maps change their units; the numbers in the metrics do not."""
    plain = arrays(copied.samples)
    assert bytes(plain["units"]).decode() == "model" and "states" not in plain
    options = ("uncertainty.times=[0.4,0.9]", "uncertainty.units=unit")
    result = pipeline.run(compose(*options))
    found = arrays(result.samples)
    assert bytes(found["units"]).decode() == "unit"
    np.testing.assert_allclose(found["requested_times"], [2 / 3, 1], rtol=1e-6)
    assert found["states"].shape == found["state_variance"].shape == (2, 4, 1, 8, 8)
    np.testing.assert_allclose(found["images"], (plain["images"] + 1) / 2, atol=1e-6)
    np.testing.assert_allclose(found["variance"], plain["variance"] / 4, rtol=1e-5)
    np.testing.assert_array_equal(found["states"][1], found["images"])
    assert result.metrics == pytest.approx(copied.metrics, rel=1e-5)
    again = pipeline.run(compose(*options))
    assert work["maps"] == 2 and again.metrics == result.metrics


def test_sampler_noise_has_a_number_of_its_own(compose: Compose, work: Counter):
    overrides = ["model=diffusion", "solver=ddpm", "metrics.num_images=0"]
    result = pipeline.run(compose(*overrides))
    stored = arrays(result.samples)["sampler_noise"]
    mean = stored.reshape(4, -1).sum(1).mean()
    assert result.metrics["sampler_noise/mean"] == pytest.approx(mean, rel=1e-5)
    assert "sampler_noise/mean" in [row["metric"] for row in table.summary(result.metrics)]


def test_unconditional_with_scores(copied: Trained, compose: Compose, work: Counter):
    result = pipeline.run(compose("model.num_classes=null"))
    assert work["train"] == 1
    assert "fid@12/classifier" in result.metrics
    assert not [name for name in result.metrics if "class_" in name]
    assert "labels" not in arrays(result.samples)


def test_a_folder_without_labels(compose: Compose, work: Counter, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(20):
        pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{i}.png")
    result = pipeline.run(
        compose(
            "data=folder",
            f"data.root={tmp_path / 'pictures'}",
            "data.batch_size=9",
            "laplace.num_images=null",
            "metrics.num_images=0",
        )
    )
    samples = arrays(result.samples)
    assert samples["images"].shape == (4, 3, 8, 8) and "labels" not in samples
    assert not [name for name in result.metrics if name.startswith("fid")]


def test_the_closing_table(trained: Trained, capsys):
    curves = ("tensorboard --logdir outputs",)
    headlines = {"filtering/best/z@0.8": 3.25}
    metrics = trained.metrics | headlines | {"laplace/block_effective_parameters": 12.5}
    metrics |= {"laplace/block_parameters": 400}
    named = {"uncertainty.name": "ensemble"}
    result = pipeline.Result(
        trained.cell, trained.samples, metrics, named, headlines=headlines, curves=curves
    )
    pipeline.show(result)
    text = capsys.readouterr().out
    for part in (
        "fid@12/classifier",
        "nfe",
        str(trained.cell / "figures"),
        "tensorboard --logdir",
        "filtering/best/z@0.8",
        "12.5 of 400",
        f"{trained.metrics['laplace/effective_parameters']:.4g} of 73",
    ):
        assert part in text
    pipeline.show(pipeline.Result(trained.cell, trained.samples, trained.metrics, named))
    assert "tensorboard" not in capsys.readouterr().out


def test_other_options_are_other_runs(compose: Compose):
    """The run folder follows what the weights depend on, and nothing else."""

    def folder(*overrides: str) -> str:
        return pipeline.build(compose(*overrides)).folder.name

    first = folder()
    same = (
        "trainer.log_every_n_steps=7",
        "solver.num_steps=9",
        "laplace.prior_precision=3",
        "uncertainty.members=9",
    )
    assert folder(*same) == first
    others = {
        folder(option)
        for option in (
            "seed=1",
            "trainer.max_epochs=2",
            "model.optimizer.lr=1e-4",
            "net.dropout=0.1",
            "model.num_classes=null",
            "data.flip=true",
            "data.batch_size=64",
            "callbacks.ema=null",
            "model=diffusion",
        )
    }
    assert len(others | {first}) == 10


def test_keys_and_overrides_are_stable(tmp_path):
    assert key_of(1, "a", {"b": 2, "a": 1}) == key_of(1, "a", {"a": 1, "b": 2})
    assert key_of(1) != key_of("1")
    assert smallest(tmp_path, "seed=3")[-1] == "seed=3"


def test_colleagues_can_read_every_artefact(trained: Trained):
    os.umask(mask := os.umask(0))
    kinds = (".safetensors", ".npz", ".json", ".yaml")
    found = [path for path in trained.folder.rglob("*") if path.suffix in kinds]
    assert any(path.suffix == ".safetensors" for path in found)
    assert {path.stat().st_mode & 0o777 for path in found} == {0o666 & ~mask}
