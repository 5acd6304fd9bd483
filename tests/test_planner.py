"""The dry run: states against a real run, times that finished runs have taken, nothing written."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, smallest
from test_conditions import SOURCE
from test_spaces import POINTS

from bayesdiff import pipeline
from bayesdiff.report import board, table
from bayesdiff.runs.stage_costs import NAME
from bayesdiff.storage.artefacts import read_json
from bayesdiff.sweeps.plan import dry_run, planner
from bayesdiff.sweeps.plan.cells import look


def states(cell):
    return {work.stage: work.made for work in cell.works}


@pytest.fixture
def plan(compose, monkeypatch):
    """Rows of the plan of these cells, and its closing table."""

    def show(*cells):
        tables = []
        monkeypatch.setattr(table, "show", lambda title, rows, *_: tables.append(list(rows)))
        planner.show([(words, compose(*words)) for words in cells])
        rows, told = tables
        return rows, {row["what"]: row["value"] for row in told}

    return show


def rewrite(run, change):
    """Change every record of a run; None leaves one out."""
    path = run.folder / NAME
    lines = [change(json.loads(line)) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines if line))


@pytest.fixture
def timed(copied):
    """A finished run whose stages took 1, 2, 3, ... seconds by their place in ``STAGES``."""
    stages = planner.STAGES

    def numbered(line):
        place = 1 + stages.index(line["stage"])
        return line | {"seconds": float(place), "memory": place / 4}

    rewrite(copied, numbered)
    return copied


SECONDS = {stage: f"{place} s" for place, stage in enumerate(planner.STAGES, 1)}


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
    assert all(states(look([], cfg)).values())
    losses = [
        (copied.cell / "metrics.json", {"report"}),
        (copied.samples, {"maps"}),
    ]
    for path, lost in losses:
        path.rename(copied.cell / "away")
        found = states(look([], cfg))
        assert {stage for stage, made in found.items() if not made} == lost
        (copied.cell / "away").rename(path)
    next(copied.folder.glob("scores-*.json")).unlink()
    next(copied.folder.glob("images-*.npz")).unlink()
    assert {s for s, made in states(look([], cfg)).items() if not made} == {"images", "scores"}
    (copied.curvature).unlink()
    found = states(look([], cfg))
    assert found["training"] and not any(found[s] for s in ("curvature", "maps", "report"))
    shutil.rmtree(copied.folder)
    shutil.rmtree(copied.output_dir / "cache")
    assert not any(states(look([], cfg)).values())


def test_a_finished_run_with_a_wider_posterior_is_made(copied, compose):
    cfg = compose("laplace.subset=last_block", "metrics.num_images=0")
    found = states(look([], cfg))
    assert found["curvature"] and not any(found[s] for s in ("block", "maps", "report"))
    pipeline.run(cfg)
    assert all(states(look([], cfg)).values())
    next(copied.folder.glob("block-*")).unlink()
    assert [s for s, made in states(look([], cfg)).items() if made] == ["training", "curvature"]


def test_other_settings_of_a_finished_run_share_what_they_can(copied, compose):
    other = states(look([], compose("laplace.prior_precision=7")))
    assert {s for s, made in other.items() if not made} == {"maps", "report"}
    seed = states(look([], compose("seed=1")))
    assert {s for s, made in seed.items() if made} == {"classifier"}
    broken = copied.samples
    broken.write_bytes(broken.read_bytes()[:100])
    assert not states(look([], compose()))["maps"]


def test_an_interrupted_training_has_the_rest_to_go(timed, compose, plan):
    (timed.folder / "fit.json").unlink()
    (training, *_) = look([], compose()).works
    assert not training.made and training.share == 0  # one epoch of one
    ((row,), _) = plan([])
    assert row["training"] == "0 s to go"


def test_a_refiner_is_a_stage_of_its_own_and_is_kept(copied, compose):
    words = ("uncertainty=refined", "metrics.num_images=0")
    assert states(look([], compose(*words)))["refiner"] is False
    pipeline.run(compose(*words))
    assert all(states(look([], compose(*words))).values())
    next(copied.folder.glob("samples-euler-refined-*")).unlink()
    found = states(look([], compose(*words)))
    assert [stage for stage, made in found.items() if not made] == ["maps"]
    stages = [json.loads(line)["stage"] for line in (copied.folder / NAME).open()]
    assert stages.count("refiner") == 1 and stages.count("maps") == 2


def test_a_plan_quotes_what_finished_runs_took(timed, plan):
    """A run of another seed has all to make, and each stage takes what the finished one took."""
    (row,), told = plan(["seed=1"])
    made = {stage: text for stage, text in row.items() if stage in SECONDS}
    assert made.pop("classifier") == "made"
    assert made == {stage: SECONDS[stage] for stage in made} and len(made) == 6
    assert row["time"] == "35 s" and row["memory"] == "3.2 GiB"  # the sum, and the most
    assert told["time, 1 worker"] == row["time"] and not {"scaled", "not known"} & told.keys()


def test_a_plan_quotes_numbers_that_were_really_measured(copied, plan):
    lines = [json.loads(line) for line in (copied.folder / NAME).read_text().splitlines()]
    by_stage = {line["stage"]: line for line in lines}
    (row,), _ = plan(["laplace.prior_precision=7"])
    maps, report = by_stage["maps"], by_stage["report"]
    assert row["maps"] == planner.duration(maps["seconds"]) != "0 s"
    assert row["time"] == planner.duration(maps["seconds"] + report["seconds"])
    assert row["memory"] == f"{max(maps['memory'], report['memory']):.2g} GiB"


@pytest.mark.parametrize(
    "elsewhere", [{"device": "another"}, {"processes": 2}, {"threads": 77}], ids=str
)
def test_a_run_from_another_place_says_nothing(elsewhere, timed, plan):
    rewrite(timed, lambda line: line | elsewhere)
    (row,), told = plan(["laplace.prior_precision=7"])
    assert row["maps"] == row["report"] == row["time"] == row["memory"] == "not known"
    assert told["not known"] == "maps, report: no finished run of this kind yet"


@pytest.mark.parametrize(
    ("word", "stages"),
    [
        ("uncertainty.members=3", {"maps"}),
        ("uncertainty.skip_interval=2", {"maps"}),
        ("solver.num_steps=4", {"images", "maps", "report"}),
        ("laplace.draws=2", {"curvature"}),
        ("metrics.batch_size=5", {"images"}),
        ("metrics.num_images=13", {"scores", "report"}),
        ("net.channels=[8,24]", {"training", "curvature", "images", "maps"}),
        ("trainer.gradient_clip_val=2", {"training"}),
        ("callbacks.ema.decay=0.5", {"training"}),
    ],
)
def test_a_run_with_other_options_says_nothing(word, stages, timed, plan):
    (row,), told = plan([word, "seed=1"])
    unknown = {stage for stage, text in row.items() if text == "not known" and stage in SECONDS}
    assert unknown == stages
    assert set(told["not known"].partition(":")[0].split(", ")) == stages


def test_values_that_compute_no_more_are_no_other_options(timed, plan):
    words = ["laplace.prior_precision=7", "laplace.sigma_noise=0.3", "model.optimizer.lr=0.5"]
    assert "not known" not in plan([*words, "seed=3", "uncertainty.seed=4"])[1]


def test_what_is_linear_is_scaled_and_says_so(timed, plan):
    (row,), told = plan(["trainer.max_epochs=3", "uncertainty.num_images=12",
                         "laplace.num_images=96", "metrics.num_images=24"])  # fmt: skip
    assert row["training"] == "3 s" and row["maps"] == "27 s"
    assert row["curvature"] == "3 s" and row["images"] == "8 s"
    assert row["scores"] == row["report"] == "not known"
    assert told["scaled"] == (
        "training by steps, curvature by images, images by images, maps by images, "
        "from runs of another size"
    )


def test_maps_of_an_estimator_with_a_start_of_its_own_are_not_scaled(copied, compose, plan):
    words = ["uncertainty=linearised", "uncertainty.skip_interval=2", "metrics.num_images=0"]
    pipeline.run(compose(*words))
    (row,), _ = plan([*words, "laplace.prior_precision=7"])
    assert row["maps"] != "not known"
    (row,), _ = plan([*words, "uncertainty.num_images=12"])
    assert row["maps"] == "not known"


def test_of_several_runs_the_longest_of_equal_size_counts(timed, plan):
    path = timed.output_dir / "another" / NAME
    path.parent.mkdir()
    (maps,) = (line for line in map(json.loads, (timed.folder / NAME).open())
               if line["stage"] == "maps")  # fmt: skip
    others = [
        maps | {"seconds": 60.0},
        maps | {"seconds": 2.0},
        maps | {"seconds": 999.0, "amount": 8},
    ]
    path.write_text("".join(json.dumps(each) + "\n" for each in others) + '{"stage": "ma')
    assert plan(["laplace.prior_precision=7"])[0][0]["maps"] == "60 s"
    assert plan(["uncertainty.num_images=8"])[0][0]["maps"] == "17 min"


def test_a_study_is_listed_and_nothing_is_said_of_its_time(copied, compose, plan):
    words = ["experiment=filtering", "~filtering.maps.published"]
    (row,), told = plan(words)
    assert row["filtering"] == "not known" and told["not recorded"].startswith("filtering: ")
    assert row["time"].endswith(" or more")
    assert list(row)[-4:] == ["filtering", "report", "time", "memory"]


@pytest.mark.parametrize(
    "more",
    [
        POINTS,
        ("space=rotation",),
        (SOURCE, "condition=embedding"),
        ("model=diffusion", "solver=ddim", "path=vp_per_pixel"),
    ],
    ids=["points", "latents", "embedding", "per pixel"],
)
def test_no_kind_of_data_condition_or_path_is_beyond_a_plan(more, compose, plan, monkeypatch):
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    words = [*more, "metrics.num_images=20"]
    ((row,), _) = plan(words)
    assert "refused" not in row and "not known" in row["maps"] and "made" not in row.values()
    pipeline.run(compose(*words))
    cell = look([], compose(*words))
    assert all(states(cell).values()) and len(cell.works) >= 6
    ((row,), _) = plan([*words, "laplace.prior_precision=7"])
    assert row["training"] == "made" and row["maps"].endswith(" s")


def test_cells_share_trainings_and_name_who_makes_them(compose, capsys):
    values = ("1", "10", "-1")
    given = [
        ([f"laplace.prior_precision={v}"], compose(f"laplace.prior_precision={v}")) for v in values
    ]
    errors = planner.show(given)
    assert errors == [
        "cell 2: laplace.prior_precision must be positive and finite, got -1; give a number "
        "above 0, or evidence"
    ]
    shown = capsys.readouterr().out
    second = next(line for line in shown.splitlines() if line.startswith("│    1 "))
    assert second.count("with cell 0") == 5  # training, curvature, images, classifier, scores
    assert "3: 0 made before, 1 refused" in shown and "1: 1 to be made" in shown


def test_a_single_dry_run_writes_nothing_and_says_that_it_knows_nothing(compose, tmp_path, capsys):
    folder = tmp_path / "nothing"
    dry_run.one(compose(f"output_dir={folder}", "dry_run=true"))
    assert not folder.exists() and not list(tmp_path.iterdir())
    shown = capsys.readouterr().out
    assert "training, curvature, images, classifier, scores, maps, report: no finished" in shown
    assert "GiB" not in shown
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.00123, "0.0012 s"), (5.26, "5.3 s"), (99.4, "99 s"), (99.6, "1.7 min"),
        (300, "5 min"), (5998, "1.7 h"), (7200, "2 h"), (1e6, "280 h"),
    ],
)  # fmt: skip
def test_durations_are_rough(seconds, text):
    assert planner.duration(seconds) == text
