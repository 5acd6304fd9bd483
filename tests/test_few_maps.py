"""Few maps are made by the cheaper estimator, whatever the folder holds, and everybody says so."""

import json
import logging

import pytest
import torch
from conftest import Compose
from hand import FLOW

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.report import board, table
from bayesdiff.solvers import Euler, Heun
from bayesdiff.sweeps.plan import planner
from bayesdiff.sweeps.plan.probe import _counted, _posterior, _Stub
from bayesdiff.uncertainty import Ensemble, Linearised, Refined, starts_of
from bayesdiff.uncertainty.few_maps import for_few_maps, training

CPU = torch.device("cpu")


def counting(solver, path=FLOW, prediction="velocity"):
    stub = _Stub(1)
    model = GenerativeModel(stub, path, prediction, torch.optim.SGD, 3).eval()
    return stub, starts_of(model, solver, 0, (1, 8, 8), CPU)


@pytest.mark.parametrize("solver", [Euler(20), Heun(6), Euler(10, guidance=2.0)])
def test_what_the_training_costs_is_what_the_network_is_really_asked(solver):
    stub, starts = counting(solver)
    refined = Refined(train_images=40, epochs=1, derivative="difference")
    _, counted = _counted(refined, stub, starts, _posterior(stub))
    assert training(refined, starts([0])) == pytest.approx(counted, rel=0.05)


@pytest.mark.parametrize("solver", [Euler(20), Heun(6), Euler(10, guidance=2.0)])
def test_what_an_image_costs_is_what_it_reports(solver):
    stub, starts = counting(solver)
    for estimator in (
        Ensemble(members=5),
        Refined(train_images=24, epochs=1, derivative="difference"),
    ):
        ready, _ = _counted(estimator, stub, starts, _posterior(stub))
        nfe = ready(starts([0]), _posterior(stub)).nfe
        assert estimator.evaluations(starts([0])) == pytest.approx(nfe, rel=0.15)


def test_the_cheaper_one_is_taken_on_either_side_of_break_even():
    _, starts = counting(Euler(20))
    start = starts([0])
    asked = Refined(times=[0.5], seed=3, units="unit", few_maps="ensemble")
    each = Ensemble(members=16).evaluations(start) - asked.evaluations(start)
    even = training(asked, start) / each
    assert 150 < even < 400
    few, reason = for_few_maps(asked, start, int(even))
    assert few == Ensemble(members=16, times=[0.5], seed=3, units="unit")
    assert "uncertainty=refined keeps" in reason
    assert for_few_maps(asked, start, int(even) + 1) == (asked, "")


def test_who_sets_an_option_of_the_refiner_means_it():
    _, starts = counting(Euler(20))
    for kept in (
        Refined(), Refined(few_maps="ensemble", budget=2.0), Linearised(),
        Ensemble(members=4),
    ):  # fmt: skip
        assert for_few_maps(kept, starts([0]), 1) == (kept, "")
    with pytest.raises(UserError, match="few_maps='no'; choose ensemble or refined"):
        Refined(few_maps="no")


def test_a_run_with_few_maps_says_what_made_them_everywhere(
    compose: Compose, monkeypatch, caplog, capsys
):
    monkeypatch.setattr(board, "write", lambda *args, **kwargs: [])
    caplog.set_level(logging.INFO, "bayesdiff")
    words = ("uncertainty=auto", "uncertainty.train_images=1000", "uncertainty.epochs=30",
             "metrics.num_images=0")  # fmt: skip
    cell = planner.look(words, compose(*words))
    assert "refiner" not in [work.stage for work in cell.works]
    result = pipeline.run(compose(*words))
    (reason,) = {r.getMessage() for r in caplog.records if "in place of refined" in r.getMessage()}
    assert "since 4 maps take" in reason
    record = json.loads((result.folder / "metrics.json").read_text())
    assert record["estimator"] == "ensemble, 16 members, skip 1"
    assert record["settings"]["uncertainty.name"] == "ensemble"
    assert record["settings"]["uncertainty.instead_of"] == "refined, for few maps"
    assert result.samples.name.startswith("samples-euler-ensemble-")
    monkeypatch.setattr(table, "show", lambda title, rows: shown.extend(rows))
    shown: list = []
    pipeline.show(result)
    (by,) = [row["value"] for row in shown if row["metric"] == "maps by"]
    assert by == "ensemble, in place of refined, for few maps"
    assert list(result.folder.parent.glob("refiner*")) == []


def test_a_study_s_maps_count(compose: Compose):
    words = ("uncertainty=auto", "uncertainty.train_images=1000", "uncertainty.epochs=30")
    cfg = compose(*words, "experiment=filtering", "~filtering.maps.published")
    cfg.filtering.num_images, cfg.filtering.seeds = 100, [0, 1, 2]
    cfg.filtering.keep, cfg.filtering.main_keep = [0.5], 0.5
    assert isinstance(pipeline.prepare(cfg)[2], Refined)
    assert cfg.uncertainty._target_.endswith("Refined")
