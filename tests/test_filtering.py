"""The filtering stage: one pool, every score, the choice that the last seed did not see."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hydra.utils import instantiate
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_uint8
from bayesdiff.metrics.features import untrained
from bayesdiff.report import board
from bayesdiff.report.pictures import Pictures
from bayesdiff.runs.setup import Setup, starts
from bayesdiff.storage.artefacts import key_of
from bayesdiff.studies import image_pool as pools
from bayesdiff.studies import scoring
from bayesdiff.studies.filtering import figures, filtering
from bayesdiff.studies.filtering.filtering import Filtering, Judged
from bayesdiff.studies.scoring import ScoreOptions, Seen, score_table
from bayesdiff.uncertainty import Ensemble, Samples
from bayesdiff.uncertainty.scores.likelihood import log_likelihood, random_probes
from bayesdiff.uncertainty.scores.of_maps_and_images import (
    IMAGE_SCORES,
    MAP_SCORES,
    foreground_mean,
    segmented,
)
from bayesdiff.uncertainty.scores.of_members import (
    CONFIDENCE_SCORES,
    MEMBER_SCORES,
    semantic_entropy,
)

SMALL = (
    "experiment=filtering",
    "metrics.num_images=0",
    "uncertainty.batch_size=8",
    "filtering.num_images=40",
    "filtering.seeds=[0,5]",
    "filtering.keep=[0.5,0.8]",
    "filtering.members=2",
    "filtering.aleatoric_draws=2",
    "filtering.subsets=3",
    "filtering.draws=2",
    "filtering.maps.published.skip_interval=2",
    "+filtering.maps.published.mc_samples=2",
)


def results_of(folder):
    (found,) = folder.glob("filtering-euler-*")
    return found, json.loads((found / "results.json").read_text())


def test_the_command_scores_every_pool_once(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    asked = {filtering: [], scoring: []}
    for module, seeds in asked.items():
        real = module.judge
        watched = lambda run, seed=None, real=real, seeds=seeds: (  # noqa: E731
            seeds.append(seed) or real(run, seed)
        )
        monkeypatch.setattr(module, "judge", watched)
    pipeline.run(compose(*SMALL))
    # The run's own classifier judges, another scores.
    assert set(asked[filtering]) == {None} and set(asked[scoring]) == {1}
    folder, results = results_of(copied.folder)
    rows = results["seeds"]["5"]
    named = {f"{m}.{k}" for m in ("ensemble", "published") for k in MAP_SCORES}
    named |= {f"image.{k}" for k in IMAGE_SCORES} | {f"members.{k}" for k in MEMBER_SCORES}
    named |= {f"classifier.{k}" for k in CONFIDENCE_SCORES}
    named |= {
        "members.joint",
        "random",
        "real.realism",
        "real.rarity",
        "aleatoric.centred",
        "aleatoric.variance",
    }
    assert {row["score"] for row in rows} == named
    modes = {(row["mode"], row["keep"], row["kept"]) for row in rows}
    # Of 4 images of each class.
    kept = {
        ("global", 0.5, 20),
        ("global", 0.8, 32),
        ("per_class", 0.5, 20),
        ("per_class", 0.8, 30),
    }
    assert modes == kept
    by_rule = {(row["score"], row["mode"], row["rule"]) for row in results["rules"]}
    assert by_rule == {(n, m, "mean+1sd") for n in named for m in ("global", "per_class")}
    assert all(0 < row["keep"] <= 1 and row["seeds"] == 2 for row in results["rules"])
    assert "mean+1sd" in (folder / "table-rules.md").read_text()
    main = [row for row in rows if row["keep"] == 0.8]
    assert all(row["fid_gain_low"] < row["fid_gain"] < row["fid_gain_high"] for row in main)
    assert results["best"].split(".")[0] not in ("random", "real")
    assert all(row in rows for row in results["best_on_last"])
    made = {path.stem for path in (folder / "figures").glob("*.png")}
    kept = {"kept_and_discarded", "kept_and_discarded_by_best"}
    assert made == {"z_by_score", "gain_over_keep"} | kept
    assert "members.semantic_entropy" in (folder / "table.md").read_text()
    assert {row["score"] for row in results["profile"]} == named
    assert "auroc_within" in (folder / "table-profile.md").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (folder / "results.json").read_text()))
    before = (folder / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(filtering, "ImagePool", None)
    assert pipeline.run(compose(*SMALL)).studies == (folder,)
    assert (folder / "results.json").stat().st_mtime_ns == before
    # Members that were trained again.
    monkeypatch.setattr(Ensemble, "sources", lambda *_: ["others"])
    with pytest.raises(TypeError):
        pipeline.run(compose(*SMALL))


def half(images):
    """The left half of every image."""
    mask = torch.zeros(len(images), 1, *images.shape[2:], dtype=torch.bool)
    mask[..., : images.shape[3] // 2] = True
    return mask


class Brighter(nn.Module):
    """Weights that a sigmoid gives, as of a network with a file of its own."""

    def forward(self, images):
        assert not self.training
        return torch.sigmoid(4 * images.mean(1, keepdim=True))


def test_the_joint_score_adds_ranks_among_images_of_the_same_label():
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([5, 7, 8]))
    given = {f"members.{k}": torch.rand(20, generator=generator) for k in scoring.JOINT}
    given["members.log_det"][3] = given["members.log_det"][1]  # a tie shares its place
    found = scoring.joint(given, labels)
    for k, label in enumerate(labels.tolist()):
        own = (labels == label).nonzero().flatten()
        place = [
            (sum(v[own] < v[k]) + 0.5 * sum(v[own] == v[k])) / len(own) for v in given.values()
        ]
        assert float(found[k]) == pytest.approx(float(sum(place)))
    order = torch.randperm(20, generator=generator)
    mixed = scoring.joint({k: v[order] for k, v in given.items()}, labels[order])
    assert torch.equal(mixed, found[order])
    alone = scoring.joint(given, None)
    torch.testing.assert_close(alone, scoring.joint(given, torch.zeros(20, dtype=torch.long)))


def test_further_scores_come_from_options(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    monkeypatch.setattr(board, "write_study", lambda *_, **options: None)
    scored = []
    real = filtering.score_table
    monkeypatch.setattr(
        filtering,
        "score_table",
        lambda *given: scored.append((given, real(*given))) or scored[-1][1],
    )
    target = "bayesdiff.uncertainty.MCDropout"
    dropout = [f"+filtering.maps.dropout._target_={target}", "+filtering.maps.dropout.members=2"]
    more = ["filtering.likelihood=true", "filtering.likelihood_steps=2"]
    more += ["filtering.aleatoric_zigzag=3", "+filtering.encoders.untrained=null"]
    more += ["+filtering.segmentation._target_=test_filtering.Brighter", "filtering.seeds=[0]"]
    pipeline.run(compose(*SMALL, *dropout, *more))
    _, results = results_of(copied.folder)
    (((run, maps, seen, _), table),) = scored
    assert {f"dropout.{name}" for name in MAP_SCORES} <= table.keys()
    assert "p 0.1, fixed masks" in maps["dropout"].estimator
    assert {"aleatoric.zigzag_centred", "aleatoric.zigzag_variance"} <= table.keys()
    samples = maps["ensemble"]
    mask = torch.sigmoid(4 * samples.images.clamp(-1, 1))
    expected = foreground_mean(samples.variance, samples.images, mask)
    torch.testing.assert_close(table["ensemble.foreground_mean"], expected)
    start = starts(run, instantiate(run.cfg.solver), 0)(range(3))
    probes = random_probes(start.noise.fork(pools._PROBES))
    bits = log_likelihood(start.field(), samples.images[:3], probes, 2).bits_per_dim
    torch.testing.assert_close(table["likelihood.bits_per_dim"][:3], bits, rtol=1e-4, atol=1e-4)
    network = untrained(run.data.data, run.cfg.metrics.seed + 1)
    with torch.no_grad():
        features = network.features(seen.members.flatten(0, 1)).unflatten(0, (40, 2))
    found = table["members.semantic_entropy_untrained"]
    torch.testing.assert_close(found, semantic_entropy(features), rtol=1e-5, atol=1e-4)
    nfe = results["conditions"]["nfe"]
    # Three steps, the last of them (0.8 of 3 on) asked once and by 2 draws of 3 answers.
    assert nfe["zigzag"] == 3 + 1 + 2 * 3 and nfe["likelihood"] == 2 * 4 * 2
    assert nfe["members"] == 2 * 3 and nfe["aleatoric"] == 3 + 1 + 2
    assert nfe["ensemble"] == maps["ensemble"].nfe
    parts = {path.name.split("-")[0] for path in (copied.folder / "pools").iterdir()}
    assert parts >= {"members", "aleatoric", "zigzag", "likelihood", "mc_dropout", "published"}
    rows = results["seeds"]["0"]
    gained = {f"{name}_gain" for name in ("is", "kid", "recall", "density", "coverage", "cmmd")}
    assert all((gained <= row.keys()) == (row["keep"] == 0.8) for row in rows)
    assert all(f"{name}_low" in row for name in gained for row in rows if row["keep"] == 0.8)


def pool_in(folder, run, solver, estimator, posterior, count):
    """Samples 0 ... count - 1 of seed 3, kept in this run folder."""
    run = dataclasses.replace(run, folder=folder)
    return pools.ImagePool(Setup(run, solver, estimator, posterior, "x"), count, 3)


def test_parts_of_pools_keep_their_names():
    """A pool that was made before is found again: its key is a matter of these words alone."""
    at = SimpleNamespace(made_from="x", run=None)
    pool = pools.ImagePool(at, 9, 3)
    (block,) = pool.blocks
    words = "members 2"
    assert pool._key(block, words) == key_of("x", 3, 0, 9, words)
    whats: dict = {}

    def rows(name, what, *_):
        whats[name] = what
        return {"members": None}

    object.__setattr__(pool, "_rows", rows)
    object.__setattr__(pool, "_at_once", lambda _: 1)
    pool.members(2), pool.aleatoric(5), pool.zigzag(5, 3), pool.likelihood(None, 20)
    assert whats == {
        "members": words,
        "aleatoric": "aleatoric 5",
        "zigzag": "zigzag 5 3",
        "likelihood": "likelihood 20",
    }


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aleatoric_zigzag": 1}, "filtering.aleatoric_zigzag=1 is the plain form; give 2"),
        ({"aleatoric_zigzag": -1}, "filtering.aleatoric_zigzag must be .*>= 0, got -1"),
        ({"aleatoric_zigzag": 3, "aleatoric_draws": 0}, "zigzag=3 needs filtering.aleatoric_dr"),
        ({"rules": ["mean"]}, r"filtering.rules 'mean'; give mean\+1sd"),
        ({"rules": "mean+1sd"}, r"filtering.rules must be a list"),
        ({"keep": [0.8, 0.8]}, r"filtering.keep=\[0.8, 0.8\] names one twice"),
        ({"likelihood": 1}, "filtering.likelihood must be true or false, got 1"),
        ({"likelihood_steps": 0}, "filtering.likelihood_steps must be .*>= 1, got 0"),
        ({"segmentation": "unet"}, "filtering.segmentation must be a callable .* got 'unet'"),
        ({"encoders": "clip"}, "filtering.encoders must name weights files, got 'clip'"),
        ({"encoders": {"clip": None}, "members": 0}, "encoders reads members; give filtering.m"),
    ],
)
def test_scores_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refusal:
        Filtering(**given)
    assert "\n" not in str(refusal.value)


CROP = "+filtering.segmentation"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+filtering.encoders.vgg=null", "unknown filtering.encoders 'vgg'; choose from class"),
        ("+filtering.encoders.clip=none.pt", "filtering.encoders.clip=none.pt does not exist"),
        (
            f"{CROP}._target_=test_filtering.crop {CROP}._partial_=true",
            r"masks .*\(2, 1, 8, 8\), got",
        ),
    ],
)
def test_what_scores_need_is_tried_before_any_work(override, message, compose: Compose):
    with pytest.raises(UserError, match=message) as refusal:
        pipeline.prepare(compose(*SMALL, *override.split()))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["corruption=truncated"], "filtering is judged by a classifier .* corruption"),
        (["+filtering.maps.dropout=3"], "filtering.maps.dropout is no estimator, got 3"),
        (["+filtering.encoders.untrained=x"], "filtering.encoders.untrained=x has no weights"),
        (["+filtering.encoders.clip=3"], "filtering.encoders.clip=3"),
    ],
)
def test_what_cannot_be_filtered_is_refused_in_one_line(options, message, compose: Compose):
    with pytest.raises(UserError, match=message) as refusal:
        pipeline.prepare(compose(*SMALL, *options))
    assert "\n" not in str(refusal.value)


def test_a_likelihood_that_cannot_be_is_refused_before_any_work(compose: Compose):
    with pytest.raises(UserError, match="leaves the velocity at t=0 open"):
        options = ("model.prediction=noise", "filtering.likelihood=true", "solver.grid=log_snr")
        pipeline.prepare(compose(*SMALL, *options))


def crop(images):
    return images[..., 1:]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (crop, r"masks \(N, 1, H, W\), here \(3, 1, 4, 6\), got \(3, 2, 4, 5\)"),
        (lambda images: images.mean(1), r"got \(3, 4, 6\)"),
        (lambda images: [0], "got list"),
        (lambda images: images[:, :1] - 2, "weights >= 0, got values from -"),
        (lambda images: images[:, :1] * torch.nan, "weights >= 0, got values from nan"),
    ],
)
def test_bad_masks_are_refused_in_one_line(network, message):
    images = torch.rand(3, 2, 4, 6)
    with pytest.raises(UserError, match=message) as refusal:
        segmented(network, images)
    assert "\n" not in str(refusal.value)


def test_masks_are_those_of_the_network_for_any_batch_size():
    images = 3 * torch.randn(5, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    found = segmented(Brighter(), images, batch_size=2)
    expected = torch.sigmoid(4 * images.clamp(-1, 1).mean(1, keepdim=True)).double()
    torch.testing.assert_close(found, expected)
    variance = torch.rand(5, 2, 4, 6)
    of_half = foreground_mean(variance, images, segmented(half, images))
    torch.testing.assert_close(of_half, variance[..., :3].double().mean((1, 2, 3)))


def test_every_batch_has_the_likelihood_of_its_own_images(
    copied: Trained, compose: Compose, monkeypatch
):
    this, solver, _, laplace = pipeline.prepare(compose())
    this.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
    posterior = laplace.fit(this.model.eval(), this.data.data)
    images = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for size in (2, 5):
        monkeypatch.setattr(pools.ImagePool, "_at_once", lambda *_, size=size: size)
        pool = pool_in(copied.folder / f"of-{size}", this, solver, None, posterior, 5)
        found.append(pool.likelihood(images, 2)["bits_per_dim"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    assert found[0].std() > 0.01


def test_image_scores_see_the_images_that_are_shown(copied: Trained, compose: Compose):
    this, solver, estimator, laplace = pipeline.prepare(compose())
    this.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
    posterior = laplace.fit(this.model.eval(), this.data.data)
    maps = pool_in(copied.folder, this, solver, estimator, posterior, 12).maps(estimator)
    found = score_table(this, {"own": maps}, Seen(), 0)
    seen = to_uint8(maps.images).double() / 255
    steps = [seen.diff(dim=dim).abs().flatten(1).sum(1) for dim in (-1, -2)]
    # Of 255 grey levels, so that each of the 112 steps may be half a level off at either end.
    torch.testing.assert_close(found["image.total_variation"], 2 * sum(steps), rtol=0, atol=0.9)
    ends = ((seen == 0) | (seen == 1)).double().flatten(1).mean(1)
    assert torch.equal(found["image.saturation"], ends)
    # The solver's own noise is a score where there is some, in the units of [-1, 1].
    assert "sampler_noise.sum" not in found
    noise = torch.rand(maps.variance.shape, generator=torch.Generator().manual_seed(0))
    noisy = dataclasses.replace(maps, sampler_noise=noise).in_unit_range()
    found = score_table(this, {"own": maps, "other": noisy}, Seen(), 0)
    torch.testing.assert_close(
        found["sampler_noise.sum"], noise.double().sum((1, 2, 3)), rtol=1e-5, atol=0
    )


def test_a_pool_is_the_same_for_every_batch_size_and_made_once(
    copied: Trained, compose: Compose, monkeypatch
):
    def pool(size, name):
        this, solver, estimator, laplace = pipeline.prepare(
            compose(f"uncertainty.batch_size={size}")
        )
        this.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
        posterior = laplace.fit(this.model.eval(), this.data.data)
        folder = copied.folder / name
        return pool_in(folder, this, solver, estimator, posterior, 9), estimator

    (one, estimator), (other, again) = pool(2, "one"), pool(9, "two")
    first, second = one.maps(estimator), other.maps(again)
    torch.testing.assert_close(first.images, second.images, rtol=0, atol=1e-5)
    # Single precision, and members that differ by a thousandth.
    torch.testing.assert_close(first.variance, second.variance, rtol=5e-3, atol=1e-9)
    members = one.members(2)
    assert members.shape == (9, 2, 1, 8, 8) and members.dtype == torch.uint8
    assert (members.int() - other.members(2).int()).abs().max() <= 1
    for make in (
        lambda pool: pool.aleatoric(2),
        lambda pool: pool.zigzag(2, 3),
        lambda pool: pool.likelihood(first.images, 2),
    ):
        again = make(other)
        for name, score in make(one).items():
            torch.testing.assert_close(score, again[name], rtol=1e-4, atol=0)
    # The run's own samples are another seed's.
    with np.load(copied.samples, allow_pickle=False) as own:
        assert own["images"][0].shape == tuple(first.images[0].shape)
        assert np.abs(own["images"][0] - first.images[0].numpy()).max() > 0.1
    monkeypatch.setattr(pools, "starts", None)
    assert torch.equal(one.members(2), members)


def test_a_larger_pool_adds_to_a_smaller_one(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(pools, "BLOCK", 4)
    this, solver, estimator, laplace = pipeline.prepare(compose())
    this.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
    posterior = laplace.fit(this.model.eval(), this.data.data)
    folder = copied.folder / "pools"

    def made(count):
        pool = pool_in(copied.folder, this, solver, estimator, posterior, count)
        members, maps = pool.members(2), pool.maps(estimator)
        return members, maps, {path: path.stat().st_mtime_ns for path in folder.glob("*.npz")}

    few, few_maps, before = made(8)
    many, many_maps, after = made(10)
    assert len(before) == 4 and len(after) == 6
    assert all(after[path] == when for path, when in before.items())
    assert torch.equal(many[:8], few) and len(many) == 10
    assert torch.equal(many_maps.images[:8], few_maps.images) and len(many_maps.images) == 10
    assert len(set(many.flatten(1).sum(1).tolist())) == 10  # no image twice
    # How the work is cut up changes no map.
    looked_for = []
    real = pools.make_maps
    monkeypatch.setattr(
        pools, "make_maps", lambda *given: looked_for.append(given[1].path) or real(*given)
    )
    pool = pool_in(copied.folder, this, solver, estimator, posterior, 10)
    pool.maps(dataclasses.replace(estimator, batch_size=3, max_memory=1.0))
    assert set(looked_for) <= before.keys() | after.keys() and len(looked_for) == 3
    assert made(10)[2] == after


def rows_of(seed, z):
    names = ("fid", "fid_gain", "precision", "precision_gain", "precision_z")
    return [
        {"score": score, "mode": mode, "keep": keep, "kept": 8, "z": value * sign}
        | dict.fromkeys(names, float(seed))
        for keep, sign in ((0.8, 1), (0.5, -1))
        for mode in ("global", "per_class")
        for score, value in z.items()
    ]


def test_the_choice_is_made_before_the_last_seed_and_never_by_luck_or_by_real_images():
    others = ("random", "real.realism", "image.saturation", "classifier.off_label", "rival.sum")
    others += ("aleatoric.centred", "members.semantic_entropy", "members.semantic_variance_clip")
    early = dict.fromkeys(others, 90.0) | {"a.sum": 3.0, "b.sum": 2.0}
    late = dict.fromkeys(others, 0.0) | {"a.sum": -5.0, "b.sum": 70.0}
    options = Filtering(seeds=[0, 1, 2], keep=[0.5, 0.8], maps={"rival": Ensemble()})
    judged = [Judged(rows_of(seed, z), []) for seed, z in enumerate((early, early, late))]
    results = filtering._results(options, judged)
    assert results["best"] == "a.sum"
    # FIDs are the seed's number; the best one's is made 0.5 less on seed 1.
    for row in judged[1].gains:
        row["fid"] -= 0.5 * (row["score"] == "a.sum")
    over = {row["score"]: row for row in filtering._results(options, judged)["best_over"]}
    assert over["b.sum"]["lead"] == pytest.approx(0.5 / 3) and over["a.sum"]["lead"] == 0
    assert over["b.sum"]["lead_low"] < 0 < over["b.sum"]["lead_high"]
    kept = [row["z"] for row in results["best_on_last"] if row["keep"] == 0.8]
    assert kept == [-5.0, -5.0]
    single = filtering._results(Filtering(seeds=[4], keep=[0.8]), [Judged(rows_of(0, early), [])])
    assert "best" not in single


def test_kept_images_are_those_of_lowest_scores(monkeypatch):
    images = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 1, 4, 4)
    shown = []
    real = figures.put

    def put(axes, pixels, x, y, size, **show):
        if pixels.ndim == 3:  # no map
            shown.append((x, pixels))
        return real(axes, pixels, x, y, size, **show)

    monkeypatch.setattr(figures, "put", put)
    fields = dict.fromkeys((f.name for f in dataclasses.fields(Samples)), torch.zeros(0))
    fields |= {"images": images, "variance": images + 1, "labels": None, "units": "model"}
    samples = Samples(**fields)
    figures.kept_and_discarded(samples, torch.arange(10).flip(0).double(), "any.sum")
    levels = [float(np.mean(pixels)) for _, pixels in sorted(shown, key=lambda each: each[0])]
    left, right = levels[:5], levels[5:]
    assert min(left) > max(right) and left[0] == pytest.approx(1) and right[0] == pytest.approx(0)


def test_members_of_guided_samples_take_both_evaluations(compose: Compose, monkeypatch):
    run, solver, *_ = pipeline.prepare(compose("solver.guidance=2"))
    pool = pool_in(run.folder, run, solver, None, None, 9)
    monkeypatch.setattr(pools.ImagePool, "members", lambda *_: None)
    _, spent = scoring.seen_of(pool, ScoreOptions(members=5, aleatoric_draws=0), None)
    assert spent == {"members": 5 * 2 * 3}
