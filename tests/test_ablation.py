"""Evidence over a grid, maps under every setting from one set of sensitivities, the command."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import test_laplace_torch
import torch
from conftest import Compose, Trained, compose_list
from hand import Hand, curved, model_of, posterior_of, start_of
from hydra.utils import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_posterior import example

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.laplace.evidence_grid import (
    best_settings,
    evidence_curve,
    evidence_grid,
    separate_priors,
)
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.report.evidence import evidence_figure
from bayesdiff.report.layout import chart
from bayesdiff.report.pictures import Pictures
from bayesdiff.solvers import Euler, Heun
from bayesdiff.studies.prior_ablation import figures
from bayesdiff.studies.prior_ablation import maps as grids
from bayesdiff.studies.prior_ablation.ablation import Ablation
from bayesdiff.studies.prior_ablation.bands import Bands, allocate, split
from bayesdiff.uncertainty import Linearised
from bayesdiff.uncertainty.sensitivities.products import PRODUCTS

EXACT = PRODUCTS["exact"]
SIGMAS, TAUS = [0.05, 0.3, 4.0], [1e-2, 1.0, 70.0, 1e6]
STRUCTURES = ("full", "diag", "kron", "prior_only", "empirical_fisher")


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# Evidence


@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
@pytest.mark.parametrize("n_eff", [None, 500.0])
def test_the_grid_has_what_each_posterior_says(structure, n_eff):
    _, _, curvature = example()
    posterior = HeadPosterior.fit(curvature, structure=structure, n_eff=n_eff)
    grid = evidence_grid(posterior, SIGMAS, TAUS)
    for i, sigma in enumerate(SIGMAS):
        for j, tau in enumerate(TAUS):
            cell = replace(posterior, sigma_noise=sigma, prior_precision=tau)
            assert float(grid.log_evidence[i, j]) == pytest.approx(cell.log_evidence(), rel=1e-12)
            effective = pytest.approx(cell.effective_parameters, rel=1e-12)
            assert float(grid.effective_parameters[i, j]) == effective


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_the_grid_has_the_librarys_log_marginal_likelihood(structure):
    torch.set_default_dtype(torch.float64)
    try:
        head, features, target = test_laplace_torch.example("conv")
        posterior = test_laplace_torch.posterior_of(head, features, target, structure)
        fitted = test_laplace_torch.library(head, features, target, structure)
        for sigma, tau in ((0.3, 2.0), (0.8, 40.0)):
            grid = evidence_grid(posterior, [sigma], [tau])
            wanted = fitted.log_marginal_likelihood(torch.tensor([tau]), torch.tensor([sigma]))
            assert float(grid.log_evidence) == pytest.approx(float(wanted), rel=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


def test_effective_parameters_fall_from_all_to_none():
    """T4: d_eff = sum a / (a + tau sigma^2), here with tau at the single eigenvalue."""
    _, _, curvature = example()
    same = replace(curvature, gram=8.0 * torch.eye(len(curvature.gram), dtype=torch.float64))
    posterior = HeadPosterior.fit(same, sigma_noise=2.0)
    size = len(same.gram)
    grid = evidence_grid(posterior, [2.0], [1e-9, 2.0, 6.0, 1e12])
    expected = tensor([size, size / 2, size / 4, 0])
    torch.testing.assert_close(grid.effective_parameters[0], expected, rtol=1e-8, atol=1e-8)


def test_a_cell_that_float64_cannot_invert_has_no_numbers():
    _, _, curvature = example()
    gram = curvature.gram.clone()
    gram[0], gram[:, 0] = 0, 0
    posterior = HeadPosterior.fit(replace(curvature, gram=gram), sigma_noise=1.0)
    grid = evidence_grid(posterior, [1e-6, 1.0], [1e-3, 1e9])
    for i, sigma in enumerate((1e-6, 1.0)):
        for j, tau in enumerate((1e-3, 1e9)):
            try:
                HeadPosterior.fit(posterior.curvature, sigma_noise=sigma, prior_precision=tau)
                possible = True
            except UserError:
                possible = False
            assert bool(grid.log_evidence[i, j].isfinite()) == possible
    assert grid.effective_parameters.isfinite().tolist() == [[False, True], [True, True]]


def test_a_structure_without_evidence_keeps_its_effective_parameters():
    _, _, curvature = example()
    posterior = HeadPosterior.fit(curvature, structure="prior_only")
    grid = evidence_grid(posterior, SIGMAS, TAUS)
    assert grid.log_evidence.isnan().all() and grid.effective_parameters.isfinite().all()
    assert evidence_curve(posterior) is None


@pytest.mark.parametrize("structure", ["full", "diag"])
@pytest.mark.parametrize("n_eff", [None, 300.0])
def test_the_joint_optimum_beats_a_dense_grid(structure, n_eff):
    _, _, curvature = example()
    posterior = HeadPosterior.fit(curvature, structure=structure, n_eff=n_eff)
    best = best_settings(posterior)
    around = np.logspace(-1, 1, 41)
    sigmas, taus = best.sigma_noise * around, best.prior_precision * around
    values = evidence_grid(posterior, sigmas, taus).log_evidence
    assert divmod(int(values.argmax()), 41) == (20, 20)
    assert float(values.max()) <= best.log_evidence() + 1e-9 * abs(best.log_evidence())
    # Both derivatives vanish there.
    for name in ("sigma_noise", "prior_precision"):
        at = getattr(best, name)
        sides = [replace(best, **{name: at * (1 + step)}).log_evidence() for step in (-1e-4, 1e-4)]
        curvature_of = 2 * best.log_evidence() - sum(sides)
        assert curvature_of > 0 and abs(sides[1] - sides[0]) < 0.01 * curvature_of


def test_a_joint_optimum_that_is_not_there_is_refused():
    _, _, curvature = example()
    few = HeadPosterior.fit(curvature, n_eff=0.01)
    with pytest.raises(UserError, match="raise laplace.n_eff"):
        best_settings(few)
    zero = HeadPosterior.fit(replace(curvature, mean=0 * curvature.mean))
    with pytest.raises(UserError, match="all zero"):
        best_settings(zero)


@pytest.mark.parametrize("structure", ["full", "diag"])
def test_separate_priors_are_the_best_of_all_pairs(structure):
    """Against log det and quadratic form of a dense precision with two priors."""
    _, _, curvature = example()
    mean = curvature.mean.clone()
    mean[:, -1] *= 40
    curvature = replace(curvature, mean=mean)
    posterior = HeadPosterior.fit(curvature, structure=structure, sigma_noise=0.7)
    size, channels = posterior.num_parameters, len(mean)
    likelihood = posterior.precision - posterior.prior_precision * torch.eye(size)
    bare = evidence_grid(posterior, [0.7], [1.0])
    constant = float(bare.log_evidence) + 0.5 * (
        channels * float(torch.logdet(likelihood + torch.eye(size))) + float(mean.square().sum())
    )

    def dense(weights, bias):
        prior = tensor([weights] * (size - 1) + [bias])
        ratio = torch.logdet(likelihood + prior.diag()) - prior.log().sum()
        return constant - 0.5 * (channels * float(ratio) + float((mean.square() @ prior).sum()))

    found = separate_priors(posterior)
    best = dense(found.weights, found.bias)
    assert found.log_evidence == pytest.approx(best, rel=1e-10)
    for weights in np.logspace(-2, 2, 21):
        for bias in np.logspace(-2, 2, 21):
            assert dense(found.weights * weights, found.bias * bias) <= best + 1e-7
    alone = HeadPosterior.fit(
        curvature, structure=structure, sigma_noise=0.7, prior_precision="evidence"
    )
    assert found.bias < alone.prior_precision / 5 and best > alone.log_evidence()


def test_separate_priors_need_a_bias():
    _, _, curvature = example(bias=False)
    with pytest.raises(UserError, match="needs? a head with a bias"):
        separate_priors(HeadPosterior.fit(curvature))


@pytest.mark.parametrize("structure", ["full", "kron", "subspace"])
def test_eigenvectors_are_those_of_the_covariance(structure):
    _, _, curvature = example()
    rank = 5 if structure == "subspace" else None
    posterior = HeadPosterior.fit(curvature, structure=structure, rank=rank)
    vectors = posterior.eigenvectors
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64))
    variances = 1 / (posterior.eigenvalues + posterior.prior_precision)
    torch.testing.assert_close((vectors * variances) @ vectors.T, posterior.covariance)
    assert HeadPosterior.fit(curvature, structure="diag").eigenvectors is None


def test_the_curve_holds_the_run_and_the_maximum(tmp_path):
    _, _, curvature = example()
    posterior = HeadPosterior.fit(curvature, prior_precision=1e-2)
    curve = evidence_curve(posterior)
    best = HeadPosterior.fit(curvature, prior_precision="evidence")
    assert curve.best == (best.prior_precision, best.log_evidence())
    assert curve.own == (1e-2, posterior.log_evidence())
    assert curve.log_evidence.max() <= curve.best[1] + 1e-6
    at = int(curve.log_evidence.argmax())
    assert math.log10(curve.prior_precision[at] / best.prior_precision) == pytest.approx(
        0, abs=0.06
    )
    assert (
        curve.prior_precision.min() <= 1e-5
        and curve.prior_precision.max() > 1e3 * curve.best[0] / 10
    )
    figure = evidence_figure(curve)
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert f"best: {best.prior_precision:.4g}" in labels
    assert "this run: 0.01" in labels


# Maps under every setting


def truth_of(make, posterior, sigmas, taus):
    """Exact first-order maps, one setting after the other."""
    cells = [
        replace(posterior, sigma_noise=s, prior_precision=t)
        for s, t in zip(sigmas, taus, strict=True)
    ]
    return torch.stack([Linearised(draws="all")(make(), c).variance for c in cells], 1)


def problem(structure="full", kernel=3, patch=2):
    """A small network, and a posterior whose output channels differ where they can."""
    net, _, covariance = curved(kernel=kernel, patch=patch)
    posterior = posterior_of(net.head, covariance)
    size = posterior.curvature.mean.shape
    squares = 1 + 1e4 * torch.rand(size, generator=torch.Generator().manual_seed(0)).double() ** 4
    curvature = replace(posterior.curvature, squared_gradients=squares)
    return net, replace(posterior, curvature=curvature, structure=structure)


SETTINGS = ([1.0, 0.1, 10.0, 3.0, 3.0], [0.3, 1e3, 1e-6, 1e9, 1.0])


@pytest.mark.parametrize("structure", STRUCTURES)
def test_all_directions_give_the_exact_map_of_every_setting(structure):
    net, posterior = problem(structure)

    def start():
        return start_of(model_of(net), Heun(2), 2, (1, 4, 4))

    bands = Bands.fit(posterior, *map(tensor, SETTINGS), draws=10**6, seed=0)
    images, squares = bands.follow(start(), EXACT, turn=7)
    truth = truth_of(start, posterior, *SETTINGS)
    torch.testing.assert_close(bands.variance(squares), truth, rtol=1e-10, atol=0)
    assert torch.equal(images, Linearised(draws=2)(start(), posterior).images)
    assert (bands.spread == 1).all()


def linear_problem(values):
    """A head on fixed features: S = sum of Phi, so every a_k is known."""
    net = Hand(lambda x, t, y: torch.cat([0 * x + 1, 0 * x + 2, 0 * x - 1], 1), [[0.1, 0.2, 0.3]])
    posterior = posterior_of(net.head, torch.eye(4, dtype=torch.float64))
    gram = tensor(values).diag()
    return net, replace(posterior, curvature=replace(posterior.curvature, gram=gram))


def test_bands_are_unbiased_at_the_reference_and_within_their_spread_elsewhere():
    net, posterior = problem()
    posterior = replace(posterior, prior_precision=1.0)
    sigmas, taus = [1.0, 1.0, 5.0], [1.0, 1e3, 1e6]

    def start():
        return start_of(model_of(net), Euler(2), 1, (1, 4, 4))

    truth = truth_of(start, posterior, sigmas, taus)
    ratios, spreads = [], []
    for seed in range(150):
        bands = Bands.fit(posterior, tensor(sigmas), tensor(taus), draws=12, seed=seed)
        assert len(bands.deltas) == 12
        ratios.append(bands.variance(bands.follow(start(), EXACT, 64)[1]) / truth)
        spreads.append(bands.spread)
    ratio = torch.cat(ratios)
    error = ratio.std(0) / len(ratios) ** 0.5
    assert ((ratio.mean(0)[0] - 1).abs() < 5 * error[0]).all()
    spread = torch.stack(spreads).amax(0).view(-1, 1, 1, 1)
    assert spread[0] == 1 and spread[2] > 1.2
    assert (ratio.mean(0) < spread + 5 * error).all()
    assert (ratio.mean(0) > 1 / spread - 5 * error).all()


def test_a_band_of_equal_eigenvalues_is_scaled_exactly():
    """No spread, no approximation: any two settings differ by a factor, whatever the draws."""
    net, posterior = linear_problem([5.0, 5.0, 5.0, 5.0])
    sigmas, taus = tensor([1.0, 0.3, 9.0]), tensor([1.0, 40.0, 1e-3])
    start = start_of(model_of(net), Euler(3), 2, (1, 2, 2))
    bands = Bands.fit(posterior, sigmas, taus, draws=1, seed=0)
    assert len(bands.deltas) == 1 and torch.allclose(bands.spread, tensor([1.0] * 3))
    maps = bands.variance(bands.follow(start, EXACT, 64)[1])
    scale = 1 / (5 / sigmas.square() + taus)
    expected = maps[:, :1] * (scale / scale[0]).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(maps, expected, rtol=1e-12, atol=0)


def test_without_a_prior_sigma_only_scales():
    net, posterior = problem()
    posterior = replace(posterior, prior_precision=1e-9)
    bands = Bands.fit(posterior, tensor([1.0, 0.1, 3.0]), tensor([1e-9] * 3), draws=9, seed=0)
    start = start_of(model_of(net), Euler(2), 2, (1, 4, 4))
    maps = bands.variance(bands.follow(start, EXACT, 64)[1])
    torch.testing.assert_close(maps[:, 1], 0.01 * maps[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(maps[:, 2], 9 * maps[:, 0], rtol=1e-6, atol=0)


def test_only_tau_sigma_squared_changes_a_map_but_for_its_scale():
    net, posterior = problem()
    bands = Bands.fit(posterior, tensor([1.0, 4.0]), tensor([80.0, 5.0]), draws=9, seed=0)
    start = start_of(model_of(net), Euler(2), 2, (1, 4, 4))
    maps = bands.variance(bands.follow(start, EXACT, 64)[1])
    torch.testing.assert_close(maps[:, 1], 16 * maps[:, 0], rtol=1e-10, atol=0)


def test_a_setting_that_float64_cannot_invert_has_no_map():
    net, posterior = linear_problem([0.0, 1.0, 1.0, 1.0])
    bands = Bands.fit(posterior, tensor([1.0, 1e-9]), tensor([1.0, 1e-3]), draws=4, seed=0)
    start = start_of(model_of(net), Euler(2), 1, (1, 2, 2))
    maps = bands.variance(bands.follow(start, EXACT, 64)[1])
    assert maps[:, 0].isfinite().all() and maps[:, 1].isnan().all()


def test_bands_are_cut_where_weights_differ_and_get_directions_where_variance_is():
    values = torch.logspace(0, 6, 61, dtype=torch.float64)
    precisions = torch.stack([values + 1e-3, values + 1e12])
    parts = split(precisions, 6)
    assert sorted(torch.cat(parts).tolist()) == list(range(61)) and len(parts) == 6
    assert all(values[part].max() / values[part].min() < 10.01 for part in parts)
    # Under the weak prior all count alike, under the strong one the largest alone.
    counts = allocate(values / precisions, parts, 30)
    assert sum(counts) == 30 and min(counts) >= 2
    assert counts[-1] == max(counts) > 2 * counts[0]
    assert allocate(values / precisions, parts, 1000) == [len(part) for part in parts]
    assert split(torch.full((2, 5), 3.0), 4)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="ablation.draws=3"):
        allocate(values / precisions, parts, 3)


# The command

GRID = (
    "experiment=prior_ablation",
    "uncertainty=linearised",
    "metrics.num_images=0",
    "ablation.sigma_noise=[0.1,1.0]",
    "ablation.prior_precision=[1.0,1e4,1e12]",
    "ablation.draws=8",
    "ablation.num_images=4",
    "ablation.batch_size=3",
)


def asked(compose, *overrides):
    return compose(*GRID, *overrides)


def test_the_command_leaves_arrays_numbers_and_pictures_and_makes_them_once(
    copied: Trained, compose: Compose, monkeypatch
):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    monkeypatch.setattr(figures, "map_tiles", lambda *_, **__: chart(9, 99, "", "")[0])  # slow
    pipeline.run(asked(compose))
    (folder,) = copied.folder.glob("ablation-euler-*")
    results = json.loads((folder / "results.json").read_text())
    assert set(results["structures"]) == {"full", "diag"} and results["structure"] == "full"
    full = results["structures"]["full"]
    for name in ("effective_parameters", "evidence", "total_variance", "image_rank"):
        assert np.shape(full[name]) == (2, 3), name
    assert results["grid_cost_ratio"] == full["grid_seconds"] / full["cell_seconds"] > 0
    assert np.diff(np.array(full["total_variance"]), axis=1).max() < 0
    with np.load(folder / "maps.npz", allow_pickle=False) as arrays:
        assert arrays["full"].shape == arrays["diag"].shape == (2, 3, 4, 1, 8, 8)
        summed = arrays["full"].sum((3, 4, 5)).mean(2)
        np.testing.assert_allclose(summed, full["total_variance"], rtol=1e-4)
    made = {path.stem for path in (folder / "figures").glob("*.png")}
    kinds = {f"maps_{n}_{k}_scale" for n in ("full", "diag") for k in ("own", "shared")}
    assert made == kinds | {"over_prior", "grid_full", "grid_diag"}
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert {tag.split("/")[-1] for tag in events.Tags()["images"]} == made
    curve = events.Scalars("ablation/effective_parameters")
    assert [event.step for event in curve][0::45] == [0, 120]  # tenths of a decade
    before = (folder / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(grids, "follow", None)
    pipeline.run(asked(compose, "ablation.max_memory=3.0"))
    assert (folder / "results.json").stat().st_mtime_ns == before


def test_tiles_show_every_setting_that_has_a_map():
    maps = np.exp(np.random.default_rng(0).normal(size=(2, 3, 4, 4)))
    maps[1, 2] = np.nan
    for shared in (False, True):
        made = figures.map_tiles(maps, [0.1, 1], [1, 10, 1e6], shared=shared, conditions="here")
        tiles = [image for axes in made.axes for image in axes.images]
        assert len(tiles) == 5
        ends = {(tile.norm.vmin, tile.norm.vmax) for tile in tiles}
        assert len(ends) == (1 if shared else 5)


def test_the_evidence_is_in_every_report(copied: Trained):
    assert (copied.cell / "figures" / "evidence.png").is_file()
    events = EventAccumulator(str(copied.cell / "tensorboard")).Reload()
    values = [event.value for event in events.Scalars("laplace/log_evidence_over_prior")]
    assert len(values) > 60 and max(values) > values[0] and max(values) > values[-1]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (
            "ablation.sigma_noise=[0.1,0]",
            "ablation.sigma_noise must be positive and finite, got 0",
        ),
        ("ablation.prior_precision=[-3]", "ablation.prior_precision"),
        ("ablation.prior_precision=[]", r"must be a list such as \[0.1,1\], got \[\]"),
        ("ablation.sigma_noise=1.0", "must be a list"),
        ("ablation.sigma_noise=[inf]", "finite"),
        ("ablation.structures=[full,round]", "ablation.structures .*'round'"),
        ("ablation.structures=[subspace]", "needs ablation.rank"),
        ("ablation.draws=2", "ablation.draws must be a whole number >= 4"),
        ("ablation.derivative=about", "derivative"),
        ("ablation.max_memory=1e-9", "lower ablation.draws"),
    ],
)
def test_a_bad_grid_is_refused_in_one_line_before_any_work(
    override, words, compose: Compose, monkeypatch
):
    monkeypatch.setattr(pipeline, "fit", None)
    with pytest.raises(Exception) as refusal:
        pipeline.run(asked(compose, override))
    line = explain(refusal.value)
    assert "\n" not in line
    assert re.search(words, line), line


def test_every_setting_of_the_file_is_one_of_the_grids():
    made = instantiate(compose_list(["experiment=prior_ablation"]).ablation, _convert_="all")
    assert isinstance(made, Ablation) and made.shape == (10, 10)
    for values, ends in ((made.sigma_noise, (0.01, 10)), (made.prior_precision, (1e-3, 1e12))):
        steps = np.diff(np.log(values))
        assert (values[0], values[-1]) == ends and np.allclose(steps, steps[0], rtol=0.02)
