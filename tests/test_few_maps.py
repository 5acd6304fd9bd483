"""Few maps are made by the cheaper estimator, whatever the folder holds, and everybody says so."""

import json
import logging

import pytest
import torch
from conftest import Compose
from hand import FLOW
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.head import HeadGeometry, head_matrix
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.models import GenerativeModel
from bayesdiff.report import board, table
from bayesdiff.solvers import Euler, Heun
from bayesdiff.sweeps.plan.cells import look
from bayesdiff.uncertainty import Ensemble, Linearised, Refined, starts_of
from bayesdiff.uncertainty.few_maps import for_few_maps, training

CPU = torch.device("cpu")


class Stub(nn.Module):
    """A network of no cost that counts the images it is evaluated at."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.count = nn.Conv2d(2, 1, 1), 0

    def features(self, x, t, y=None):
        self.count += len(x)
        return torch.cat([x, x.sin()], 1)

    def fold(self, output):
        return output

    def forward(self, x, t, y=None):
        return self.head(self.features(x, t, y))


def counting(solver):
    """Such a network, starts with it, and a posterior of its head: no count depends on it."""
    stub = Stub()
    model = GenerativeModel(stub, FLOW, "velocity", torch.optim.SGD, 3).eval()
    geometry, mean = HeadGeometry.of(stub.head), head_matrix(stub.head)
    gram = 100 * torch.eye(geometry.size, dtype=torch.float64)
    posterior = HeadPosterior.fit(
        Curvature(gram, 100, 1, 1.0, 100, mean, "", geometry),
        structure="full", sigma_noise=1.0, prior_precision=1.0, n_eff=None, rank=None,
    )  # fmt: skip
    return stub, starts_of(model, solver, 0, (1, 8, 8), CPU), posterior


@pytest.mark.parametrize("solver", [Euler(20), Heun(6), Euler(10, guidance=2.0)])
def test_what_the_training_costs_is_what_the_network_is_really_asked(solver):
    stub, starts, posterior = counting(solver)
    refined = Refined(train_images=40, epochs=1, derivative="difference")
    refined.fit(starts, posterior)
    assert training(refined, starts([0])) == pytest.approx(stub.count, rel=0.05)


@pytest.mark.parametrize("solver", [Euler(20), Heun(6), Euler(10, guidance=2.0)])
def test_what_an_image_costs_is_what_it_reports(solver):
    _, starts, posterior = counting(solver)
    for estimator in (
        Ensemble(members=5),
        Refined(train_images=24, epochs=1, derivative="difference"),
    ):
        nfe = estimator.fit(starts, posterior)(starts([0]), posterior).nfe
        assert estimator.evaluations(starts([0])) == pytest.approx(nfe, rel=0.15)


def test_the_cheaper_one_is_taken_on_either_side_of_break_even():
    _, starts, _ = counting(Euler(20))
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
    _, starts, _ = counting(Euler(20))
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
    cell = look(words, compose(*words))
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
