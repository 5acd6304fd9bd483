"""What a search looks for: any metric, refused before the first cell where it cannot be."""

import json
import logging
import math

import pytest
from conftest import compose_list
from omegaconf import OmegaConf
from test_launchers import SETTINGS, search

from bayesdiff.checks import UserError
from bayesdiff.storage.artefacts import key_of, write_json
from bayesdiff.sweeps.objective import check_objective, direction_of, value_of
from bayesdiff.sweeps.search import Search

METRICS = {
    "fid@2k/classifier": 12.0, "fid@200/classifier/class_3": 80.0, "real/fid@2k/classifier": 3.0,
    "validation/image_rank_low": 0.1, "validation/image_rank": 0.5,
    "laplace/log_evidence": -7.5, "broken": float("nan"), "filtering/members.joint/z@0.8": 2.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("objective", "value", "direction"),
    [
        ("fid@", 12.0, "minimize"),
        ("fid@200/classifier/class_3", 80.0, "minimize"),
        ("validation/image_rank", 0.5, "maximize"),
        ("laplace/log_evidence", -7.5, "maximize"),
        ("filtering/members.joint/z", 2.5, "maximize"),
        ("filtering/best/fid_gain@0.8", None, "maximize"),
        ("cmmd@", None, "minimize"),
        ("precision@", None, "maximize"),
        ("nfe", None, "minimize"),
    ],
)
def test_a_metric_is_found_by_its_name_or_the_beginning_of_it(objective, value, direction):
    assert value_of(objective, METRICS) == value
    assert direction_of(objective, None) == direction
    assert direction_of(objective, "maximize") == "maximize"


def test_what_has_no_value_has_none():
    assert value_of("broken", METRICS) is None and value_of("fid@", {}) is None


@pytest.mark.parametrize("objective", ["validation/log_ratio", "laplace/sigma_noise"])
def test_a_direction_nobody_knows_is_asked_for(objective):
    with pytest.raises(UserError, match="direction=minimize or direction=maximize"):
        direction_of(objective, None)
    assert direction_of(objective, "minimize") == "minimize"
    with pytest.raises(UserError, match="direction=down"):
        direction_of(objective, "down")


LR = "model.optimizer.lr"


@pytest.mark.parametrize(
    ("objective", "overrides", "keys", "line"),
    [
        ("fid@", ["metrics.num_images=0"], [LR], "metrics.num_images=0"),
        ("validation/image_rank", [], [LR], "uncertainty.validate=true"),
        ("filtering/best/z", [], [LR], "experiment="),
        ("laplace/block_effective_parameters", [], [LR], "laplace.subset=last_block"),
        ("fdi@", [], [LR], "objective=fdi@ is no metric"),
        (None, [], [LR], "objective=None is no metric"),
        ("fid@", [], ["laplace.sigma_noise"], "does not depend on laplace.sigma_noise"),
        ("cmmd@", [], ["laplace", "uncertainty.skip_interval"], "does not depend on laplace, "),
        ("laplace/log_evidence", [], ["solver.grid", "uncertainty"], "does not depend on solver."),
        ("summed_variance/mean", [], ["metrics.num_images"], "does not depend on metrics."),
        ("real/fid@", [], [LR, "net", "seed"], f"does not depend on {LR}, net, seed"),
        ("classifier_test_accuracy", [], ["solver.num_steps"], "does not depend on solver."),
        ("fid@", [], ["+laplace.sigma_noise"], "does not depend on laplace.sigma_noise"),
        ("laplace/log_evidense", [], [LR], "is no metric.*laplace/log_evidence"),
        ("summed_variance/", [], [LR], "is no metric; there are summed_variance/mean"),
        ("net/width", [], [LR], "objective=net/width is no metric"),
    ],
)
def test_a_search_that_finds_nothing_is_refused_before_its_first_cell(
    objective, overrides, keys, line
):
    with pytest.raises(UserError, match=line):
        check_objective(objective, compose_list(overrides), keys)


@pytest.mark.parametrize(
    ("objective", "overrides", "keys"),
    [
        ("fid@", [], [LR, "seed", "solver"]),
        ("fid@", ["metrics.num_images=0"], ["metrics.num_images"]),
        ("validation/image_rank", ["uncertainty.validate=true"], ["laplace.prior_precision"]),
        ("laplace/log_evidence", ["metrics.num_images=0"], ["laplace.sigma_noise", LR]),
        ("filtering/best/z@0.8", ["experiment=filtering"], ["laplace", "uncertainty"]),
        ("laplace/block_parameters", [], ["laplace.subset"]),
        ("summed_variance/mean", [], ["uncertainty.skip_interval"]),
        ("summed_variance/class_3", [], [LR]),
        ("validation/log_ratio_low", ["uncertainty.validate=true"], [LR]),
        ("real/fid@", [], ["data", "metrics.num_images"]),
    ],
)
def test_a_search_that_can_work_passes(objective, overrides, keys, caplog):
    check_objective(objective, compose_list(overrides), keys)
    assert not caplog.text


def test_some_keys_without_effect_are_named(caplog):
    with caplog.at_level(logging.WARNING):
        check_objective("fid@", compose_list([]), ["laplace.sigma_noise", LR])
    assert "fid@ does not depend on laplace.sigma_noise" in caplog.text and LR not in caplog.text


def test_the_highest_is_the_best_of_a_study_that_maximises(tmp_path, monkeypatch):
    monkeypatch.setenv("BAYESDIFF_SWEEP", str(tmp_path))
    given = OmegaConf.create({"metrics": {}, "objective": "laplace/log_evidence"})
    one = Search.of(["laplace.n_eff=interval(0.0, 1.0)"], given, **SETTINGS)

    def launch(cells, first):
        return [-((float(cell[-1].partition("=")[2]) - 0.3) ** 2) for cell in cells]

    one.run(launch)
    record = OmegaConf.load(tmp_path / "best.json")
    values = [trial.value for trial in one.study().trials]
    assert record.value == max(values) and record.objective == "laplace/log_evidence"
    assert record.direction == "maximize"
    with pytest.raises(UserError, match="begun with objective=laplace/log_evidence, not fid@"):
        search(tmp_path, monkeypatch).study()


def test_every_metric_of_a_run_can_be_an_objective(trained):
    metrics = json.loads((trained.cell / "metrics.json").read_text())["metrics"]
    assert {"laplace/n_eff", "summed_variance/sd", "nfe"} <= metrics.keys()
    for name in metrics:
        check_objective(name, compose_list([]), ["data"])


def test_a_trial_without_a_value_says_why(tmp_path, monkeypatch, caplog):
    """A cell that is done and lacks the metric ends the search: all others lack it as well."""
    given = search(tmp_path, monkeypatch, "a=interval(0.0, 1.0)", "c=3", n_trials=2)

    def launch(row):
        def run(cells, first):
            write_json(tmp_path / "cells" / f"{key_of(sorted(cells[0]))}.json", row)
            return [None]

        return run

    with pytest.raises(UserError, match="no metric of trial 0, which is done; it has nfe"):
        given.run(launch({"status": "done", "metrics": {"nfe": 4}}))
    given.run(launch({"status": "done", "metrics": {"fid@1": math.nan}}))
    assert "trial 1: fid@1 is nan, no value to compare" in caplog.text
    assert [trial.state.name for trial in given.study().trials] == ["FAIL", "FAIL"]


def test_the_preset_can_be_left_out():
    words = ["hparams_search=optuna", "~hydra.sweeper.params", "objective=laplace/log_evidence"]
    cfg = compose_list(words, "sweep", return_hydra_config=True)
    assert "params" not in cfg.hydra.sweeper and cfg.direction is None
