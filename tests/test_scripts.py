"""Every script in experiments/ at the smallest size, unless its study has a test of its own."""

import importlib
import json
import re
import sys
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK_CLASSIFIER, ROOT, Trained, compose_list, smallest

from bayesdiff.checks import UserError
from bayesdiff.report.pictures import Pictures
from bayesdiff.studies.script import Asked
from bayesdiff.uncertainty import Ensemble, Published

EXPERIMENTS = ROOT / "experiments"
# Where the other scripts are run.
ELSEWHERE = {
    "distortions": "test_studies",
    "skip-interval": "test_studies",
    "filtering": "test_filtering_study",
    "known-corruption": "test_corruption",
    "guarantee": "test_guarantee_script",
}


@pytest.fixture
def script(monkeypatch, tmp_path, without_pdf):
    """``script(study)``: its run.py, writing into ``tmp_path / "study"``."""
    before = set(sys.modules)

    def load(study):
        monkeypatch.syspath_prepend(str(EXPERIMENTS / study))
        monkeypatch.setattr(*QUICK_CLASSIFIER)
        monkeypatch.setattr(Pictures, "every", lambda *_: ())
        run = importlib.import_module("run")
        folder = tmp_path / "study"
        folder.mkdir()
        monkeypatch.setattr(run, "HERE", folder, raising=False)
        return run

    yield load
    for name in set(sys.modules) - before:
        place = getattr(sys.modules[name], "__file__", None) or ""
        if place.startswith(str(EXPERIMENTS)):
            del sys.modules[name]


def results(tmp_path):
    return json.loads((tmp_path / "study" / "results.json").read_text())


def test_every_script_is_run_by_a_test():
    scripts = {path.parent.name for path in EXPERIMENTS.glob("*/run.py")}
    here = (ROOT / "tests" / "test_scripts.py").read_text()
    for name in scripts - ELSEWHERE.keys():
        assert f'script("{name}")' in here, name
    for name, test in ELSEWHERE.items():
        assert f'"{name}"' in (ROOT / "tests" / f"{test}.py").read_text(), name


def test_retraining(script, tmp_path, monkeypatch):
    run = script("retraining")
    bench, gather = (importlib.import_module(name) for name in ("bench", "gather"))
    networks = importlib.import_module("networks")
    tiny = ["net=tiny", "trainer.max_epochs=2", "trainer.limit_train_batches=2"]
    monkeypatch.setitem(networks.DATA, "digits", [*tiny, "trainer.limit_val_batches=1"])
    monkeypatch.setitem(bench.IMAGES, "digits", 16)
    for place in (networks, bench):
        monkeypatch.setattr(place, "STORE", tmp_path / "store")
    for name, value in (("REFERENCE", range(5)), ("EXTRA", (5,)), ("WITH_DROPOUT", ())):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "MEMBERS", 2)
    run.main(["digits_flow", "seed=0", "method=head", "method=all"])
    monkeypatch.setattr(gather, "HERE", tmp_path / "study")
    gather.main()
    found = results(tmp_path)
    for method in ("head", "all", "all_calibrated", "two_trainings"):
        assert found[f"digits_flow.{method}.size"] > 0
    assert found["best.size"] == found["digits_flow.all.size"]
    assert (tmp_path / "study" / "retraining.png").is_file()
    length, counts = (importlib.import_module(name) for name in ("length", "counts"))
    for module in (length, counts):
        monkeypatch.setattr(module, "HERE", tmp_path / "study")
        monkeypatch.setattr(module, "REFERENCE", range(4))
    length.main(["epochs=2", "epochs=120"])  # the usual one is there
    assert "| 120 |" in (tmp_path / "study" / "length-digits_flow.md").read_text()
    counts.main(["digits_flow", "share=1", "share=0.01"])
    sizes = json.loads((tmp_path / "study" / "counts.json").read_text())["digits_flow"]
    assert sizes["0.01"]["size"] > sizes["1"]["size"]  # fewer data leave more open


def test_budget(script, tmp_path, monkeypatch):
    run = script("budget")
    networks = importlib.import_module("networks")
    tiny = ["net=tiny", "trainer.max_epochs=2", "trainer.limit_train_batches=2"]
    monkeypatch.setitem(networks.DATA, "digits", [*tiny, "trainer.limit_val_batches=1"])
    for place in (networks, run):
        monkeypatch.setattr(place, "STORE", tmp_path / "store")
    for name, value in (("IMAGES", 8), ("BATCH", 4), ("STEPS", 3)):
        monkeypatch.setattr(run, name, value)
    monkeypatch.setattr(run, "REFERENCE", run.Ensemble(members=4, noise_members=0))
    linear = run.Linearised(draws=2, derivative="difference")
    monkeypatch.setattr(run, "estimators", lambda derivative: {"linearised_2": linear})
    run.main(["digits_flow"])
    assert results(tmp_path)["digits_flow.linearised_2.nfe"] == 3 + 2 * 2
    assert "linearised_2" in (tmp_path / "study" / "table.md").read_text()


CHAINS = ("num_images=12", "chains=4", "draws=12", "warmup=2")


def test_head_chain(script, copied: Trained, tmp_path, monkeypatch, capsys):
    run = script("head-chain")
    monkeypatch.setattr(run, "MODEL", smallest(tmp_path))
    monkeypatch.setattr(run, "DRAWS", (1,))
    run.main([f"head_chain.{option}" for option in CHAINS])
    found = results(tmp_path)
    assert "key" not in found and "headlines" not in found
    assert found["chain.draws"] == 48 and found["run.distance_from_optimum_1_draws"] > 0
    printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[-9:])
    assert float(printed["run.distance_from_optimum"]) > 0
    assert (tmp_path / "study" / "head-chain.png").is_file()


def test_rectify(script, copied: Trained, tmp_path, monkeypatch):
    run = script("rectify")
    small = ["repair.num_images=6", "repair.bootstrap=10", "solver.num_steps=6"]
    monkeypatch.setattr(run, "MODELS", {"digits_flow_short": [*smallest(tmp_path), *small]})
    run.main(["digits_flow_short", "map", "rejection", "seed=0", "repair.draws=2"])
    found = results(tmp_path)
    assert found["overrides"] == ["repair.draws=2"]
    settings = found["models"]["digits_flow_short"]
    assert set(settings) == {"map", "rejection"}
    assert settings["map"]["conditions"]["draws"] == 2
    assert settings["map"]["conditions"]["steps"] == 6  # of the configuration, overrides included
    assert len({row["score"] for row in settings["map"]["picks"]}) == 1
    assert len({row["score"] for row in settings["rejection"]["picks"]}) > 5
    assert "rejection.map_better_than_original" in found
    text = (tmp_path / "study" / "table.md").read_text()
    assert "each score, of alternatives alone" in text
    assert "the score, of alternatives and image" in text
    with pytest.raises(UserError, match=r"repair\.draws=2.*this call has \[\]; give the same"):
        run.main(["digits_flow_short", "map", "seed=0"])


def test_metrics_vs_samples(script, copied: Trained, tmp_path, monkeypatch):
    run = script("metrics-vs-samples")
    monkeypatch.setattr(run, "COMMON", smallest(tmp_path, "metrics.num_images=64"))
    monkeypatch.setattr(run, "SIZES", (16, 32, 64))
    monkeypatch.setattr(run, "SUBSETS", 3)
    monkeypatch.setitem(run.MODELS, "fashion_flow", [])
    monkeypatch.setitem(run.MODELS, "fashion_diffusion", ["model=diffusion", "solver=ddim"])
    run.main([])
    found = results(tmp_path)
    assert found["fashion_flow.fid@32"] > 0 and "real.fid_infinity" in found
    assert (tmp_path / "study" / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "study" / "metrics-vs-samples.png").is_file()


def test_prior_ablation(script, copied: Trained, tmp_path, monkeypatch):
    run = script("prior-ablation")
    monkeypatch.setattr(run, "MODELS", {"digits-flow": smallest(tmp_path)})
    given = ["ablation.sigma_noise=[0.1,1]", "ablation.prior_precision=[1,100]"]
    given.append("ablation.draws=4")
    run.main(["digits-flow", "--to", str(tmp_path / "study"), *given])
    found = results(tmp_path)
    assert found["grid_cost_ratio"] > 0 and found["settings"]["digits-flow"]["parameters"] > 0
    assert (tmp_path / "study" / "over-prior.png").is_file()


def test_propagation(script, copied: Trained, tmp_path, monkeypatch):
    run = script("propagation")
    reference = importlib.import_module("reference")
    monkeypatch.setattr(run, "STORE", tmp_path / "store")
    monkeypatch.setattr(reference, "ROOT", tmp_path)
    compose = lambda model, solver, *more: compose_list(smallest(tmp_path, *more))  # noqa: E731
    monkeypatch.setattr(run, "configure", compose)
    for module in (run, reference):
        monkeypatch.setattr(module, "IMAGES", 4)
    monkeypatch.setattr(run.Setting.maps, "__defaults__", (4,))
    monkeypatch.setattr(run, "SIZES", (2, 5))
    estimators = {
        name: lambda seed, _: Ensemble(members=2, noise_members=0, seed=seed)
        for name in run.ESTIMATORS
    }
    estimators["published"] = lambda seed, _: Published(mc_samples=2, seed=seed)
    monkeypatch.setattr(run, "ESTIMATORS", estimators)
    monkeypatch.setattr(run, "BUDGETS_ON", None)
    monkeypatch.setattr(run, "TURNS", 1)
    few = lambda *given: reference.members(*given, count=41)  # noqa: E731
    monkeypatch.setattr(run, "members", few)
    run.main(["fashion-flow/euler20", "--timing"])
    found = results(tmp_path)
    assert set(found["settings"]) == {"fashion-flow/euler20"}
    assert -1 <= found["default.image_rank"] <= 1 and found["default.cost"] > 0
    made = {path.name for path in (tmp_path / "study").iterdir() if path.suffix != ".pdf"}
    assert made == {"results.json", "table.md", "accuracy-over-cost.png", "captions.json"}


def test_structures(script, tmp_path, monkeypatch):
    run = script("structures")
    small = [*smallest(tmp_path), "trainer.max_epochs=2", "trainer.limit_train_batches=1"]
    monkeypatch.setattr(run, "COMMON", [*small, "laplace.time_bins=2"])
    real, often = run.trained, "callbacks.snapshots.every=1"
    monkeypatch.setattr(run, "trained", lambda *more: real(*more, *[often] * (len(more) > 1)))
    monkeypatch.setattr(run, "STORE", tmp_path / "store")
    monkeypatch.setattr(run, "OTHERS", (1, 2))
    monkeypatch.setattr(run, "REFERENCE", Ensemble(members=2, noise_members=0, seed=9))
    for name, value in {"IMAGES": 6, "BATCH": 6, "MEMBERS": 2, "RANK": 4}.items():
        monkeypatch.setattr(run, name, value)
    for name in ("mc_dropout", "mc_dropout_fresh", "swag"):
        monkeypatch.setitem(run.RIVALS, name, replace(run.RIVALS[name], members=2))
    run.main([0])
    found = results(tmp_path)
    assert {f"{name}.deep_image_rank" for name in run.SHOWN} <= set(found)
    assert -1 <= found["full.image_rank"] <= 1
    assert {path.name for path in (tmp_path / "study").glob("*.md")} == {"table.md"}


def test_benchmark(script, tmp_path, monkeypatch):
    run = script("benchmark")
    monkeypatch.setattr(sys, "argv", ["run.py", "--repeats", "1"])
    row = {"name": "sweep_overhead", "ours_seconds": 2.0, "theirs_seconds": 1.0, "ratio": 2.0}
    monkeypatch.setattr(run.whole, "sweep", lambda repeats: row)  # whole commands
    flow = run.whole.flow
    monkeypatch.setattr(
        run.whole, "flow", lambda channels, **net: flow((8, 8), **net | {"blocks": 1})
    )
    for name in ("curvature_pass", "training"):
        small = {"images": 4} if name == "curvature_pass" else {"batches": 1}
        monkeypatch.setattr(run.whole, name, partial(getattr(run.whole, name), **small))
    for name, value in {"BATCH": 4, "PIXELS": 6, "DRAWS": 4, "GLM_IMAGES": 2}.items():
        monkeypatch.setattr(run.last_layer, name, value)
    monkeypatch.setattr(
        run.last_layer, "measure", partial(run.last_layer.measure, sizes=((8, 1), (8, 3)))
    )
    run.main()
    found = results(tmp_path)
    committed = json.loads((EXPERIMENTS / "benchmark" / "results.json").read_text())
    assert set(found) == set(committed)
    worst = [line["ratio"] for line in found["table"] if line["name"] == "variance_vs_glm"]
    assert len(worst) == 2 and found["variance_vs_glm"] == round(min(worst), 3)


SWEPT = "overrides,fid,seconds\na=1,2.5,{seconds}\na=2,{last},3\n"


@pytest.mark.parametrize("differs", [False, True])
def test_sweep_demo(differs, script, tmp_path, monkeypatch):
    """Its launchers are commands of a minute each; here they only leave their tables."""
    run = script("sweep-demo")

    def command(words, **_):
        (folder,) = [Path(w.split("=", 1)[1]) for w in words if w.startswith("output_dir=")]
        place = folder / "sweeps" / "one"
        place.mkdir(parents=True)
        last = 9.9 if differs and folder.name == "joblib" else 3.5
        (place / "sweep.csv").write_text(SWEPT.format(seconds=len(words), last=last))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", command)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=count().__next__))
    place = tmp_path / "study" / "results.json"
    given = ["run.py", "basic", "joblib", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*given, "--results", str(place)])
    if differs:
        with pytest.raises(SystemExit, match="cell 1: fid is 9.9 by joblib and 3.5 by basic"):
            run.main()
        return
    run.main()
    found = results(tmp_path)
    assert found["sweep_cells"] == 2 and found["sweep_identical_tables"] == ["basic", "joblib"]
    assert "joblib_speedup" in found


def test_the_words_of_a_script():
    words = ["b", "seed=1", "x.y=2", "seed=3", "output_dir=there", "a=[1,2]"]
    asked = Asked.of(words, ("a", "b"), "seed")
    assert (asked.names, asked.options) == (["b"], {"seed": ["1", "3"]})
    assert asked.overrides == ["x.y=2", "output_dir=there", "a=[1,2]"]
    assert asked.recorded == ["a=[1,2]", "x.y=2"]  # where a run is kept changes no number
    with pytest.raises(UserError, match="unknown c; choose from a, b"):
        Asked.of(["c"], ("a", "b"))


def test_results_of_other_overrides_are_not_added_to(tmp_path):
    path = tmp_path / "results.json"
    plain, other = (Asked.of(words, ()) for words in (["output_dir=x"], ["x.y=2"]))
    assert plain.kept(path, "models") == {}
    path.write_text(json.dumps({"models": {"a": 1}}))  # of a time when none was recorded
    assert plain.kept(path, "models") == {"a": 1}
    with pytest.raises(UserError, match=r"holds results of overrides \[\], this call has \['x.y"):
        other.kept(path, "models")
    path.write_text(json.dumps({"models": {"a": 1}, "overrides": ["x.y=2"]}))
    assert other.kept(path, "models") == {"a": 1}
    with pytest.raises(UserError, match="move the file away"):
        plain.kept(path, "models")


@pytest.mark.parametrize("study", ["distortions", "rectify", "skip-interval"])
def test_the_commands_of_a_study_add_to_its_results(study):
    place = EXPERIMENTS / study
    text = (place / "README.md").read_text()
    given = re.findall(rf"^    python experiments/{study}/run\.py(.*)$", text, re.MULTILINE)
    assert given
    for words in map(str.split, given):
        asked = Asked.of(words, words, "seed", "lpips")
        assert asked.kept(place / "results.json", "sets" if study == "distortions" else "models")


def test_three_families(script):
    """Means over seeds, differences of one seed, and scores of rounded samples."""
    run = script("three-families")

    def row(family, seed, fid, grey=0.0):
        scores = {"fid": fid, "precision": 0.1 * seed, "recall": 0.5}
        return {"family": family, "seed": seed, "samples": "rounded", "grey": grey, **scores}

    rows = [row("flow", s, 8.0 + s) for s in (0, 1, 2)] + [row("bfn", s, 7.0) for s in (0, 1, 2)]
    flow, bfn = run.over_seeds(rows)
    assert (flow["fid"], bfn["fid"], flow["seeds"]) == (9.0, 7.0, 3)
    assert flow["fid_low"] < 8 < 10 < flow["fid_high"] and bfn["fid_low"] == bfn["fid_high"] == 7
    (difference,) = run.differences([*rows, row("flow", 3, 0.0, grey=0.5)])
    assert (difference["family"], difference["fid"]) == ("bfn - flow", -2.0)
    assert "| flow | rounded | 9 [" in run.shown([flow, bfn])
    images = torch.tensor([0, 100, 200, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    assert run.rounded(images).flatten().tolist() == [0, 0, 255, 255]
    made = {"fid@2/classifier": 1.0, "precision@2/classifier": 0.5, "recall@2/classifier": 0.25}
    cell = {"metrics": {**made, "real/fid@2/classifier": 9.0}, "settings": {"family": "flow"}}
    own = SimpleNamespace(cfg=SimpleNamespace(seed=4))
    run.scores_of = lambda _: lambda _, given: dict.fromkeys(made, float(given.float().mean()))
    grey, sharp = run.rows_of(cell, own, images)
    assert (grey["fid"], grey["grey"], grey["seed"]) == (1.0, 0.5, 4)
    assert (sharp["fid"], sharp["grey"], sharp["samples"]) == (127.5, 0.0, "rounded")
    tiles = torch.zeros(32, 1, 4, 4)
    drawn = run.picture({"bfn": tiles, "flow_bernoulli": tiles, "mine": tiles})
    titles = [panel.get_title() for panel in drawn.axes]
    assert titles == ["Bayesian flow network", "Flow matching, log-odds", "mine", ""]
