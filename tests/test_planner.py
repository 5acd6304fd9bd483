"""The dry run: counts against real evaluations, states against a real run, nothing written."""

import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, smallest

from bayesdiff import pipeline
from bayesdiff.runs.setup import starts
from bayesdiff.storage.artefacts import read_json
from bayesdiff.sweeps.plan import dry_run, planner
from bayesdiff.sweeps.plan.estimate import Estimates
from bayesdiff.sweeps.plan.probe import Probe, count
from bayesdiff.uncertainty.sensitivities.refined import Refined


def states(cell):
    return {work.stage: work.made for work in cell.works}


@pytest.fixture
def free(monkeypatch):
    """Probes that take no time: a thousandth of a second for everything."""
    for name in ("evaluation", "product", "curvature", "estimator"):
        monkeypatch.setattr(Probe, name, lambda *_: 1e-3)
    monkeypatch.setattr(Probe, "training_step", 1e-3)
    monkeypatch.setattr(Probe, "classifier", (1.0, 1e-3))
    for name in ("_pictures", "_refiner", "_formulas"):
        monkeypatch.setattr(f"bayesdiff.sweeps.plan.estimate.{name}", lambda *_: 1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["uncertainty=ensemble"],
        ["uncertainty=ensemble", "solver.guidance=2"],
        ["uncertainty=ensemble", "model=diffusion", "solver=ddpm"],
        ["uncertainty=ensemble", "uncertainty.skip_interval=3", "solver=heun"],
        ["uncertainty=linearised", "uncertainty.draws=3"],
        ["uncertainty=linearised", "uncertainty.draws=all"],
        ["uncertainty=linearised", "uncertainty.draws=3", "uncertainty.skip_interval=2"],
        ["uncertainty=published"],
        ["uncertainty=total_variance", "uncertainty.skip_interval=2"],
        ["uncertainty=mc_dropout", "uncertainty.members=3"],
        ["uncertainty=refined"],
    ],
    ids=" ".join,
)
def test_counts_are_those_of_the_real_network(overrides, compose):
    run, solver, estimator, laplace = pipeline.prepare(compose(*overrides, "solver.num_steps=6"))
    run.model.eval()
    posterior = laplace.fit(run.model, run.data.data)
    found = count(run, solver, estimator)
    real, seen = run.model.net.features, []

    def features(x, *rest):
        seen.append(len(x))
        return real(x, *rest)

    run.model.net.features = features
    ready = estimator.fit(starts(run, solver), posterior)
    if isinstance(estimator, Refined):
        # Extrapolated from a few images.
        assert found.fit == pytest.approx(sum(seen), rel=0.02)
    else:
        assert found.fit == sum(seen)
    seen.clear()
    with torch.no_grad():
        samples = ready(starts(run, solver)([0, 1]), posterior)
    assert found.map == samples.nfe
    guided = 2 if "solver.guidance=2" in overrides else 1
    assert found.image == guided * solver.num_steps * solver.stages


def test_times_are_evaluations_times_images(compose, free):
    cell = planner.look([], compose("uncertainty.validate=true", "uncertainty.validate_images=3"))
    run, solver, estimator = cell.made_with
    counts = count(run, solver, estimator)
    found = planner.costs_of(cell, Estimates())
    assert found["images"] == pytest.approx(12 * 3 * 1e-3) and counts.image == 3
    assert found["maps"] == pytest.approx(4 * counts.map * 1e-3)
    assert found["validation"] == pytest.approx(3 * counts.check * 1e-3)
    assert counts.check == 3 + 1 + 2 * 32  # image, first features of all members, the rest
    assert found["curvature"] == pytest.approx(64e-3)
    assert found["training"] >= 2e-3 and run.length == (2, 1.0)


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        ([], (2, 1.0)),
        (["trainer.max_epochs=5"], (10, 5.0)),
        (["trainer.limit_train_batches=0.5"], (5, 1.0)),
        (["trainer.max_steps=7"], (2, 1.0)),
        (["trainer.max_steps=7", "trainer.max_epochs=-1"], (7, 3.5)),
        (["trainer.max_epochs=3", "trainer.accumulate_grad_batches=2"], (3, 3.0)),
    ],
    ids=str,
)
def test_optimiser_steps_are_those_of_the_trainer(overrides, steps, compose):
    run = pipeline.prepare(compose(*overrides, "data.batch_size=128"))[0]
    assert run.length == steps


def test_a_finished_run_is_made_and_every_lost_artefact_is_to_be_made(copied, compose):
    cfg = compose("metrics.num_images=12")
    assert all(states(planner.look([], cfg)).values())
    losses = [
        (copied.cell / "metrics.json", {"report"}),
        (copied.samples, {"maps"}),
    ]
    for path, lost in losses:
        path.rename(copied.cell / "away")
        found = states(planner.look([], cfg))
        assert {stage for stage, made in found.items() if not made} == lost
        (copied.cell / "away").rename(path)
    next(copied.folder.glob("scores-*.json")).unlink()
    next(copied.folder.glob("images-*.npz")).unlink()
    assert {s for s, made in states(planner.look([], cfg)).items() if not made} == {
        "images", "scores",
    }  # fmt: skip
    (copied.curvature).unlink()
    found = states(planner.look([], cfg))
    assert found["training"] and not any(found[s] for s in ("curvature", "maps", "report"))
    shutil.rmtree(copied.folder)
    shutil.rmtree(copied.output_dir / "cache")
    assert not any(states(planner.look([], cfg)).values())


def test_a_finished_run_with_a_wider_posterior_is_made(copied, compose):
    cfg = compose("laplace.subset=last_block", "metrics.num_images=0")
    found = states(planner.look([], cfg))
    assert found["training"] and not any(found[s] for s in ("curvature", "maps", "report"))
    pipeline.run(cfg)
    assert all(states(planner.look([], cfg)).values())
    next(copied.folder.glob("block-*")).unlink()
    assert not states(planner.look([], cfg))["curvature"]


def test_other_settings_of_a_finished_run_share_what_they_can(copied, compose):
    other = states(planner.look([], compose("laplace.prior_precision=7")))
    assert {s for s, made in other.items() if not made} == {"maps", "report"}
    seed = states(planner.look([], compose("seed=1")))
    assert {s for s, made in seed.items() if made} == {"classifier"}
    broken = copied.samples
    broken.write_bytes(broken.read_bytes()[:100])
    assert not states(planner.look([], compose()))["maps"]


def test_an_interrupted_training_has_the_rest_to_go(copied, compose):
    (copied.folder / "fit.json").unlink()
    (training, *_) = planner.look([], compose()).works
    assert not training.made and training.share == 0  # one epoch of one


def test_cells_share_trainings_and_name_who_makes_them(compose, free, capsys):
    values = ("1", "10", "-1")
    given = [
        ([f"laplace.prior_precision={v}"], compose(f"laplace.prior_precision={v}")) for v in values
    ]
    errors = planner.show(given, workers=4)
    assert errors == [
        "cell 2: laplace.prior_precision must be positive and finite, got -1; give a number "
        "above 0, or evidence"
    ]
    shown = capsys.readouterr().out
    second = next(line for line in shown.splitlines() if line.startswith("│    1 "))
    assert second.count("with cell 0") == 5  # training, curvature, images, classifier, scores
    assert "3: 0 made before, 1 refused" in shown and "1: 1 to be made" in shown
    assert "time, 4 workers" in shown


def test_work_is_done_once_and_others_wait_for_it():
    shared = [[("training", 10.0), ("a", 1.0)], [("training", 10.0), ("b", 2.0)]]
    assert planner.schedule(shared, 1) == 13
    assert planner.schedule(shared, 2) == 12  # the second waits for the training
    apart = [[("a", 3.0)], [("b", 2.0)], [("c", 2.0)]]
    assert [planner.schedule(apart, n) for n in (1, 2, 3)] == [7, 4, 3]
    assert planner.schedule([], 2) == 0


def test_a_single_dry_run_writes_nothing(compose, free, tmp_path, capsys):
    folder = tmp_path / "nothing"
    dry_run.one(compose(f"output_dir={folder}", "dry_run=true"))
    assert not folder.exists() and not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "training" in shown and "GiB" in shown
    with pytest.raises(SystemExit, match="^error: laplace.prior_precision must be positive"):
        dry_run.one(compose("dry_run=true", "laplace.prior_precision=-1"))


def test_a_sweeps_dry_run_writes_nothing_and_tells_bad_cells(trained, tmp_path):
    copy = trained.copy_to(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    overrides = smallest(tmp_path, "laplace.prior_precision=1,-1", "dry_run=true")
    command = [sys.executable, "sweep.py", "-m", *overrides]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 1 of 2 cells would be refused: cell 1: laplace.prior")
    assert "Traceback" not in done.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert "2: 1 made before, 1 refused" in done.stdout
    assert read_json(copy.cell / "metrics.json")


def test_real_probes_are_positive_and_leave_the_network_alone(compose):
    cell = planner.look([], compose())
    run, solver, estimator = cell.made_with
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    estimates = Estimates()
    costs = planner.costs_of(cell, estimates)
    assert set(costs) == set(states(cell)) and all(0 < value < 60 for value in costs.values())
    assert 0.01 < estimates.memory(run, solver, estimator) < 20
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.00123, "0.0012 s"), (5.26, "5.3 s"), (99.4, "99 s"), (99.6, "1.7 min"),
        (300, "5 min"), (5998, "1.7 h"), (7200, "2 h"), (1e6, "280 h"),
    ],
)  # fmt: skip
def test_durations_are_rough(seconds, text):
    assert planner.duration(seconds) == text
