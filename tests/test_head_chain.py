"""The head's posterior against chains: figures of known draws, and the command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Compose
from hand import curvature_of
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report.pictures import Pictures
from bayesdiff.runs.setup import Setup
from bayesdiff.studies.head_chain import head_chain
from bayesdiff.studies.head_chain.comparison import ChainTest, measure, sds
from bayesdiff.studies.head_chain.head_chain import HeadChain
from bayesdiff.studies.study import Place, study_key

# All that keys read of one.
POSTERIOR = SimpleNamespace(curvature=SimpleNamespace(source="x"), settings=[])

SMALL = (
    "experiment=head_chain",
    "uncertainty.members=2",
    "head_chain.num_images=12",
    "head_chain.chains=4",
    "head_chain.draws=12",
    "head_chain.warmup=2",
)


def known(scale=1.0, outputs=2):
    """Independent draws around the optimum, ``scale`` times as wide as the posterior."""
    torch.manual_seed(0)
    head = nn.Conv2d(2, outputs, 1).double().requires_grad_(False)
    features = torch.randn(12, 2, 3, 3, dtype=torch.float64)
    residual = head(features) - torch.randn(12, outputs, 3, 3, dtype=torch.float64)
    posterior = HeadPosterior.fit(curvature_of(head, features, residual), sigma_noise=0.5)
    drawn = posterior.draw(200 * 40, torch.Generator().manual_seed(3)) - posterior.curvature.mean
    draws = posterior.optimum + scale * drawn.unflatten(0, (200, 40))
    return ChainTest(posterior, draws, torch.ones(40), 1.0, features[None, :3]), head


def test_draws_of_the_posterior_itself_agree_with_it_and_wider_ones_do_not():
    found, wide = (measure(*known(scale)) for scale in (1.0, 1.25))
    assert found["full.sd_error_max"] < 6 * found["full.sd_error_of_the_chain"]
    assert found["ks_max"] < 0.03 and found["ks_p_min"] > 1e-4
    assert found["mahalanobis.mean_over_weights"] == pytest.approx(1, abs=0.03)
    assert found["full.covariance_error"] < 2 * found["full.covariance_error_expected"]
    assert found["weights"] == 6 and found["chain.draws"] == 8000
    assert wide["full.sd_ratio_median"] == pytest.approx(1 / 1.25, rel=0.03)
    assert wide["full.predictive_sd_ratio_median"] == pytest.approx(1 / 1.25, rel=0.1)
    assert wide["ks_p_min"] < 1e-6
    assert wide["mahalanobis.mean_over_weights"] == pytest.approx(1.25**2, rel=0.03)
    # Of independent draws, each weight's own count is about their number.
    assert found["chain.ess_median"] == pytest.approx(8000, rel=0.2)
    # The worst weight by hand.
    test, _ = known()
    own = test.draws.flatten(0, 1).flatten(1).std(0)
    worst = max(abs(a / b - 1) for a, b in zip(sds(test.posterior), own, strict=True))
    assert found["full.sd_error_max"] == pytest.approx(float(worst))


def test_the_loss_is_the_negative_log_posterior_of_the_pass(compose: Compose):
    """Against a quadratic around the optimum of the closed form, for a diffusion model."""
    run = pipeline.prepare(compose(*SMALL, "model=diffusion"))[0]
    run.model.eval()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        real = head_chain.loss_of

        def watched(*given):
            seen.append((given[1], real(*given)))
            raise KeyboardInterrupt

        patch.setattr(head_chain, "loss_of", watched)
        with pytest.raises(KeyboardInterrupt):
            place = Place("head_chain", run.folder, "x")
            run.studies["head_chain"]._test(run, place)
    posterior, loss = seen[0]
    best = posterior.optimum
    generator = torch.Generator().manual_seed(0)
    steps = 0.1 * torch.randn(3, *best.shape, generator=generator, dtype=torch.float64)
    got = loss(best + steps) - loss(best[None])
    wanted = torch.einsum("kcp,pq,kcq->k", steps, posterior.precision, steps) / 2
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_the_command_runs_the_chains_once_for_a_diffusion_model(compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    asked = compose(*SMALL, "model=diffusion")
    (folder,) = pipeline.run(asked).studies
    results = json.loads((folder / "results.json").read_text())
    assert results["chain.draws"] == 48 and 0 < results["chain.acceptance"] <= 1
    assert {"full.sd_error_max", "ks_max", "ks_p_min", "diag.sd_ratio_median"} < set(results)
    with np.load(folder / "draws.npz", allow_pickle=False) as arrays:
        assert arrays["draws"].shape[:2] == (12, 4)
        assert arrays["draws"][0, 0].size == results["weights"]
    made = {path.name for path in (folder / "figures").iterdir()}
    assert made == {"posterior_and_chains.png", "captions.json"}
    monkeypatch.setattr(HeadChain, "make", None)
    assert pipeline.run(asked).studies == (folder,)
    # No other solver and no other pass is another chain.
    more = ("solver=ddpm", "laplace.num_images=32", "seed=0")
    assert pipeline.run(compose(*SMALL, "model=diffusion", *more)).studies == (folder,)


BAD_RUNS = [
    (("head_chain.num_images=100000",), ["head_chain.num_images=100000", "training images"]),
    (("laplace.sigma_noise=mle_per_time",), ["laplace.sigma_noise=mle_per_time", "mle"]),
    (("head_chain.draws=10000000",), ["head_chain.draws=10000000", "GiB", "lower"]),
    (
        ("head_chain.chains=2000", "head_chain.num_images=1000"),
        ["head_chain.num_images=1000 of head_chain.chains=2000", "GiB", "lower"],
    ),
    (("trainer=ddp", "trainer.devices=2"), ["trainer.devices=2", "trainer.devices=1"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_RUNS)
def test_what_no_chain_can_follow_is_refused_before_any_work(overrides, words, compose: Compose):
    with pytest.raises(UserError) as caught:
        pipeline.prepare(compose(*SMALL, *overrides))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"num_images": 9}, {"chains": 1}, {"draws": 9}, {"warmup": -1}, {"step": 0}, {"seed": -1}],
)
def test_bad_options_are_refused_in_one_line(options):
    with pytest.raises(UserError, match=f"head_chain.{next(iter(options))}") as caught:
        HeadChain(**options)
    assert "\n" not in str(caught.value)


def test_what_the_network_predicts_along_which_path_is_in_the_key(compose: Compose):
    found = set()
    for overrides in ((), ("model.prediction=data",), ("path=vp_scaled_linear",)):
        run, solver, estimator, _ = pipeline.prepare(
            compose(*SMALL, "model=diffusion", *overrides)
        )
        run.model.load_state_dict({k: 0 * v for k, v in run.model.state_dict().items()})
        at = Setup(run, solver, estimator, POSTERIOR, "x")
        found.add(study_key(at, "head_chain", run.studies["head_chain"]))
    assert len(found) == 3
