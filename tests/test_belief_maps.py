"""Maps of Bayesian flow networks: what serves them, and their sensitivities to the last one."""

import pytest
import torch
from test_bayesian_flow import DOUBLE
from test_bound_curvature import bfn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.head import head_matrix
from bayesdiff.likelihoods import Bernoulli, Classes, Gaussian
from bayesdiff.solvers import DDIM, BayesianUpdate, DPMSolverPP2M, integrate
from bayesdiff.uncertainty import Ensemble, starts_of
from bayesdiff.uncertainty.sensitivities.linearised import follow
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS

BFN = ("model=bfn", "data=binary_digits")


def test_drawn_values_have_an_ensemble_by_itself_which_the_record_names(compose):
    run, _, estimator, _ = pipeline.prepare(compose(*BFN, "uncertainty=auto"))
    assert isinstance(estimator, Ensemble) and estimator.members == 16
    assert run.instead_of == "refined, which this run cannot have"
    assert run.cfg.uncertainty["_target_"] == "bayesdiff.uncertainty.Ensemble"


@pytest.mark.parametrize("name", ["linearised", "refined", "published", "total_variance"])
def test_what_needs_a_derivative_is_refused_before_any_work(name, compose):
    with pytest.raises(UserError, match=r"use .*uncertainty=ensemble$"):
        pipeline.prepare(compose(*BFN, f"uncertainty={name}"))
    if name in ("linearised", "refined"):  # the others are for outputs that are the prediction
        mean = "model.likelihood.sampled=false"
        assert pipeline.prepare(compose(*BFN, f"uncertainty={name}", mean))[2].name == name
        with pytest.raises(UserError, match=r"final=mean"):
            pipeline.prepare(
                compose(*BFN, f"uncertainty={name}", mean, "model.likelihood.final=sample")
            )


def test_where_values_are_drawn_is_no_matter_of_the_training(compose):
    keys = {
        pipeline.prepare(compose(*BFN, "uncertainty=ensemble", *options))[0].key
        for options in ((), ("model.likelihood.final=mode",), ("model.likelihood.sampled=false",))
    }
    assert len(keys) == 1


CASES = {
    "binary": (Bernoulli(), "data", BayesianUpdate),
    "binary-ddim": (Bernoulli(), "data", DDIM),
    "binary-2m": (Bernoulli(), "data", DPMSolverPP2M),
    "classes": (Classes(3), "data", DDIM),
    "numbers": (Gaussian(), "v", DPMSolverPP2M),
}


@pytest.mark.parametrize("name", CASES)
def test_sensitivities_go_through_the_last_prediction(name):
    """Against differences of whole trajectories with the weights moved, the noise the same."""
    likelihood, prediction, solver = CASES[name]
    model = bfn(likelihood, prediction)
    channels = likelihood.channels(1) if likelihood.discrete else 1
    starts = starts_of(model, solver(4), 0, (channels, 4, 4), torch.device("cpu"))
    head = model.net.head
    delta = torch.randn(head_matrix(head).shape, generator=torch.Generator().manual_seed(5))
    delta = 0.1 * delta.to(DOUBLE)
    found = follow(starts([0, 1]), delta[None], 1.0, PRODUCTS["exact"]).sensitivities[0]

    def sample(size):
        start, moved = starts([0, 1]), size * delta
        with torch.no_grad():
            head.weight += moved[:, :-1].view_as(head.weight)
            head.bias += moved[:, -1]
            made = integrate(start.field(), start.steps(), start.initial(), start.draw)
            head.weight -= moved[:, :-1].view_as(head.weight)
            head.bias -= moved[:, -1]
        return made

    truth = (sample(0.01) - sample(-0.01)) / 0.02
    assert float(found.abs().max()) > 0.01
    torch.testing.assert_close(
        found.to(truth), truth, rtol=0.02, atol=0.02 * float(truth.abs().max())
    )
