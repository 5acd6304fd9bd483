"""The filtering stage: one pool, every score, the choice that the last seed did not see."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import Compose, Trained

from bayesdiff import filtering, pipeline, pools
from bayesdiff.filtering import Filtering
from bayesdiff.report import board
from bayesdiff.report import filtering as figures
from bayesdiff.uncertainty import Ensemble, Samples
from bayesdiff.uncertainty.image_scores import IMAGE_SCORES, MAP_SCORES
from bayesdiff.uncertainty.member_scores import CONFIDENCE_SCORES, MEMBER_SCORES

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
    monkeypatch.setattr(board, "_pictures", lambda *_: ())
    pipeline.run(compose(*SMALL))
    folder, results = results_of(copied.folder)
    rows = results["seeds"]["5"]
    named = {f"{m}.{k}" for m in ("ensemble", "published") for k in MAP_SCORES}
    named |= {f"image.{k}" for k in IMAGE_SCORES} | {f"members.{k}" for k in MEMBER_SCORES}
    named |= {f"classifier.{k}" for k in CONFIDENCE_SCORES}
    named |= {"random", "real.realism", "real.rarity", "aleatoric.centred", "aleatoric.variance"}
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
    main = [row for row in rows if row["keep"] == 0.8]
    assert all(row["fid_gain_low"] < row["fid_gain"] < row["fid_gain_high"] for row in main)
    assert results["best"].split(".")[0] not in ("random", "real")
    assert all(row in rows for row in results["best_on_last"])
    made = {path.stem for path in (folder / "figures").glob("*.png")}
    assert made == {"z_by_score", "gain_over_keep", "kept_and_discarded"}
    assert "members.semantic_entropy" in (folder / "table.md").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", (folder / "results.json").read_text()))
    before = (folder / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(filtering, "ImagePool", None)
    assert pipeline.run(compose(*SMALL)).studies == (folder,)
    assert (folder / "results.json").stat().st_mtime_ns == before
    # Members that were trained again.
    monkeypatch.setattr(Ensemble, "sources", lambda *_: ["others"])
    with pytest.raises(TypeError):
        pipeline.run(compose(*SMALL))


def test_a_pool_is_the_same_for_every_batch_size_and_made_once(
    copied: Trained, compose: Compose, monkeypatch
):
    def pool(size, name):
        this, solver, estimator, laplace = pipeline.prepare(
            compose(f"uncertainty.batch_size={size}")
        )
        this.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
        posterior = laplace.fit(this.model.eval(), this.data.data)
        return pools.ImagePool(this, solver, posterior, 9, 3, copied.folder / name, "x"), estimator

    (one, estimator), (other, again) = pool(2, "one"), pool(9, "two")
    first, second = one.maps(estimator), other.maps(again)
    torch.testing.assert_close(first.images, second.images, rtol=0, atol=1e-5)
    # Single precision, and members that differ by a thousandth.
    torch.testing.assert_close(first.variance, second.variance, rtol=5e-3, atol=1e-9)
    members = one.members(2)
    assert members.shape == (9, 2, 1, 8, 8) and members.dtype == torch.uint8
    assert (members.int() - other.members(2).int()).abs().max() <= 1
    for name, score in one.aleatoric(2).items():
        torch.testing.assert_close(score, other.aleatoric(2)[name], rtol=1e-5, atol=0)
    # The run's own samples are another seed's.
    with np.load(copied.cell / "samples.npz", allow_pickle=False) as own:
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
        pool = pools.ImagePool(this, solver, posterior, count, 3, folder, "x")
        members, maps = pool.members(2), pool.maps(estimator)
        return members, maps, {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    few, few_maps, before = made(8)
    many, many_maps, after = made(10)
    assert len(before) == 4 and len(after) == 6
    assert all(after[path] == when for path, when in before.items())
    assert torch.equal(many[:8], few) and len(many) == 10
    assert torch.equal(many_maps.images[:8], few_maps.images) and len(many_maps.images) == 10
    assert len(set(many.flatten(1).sum(1).tolist())) == 10  # no image twice
    # How the work is cut up changes no map.
    pool = pools.ImagePool(this, solver, posterior, 10, 3, folder, "x")
    monkeypatch.setattr(pools, "make_maps", lambda *given: before.__contains__(given[4]) and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pool.maps(dataclasses.replace(estimator, batch_size=3, max_memory=1.0))


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
    early = {"random": 90.0, "real.realism": 50.0, "a.sum": 3.0, "b.sum": 2.0}
    late = {"random": 0.0, "real.realism": 0.0, "a.sum": -5.0, "b.sum": 70.0}
    wanted = Filtering(seeds=[0, 1, 2], keep=[0.5, 0.8])
    results = filtering._results(wanted, [rows_of(0, early), rows_of(1, early), rows_of(2, late)])
    assert results["best"] == "a.sum"
    kept = [row["z"] for row in results["best_on_last"] if row["keep"] == 0.8]
    assert kept == [-5.0, -5.0]
    single = filtering._results(Filtering(seeds=[4], keep=[0.8]), [rows_of(0, early)])
    assert "best" not in single


def test_kept_images_are_the_least_doubtful_ones(monkeypatch):
    images = torch.linspace(-1, 1, 10)[:, None, None, None].expand(10, 1, 4, 4)
    shown = []
    monkeypatch.setattr(figures, "put", lambda _, pixels, x, y, size: shown.append((x, pixels)))
    fields = dict.fromkeys((f.name for f in dataclasses.fields(Samples)), torch.zeros(0))
    fields |= {"images": images, "variance": 0 * images, "labels": None, "units": "model"}
    samples = Samples(**fields)
    figures.kept_and_discarded(samples, torch.arange(10).flip(0).double(), "any.sum")
    levels = [float(np.mean(pixels)) for _, pixels in sorted(shown, key=lambda each: each[0])]
    left, right = levels[:5], levels[5:]
    assert min(left) > max(right) and left[0] == pytest.approx(1) and right[0] == pytest.approx(0)
