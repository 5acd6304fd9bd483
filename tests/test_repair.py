"""The repair stage: figures of draws against slow loops, the command, what it refuses."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from conftest import Compose, Trained
from hand import real_start, small_unet

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_uint8
from bayesdiff.metrics.subsets import Pool
from bayesdiff.report import board
from bayesdiff.report.pictures import Pictures
from bayesdiff.studies.repair import figures as pictures
from bayesdiff.studies.repair import judged as figures_of
from bayesdiff.studies.repair import repair
from bayesdiff.studies.repair import results as repair_results
from bayesdiff.studies.repair.alternatives import WAYS, Origin, weight_draws
from bayesdiff.studies.repair.judged import Redraws, alternatives_row, images_row, over, pick_row
from bayesdiff.studies.repair.redraw import OF_MAPS, SCORES, redraw
from bayesdiff.studies.repair.repair import Repair
from bayesdiff.uncertainty import Ensemble

SMALL = (
    "experiment=diversity",
    "uncertainty.members=2",
    "uncertainty.batch_size=4",
    "solver.num_steps=4",
    "repair.num_images=6",
    "repair.draws=2",
    "repair.from_time=[0.25,0.6]",
    "repair.bootstrap=20",
)
CHANCE = {"seed": 0, "resamples": 50}


def made_up(images=7, draws=3, seed=0, width=5):
    """Random judgements; every eighth image or alternative is judged wrong."""
    generator = torch.Generator().manual_seed(seed)
    shape = (images, 1 + draws)

    def random(*more):
        return torch.rand(*shape, *more, generator=generator, dtype=torch.float64)

    features, inside = random(width), random().flatten() > 0.4
    none = torch.zeros(width, dtype=torch.float64)
    flat = features.flatten(0, 1)
    judged = Pool(flat, inside, none, none.diag(), None, torch.arange(len(flat)))
    quality = random()
    scores = {"one": random(), "other": random()}
    return Redraws(quality, quality > 0.4, features, random(6), judged, scores)


def test_figures_of_the_draws_equal_slow_loops():
    found = made_up()
    power = torch.arange(7.0)
    row = alternatives_row(found, power, **CHANCE)
    images, draws = range(7), range(1, 4)

    def average(value):
        return sum(value(i) for i in images) / 7

    def distance(values, i, j, k):
        return float((values[i, j] - values[i, k]).square().sum().sqrt())

    pairs = [(1, 2), (1, 3), (2, 3)]
    quality, right = found.quality, found.right
    assert row["gain"] == pytest.approx(
        average(lambda i: sum(float(quality[i, j] - quality[i, 0]) for j in draws) / 3)
    )
    assert row["better"] == pytest.approx(
        average(lambda i: sum(bool(quality[i, j] > quality[i, 0]) for j in draws) / 3)
    )
    wrong = [i for i in images if not right[i, 0]]
    fine = [i for i in images if right[i, 0]]
    assert wrong and fine
    mended = [sum(bool(right[i, j]) for j in draws) / 3 for i in wrong]
    spoiled = [sum(not right[i, j] for j in draws) / 3 for i in fine]
    assert row["success"] == pytest.approx(sum(mended) / len(wrong))
    assert row["harm"] == pytest.approx(sum(spoiled) / len(fine))
    assert row["feature_distance"] == pytest.approx(
        average(lambda i: sum(distance(found.features, i, *pair) for pair in pairs) / 3)
    )
    assert row["pixel_distance"] == pytest.approx(
        average(lambda i: sum(distance(found.pixels, i, *pair) for pair in pairs) / 3) / 6**0.5
    )
    assert row["feature_shift"] == pytest.approx(
        average(lambda i: sum(distance(found.features, i, 0, j) for j in draws) / 3)
    )
    inside = found.judged.inside.view(7, 4).double()
    assert row["precision_gain"] == pytest.approx(
        float((inside[:, 1:].mean(1) - inside[:, 0]).mean())
    )
    assert row["power"] == 3.0 and row["gain_low"] < row["gain"] < row["gain_high"]


@pytest.mark.parametrize("first", [0, 1])
def test_figures_of_the_best_equal_slow_loops(first):
    found = made_up(seed=2)
    row = pick_row(found, "one", first, **CHANCE)
    gain = better = chance = mended = spoiled = changed = 0.0
    wrong = sum(not right for right in found.right[:, 0])
    for i in range(7):
        best = min(range(first, 4), key=lambda j: float(found.scores["one"][i, j]))
        gain += float(found.quality[i, best] - found.quality[i, 0]) / 7
        better += (0.5 if not best else float(found.quality[i, best] > found.quality[i, 0])) / 7
        expected = sum(float(found.quality[i, j]) for j in range(first, 4)) / (4 - first)
        chance += (float(found.quality[i, best]) - expected) / 7
        changed += (best > 0) / 7
        mended += bool(not found.right[i, 0] and found.right[i, best]) / int(wrong)
        spoiled += bool(found.right[i, 0] and not found.right[i, best]) / (7 - int(wrong))
    names = ("gain", "better", "over_chance", "success", "harm", "changed")
    got = [row[name] for name in names]
    assert got == pytest.approx([gain, better, chance, mended, spoiled, changed])
    assert row["fid"] != row["fid"] or len(found.features) > 5  # too few images have none


def test_equal_scores_keep_the_image():
    found = made_up()
    same = dataclasses.replace(found, scores={"one": torch.zeros(7, 4)})
    row = pick_row(same, "one", 0, **CHANCE)
    assert row["changed"] == 0 and row["gain"] == 0 and row["harm"] == 0
    assert same.picked("one", 1).tolist() == [1] * 7


def test_the_fid_is_that_of_the_chosen_images_and_is_left_out_for_too_few():
    found = made_up(images=40)
    chosen = found.picked("one", 0)
    own = torch.stack([found.features[i, j] for i, j in enumerate(chosen.tolist())])
    centred = own - own.mean(0)
    # Against a single real image at the origin.
    wanted = own.mean(0).square().sum() + centred.square().sum() / 39
    assert found.fid(chosen) == pytest.approx(float(wanted))
    assert pick_row(found, "one", 0, **CHANCE)["fid"] == pytest.approx(float(wanted))
    assert np.isnan(made_up(images=5).fid(torch.zeros(5, dtype=torch.long)))


def test_a_single_alternative_has_no_pairs_and_nothing_wrong_has_no_success():
    found = made_up(draws=1)
    fine = dataclasses.replace(found, right=torch.ones_like(found.right))
    row = alternatives_row(fine, torch.ones(7), **CHANCE)
    assert all(np.isnan(row[name]) for name in ("feature_distance", "pixel_distance", "success"))
    assert row["harm"] == 0 and images_row(fine)["wrong"] == 0
    # Neither is shown as a number.
    line = pictures.line(row, pictures.OF_DRAWS)
    assert line["success"] == "" and line["harm"] == "0 [0, 0]"


def test_ways_are_compared_image_by_image():
    """Paired: a constant difference has no interval, however images differ."""
    quality = torch.rand(30, generator=torch.Generator().manual_seed(0)).double()
    row = over(quality + 0.25, quality, **CHANCE)
    ends = [row[f"over_isotropic{end}"] for end in ("", "_low", "_high")]
    assert ends == pytest.approx([0.25] * 3)


def test_probability_is_that_of_the_class_asked_for():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 0.0, 0.0]])
    quality, right = figures_of.probability(logits, torch.tensor([1, 0]))
    wanted = np.exp([1.0, 5.0]) / np.exp(logits.double().numpy()).sum(1)
    assert quality.tolist() == pytest.approx(wanted.tolist())
    assert right.tolist() == [False, True]


def results_of(result):
    (folder,) = result.studies
    return folder, json.loads((folder / "results.json").read_text())


def test_the_command_draws_and_judges_once(copied: Trained, compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    asked, real = [], repair_results.judge
    watched = lambda run, seed=None: asked.append(seed) or real(run, seed)  # noqa: E731
    monkeypatch.setattr(repair_results, "judge", watched)
    result = pipeline.run(compose(*SMALL))
    assert asked == [None, 1]  # the run's own classifier judges, another chooses: each made once
    folder, results = results_of(result)
    assert folder.parent == copied.folder
    cells = {(row["time"], row["way"]) for row in results["draws"]}
    assert cells == {(time, way) for time in (0.25, 0.75) for way in WAYS}
    picks = {(row["time"], row["way"], row["score"], row["among"]) for row in results["picks"]}
    assert picks == {(*cell, s, a) for cell in cells for s in SCORES for a in ("draws", "all")}
    cost = {(row["time"], row["way"]): row["nfe"] for row in results["draws"]}
    assert cost[0.25, "isotropic"] == 3 and cost[0.25, "coherent"] == 4
    assert cost[0.75, "renoise"] == 1
    assert all(
        ("over_isotropic" in row) == (row["way"] != "isotropic") for row in results["draws"]
    )
    with np.load(folder / "draws.npz", allow_pickle=False) as arrays:
        draws, images = arrays["draws"], arrays["images"]
    assert draws.shape == (6, 2, 5, 2, 1, 8, 8) and images.shape == (6, 1, 8, 8)
    # The run's own images, in order.
    with np.load(result.samples, allow_pickle=False) as own:
        seen = to_uint8(torch.from_numpy(own["images"])).numpy()
    assert np.abs(seen.astype(int) - images[:4]).max() <= 1
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert names == {
        *("draws_from_0.25", "draws_from_0.75", "quality_over_diversity", "success_and_harm")
    }
    text = (folder / "results.json").read_text()
    assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    tables = (folder / "table.md").read_text()
    assert "renoise_matched" in tables and "nan" not in tables
    assert f"{results['original']['wrong']} of 6 judged wrong" in tables
    before = (folder / "results.json").stat().st_mtime_ns
    monkeypatch.setattr(repair, "ImagePool", None)
    assert pipeline.run(compose(*SMALL)).studies == (folder,)
    assert (folder / "results.json").stat().st_mtime_ns == before
    with pytest.raises(TypeError):
        pipeline.run(compose(*SMALL, "repair.seed=1"))


def drawn(compose, *overrides):
    """The arrays of a study; its figures are not made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(board, "write", lambda *_, **options: [])
        patch.setattr(board, "write_study", lambda *_, **options: [])
        folder, _ = results_of(pipeline.run(compose(*SMALL, *overrides)))
    with np.load(folder / "draws.npz", allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def test_the_draws_do_not_depend_on_the_batch_nor_on_how_many_images_follow(
    copied: Trained, compose: Compose, monkeypatch
):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    whole = drawn(compose)
    # Another batch is no other study: made anew elsewhere.
    parts = drawn(compose, "uncertainty.batch_size=1", "repair.num_images=5")
    for name in ("images", "draws"):
        gap = np.abs(whole[name][:5].astype(int) - parts[name].astype(int))
        assert gap.max() <= 1, name
    assert np.abs(np.diff(whole["draws"].astype(int), axis=3)).max() > 1


def test_a_single_draw_and_a_held_map_work_for_diffusion_with_noise(compose: Compose, monkeypatch):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    arrays = drawn(
        compose,
        "experiment=rectify",
        "model=diffusion",
        "solver=ddpm",
        "repair.draws=1",
        "uncertainty.noise_members=0",
    )
    held = ~arrays["region"][:, 0]
    assert held.sum((1, 2)).tolist() == [64 - 13] * 6  # a fifth of the pixels, rounded up
    images, draws = arrays["images"], arrays["draws"]
    same = draws[:, :, :, 0, 0] == images[:, None, None, 0]
    assert same.transpose(0, 3, 4, 1, 2)[held].all() and not same.all()


def test_the_best_by_its_map_is_chosen_from_fresh_samples_and_rewound_ones(
    copied: Trained, compose: Compose, monkeypatch
):
    """The numbers of the rejection by the map equal a slow loop over what is kept."""
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    chosen = ["repair.ways=[isotropic,fresh]", "repair.score=map.sum", "repair.from_time=[0.25]"]
    result = pipeline.run(compose(*SMALL, *chosen))
    folder, results = results_of(result)
    assert {(row["time"], row["way"]) for row in results["draws"]} == {
        (0, "fresh"),
        (0.25, "isotropic"),
    }
    # A candidate and its map: four steps, and three of each of two members, which share the first.
    assert {row["nfe"] for row in results["draws"] if row["way"] == "fresh"} == {4 + 1 + 2 * 3}
    with np.load(folder / "draws.npz", allow_pickle=False) as arrays:
        kept = {name: arrays[name] for name in arrays.files}
    # The image's own map counts for fresh samples, what comes after 0.25 for the others.
    with np.load(result.samples, allow_pickle=False) as own:
        sums = own["variance"].clip(0).astype(float).sum((1, 2, 3))
    place = OF_MAPS.index("map.sum")
    assert kept["fresh_scores"][:4, 0, place] == pytest.approx(sums, rel=1e-5)
    rest = kept["scores"][:4, 0, 0, 0, place]
    assert (rest > 0).all() and (rest < sums).all()
    judge, _ = repair_results.judge(pipeline.prepare(compose(*SMALL))[0])
    both = np.concatenate([kept["images"][:, None], kept["fresh"]], 1)
    from bayesdiff.metrics.features import extract

    logits = extract(judge, torch.from_numpy(both).flatten(0, 1), 256).logits
    p = logits.double().softmax(1).view(6, 3, -1).numpy()
    gain = 0.0
    for i in range(6):
        best = int(np.argmin(kept["fresh_scores"][i, :, place]))
        gain += (p[i, best, i % 10] - p[i, 0, i % 10]) / 6
    picks = [row for row in results["picks"] if (row["way"], row["score"]) == ("fresh", "map.sum")]
    (row,) = [row for row in picks if row["among"] == "all"]
    assert row["gain"] == pytest.approx(gain, abs=1e-6)
    assert row["gain_low"] <= row["gain"] <= row["gain_high"]
    assert {row["score"] for row in results["picks"]} == {*SCORES, *OF_MAPS}
    assert "map.sum" in (folder / "table.md").read_text()
    assert (folder / "figures" / "fresh.png").is_file()


@pytest.mark.parametrize("solver", ["euler", "euler-guided"])
@pytest.mark.parametrize("way", ["isotropic", "fresh"])
@pytest.mark.parametrize("score", ["classifier.off_label", "map.sum"])
def test_an_alternative_takes_what_the_network_is_asked_for_it(solver, way, score):
    net, posterior = small_unet()
    asked, real = [], net.features
    net.features = lambda x, *more: asked.append(len(x)) or real(x, *more)
    estimator, totals = Ensemble(members=3), []
    for draws in (1, 2):
        # Left after the first step, so that no member has steps of its own before it.
        options = Repair(num_images=2, ways=[way], from_time=[0.2], draws=draws, score=score)
        timed = dataclasses.replace(estimator, times=options.times)
        samples = timed(real_start(net, solver), posterior)
        origin = Origin.of(real_start(net, solver))
        weights = weight_draws(posterior, draws, 0)
        asked.clear()
        mapper = lambda start: estimator(start, posterior)  # noqa: E731
        drawn = redraw(origin, weights, options, samples, [0, 1], mapper)
        totals.append(sum(asked))
    [[cell]] = repair_results.cells_of(options, samples, drawn)
    assert 2 * cell.nfe == totals[1] - totals[0]


def test_each_chosen_image_has_its_own_box(
    copied: Trained, compose: Compose, monkeypatch, tmp_path
):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    boxes = tmp_path / "boxes.json"
    boxes.write_text('{"7": [0, 0, 2, 3], "2": [4, 4, 4, 4]}')
    ways = "repair.ways=[renoise]"
    arrays = drawn(compose, f"repair.region={boxes}", ways)
    assert arrays["region"].sum((1, 2, 3)).tolist() == [16, 6]
    assert arrays["region"][0, 0, 4:, 4:].all() and arrays["region"][1, 0, :2, :3].all()
    # The images are those of a run that takes all in order.
    whole = drawn(compose, "repair.num_images=8", ways)
    for row, number in enumerate((2, 7)):
        gap = np.abs(arrays["images"][row].astype(int) - whole["images"][number].astype(int))
        assert gap.max() <= 1
    same = (arrays["draws"] == arrays["images"][:, None, None, None])[:, :, :, :, 0]
    held = ~arrays["region"]
    assert all(same[i].reshape(-1, 8, 8)[:, held[i, 0]].all() for i in range(2))
    # Other boxes in the same file are another study.
    boxes.write_text('{"7": [0, 0, 2, 3], "2": [4, 4, 2, 4]}')
    assert drawn(compose, f"repair.region={boxes}", ways)["region"].sum() == 14
    on_the_line = drawn(compose, "repair.region={7:[0,0,2,3]}", ways)
    assert np.abs(on_the_line["draws"][0].astype(int) - arrays["draws"][1]).max() <= 1


BAD_OPTIONS = [
    ({"draws": 0}, ["repair.draws", ">= 1", "got 0"]),
    ({"num_images": 0}, ["repair.num_images", "got 0"]),
    ({"bootstrap": 1}, ["repair.bootstrap", "got 1"]),
    ({"seed": -1}, ["repair.seed", "got -1"]),
    ({"from_time": 0.5}, ["repair.from_time", "list", "0.5"]),
    ({"from_time": []}, ["repair.from_time", "list"]),
    ({"from_time": [0.5, 0.5]}, ["repair.from_time=[0.5, 0.5]", "twice"]),
    ({"from_time": [1.0]}, ["repair.from_time", "below 1", "1.0"]),
    ({"from_time": ["a"]}, ["repair.from_time", "number", "'a'"]),
    ({"from_time": [0.0]}, ["repair.from_time=0", "above 0"]),
    ({"ways": ["spherical"]}, ["repair.ways 'spherical'", "independent, coherent"]),
    ({"ways": "coherent"}, ["repair.ways", "list", "'coherent'"]),
    ({"score": "members.dissent"}, ["repair.score 'members.dissent'", "classifier."]),
    ({"share": 0}, ["repair.share=0", "above 0"]),
    ({"share": 1.5}, ["repair.share", "1.5"]),
    ({"region": "centre"}, ["repair.region", "[top,left,height,width]", "'centre'", "no file"]),
    ({"region": {}}, ["repair.region", "names no image"]),
    ({"region": {3: [0, 0, 2]}}, ["repair.region[3]", "[0, 0, 2]"]),
    ({"region": {-3: [0, 0, 2, 2]}}, ["repair.region's image numbers", "got -3"]),
    ({"region": {3: [0, 0, 2, 2], "3": [0, 0, 2, 2]}}, ["names an image twice"]),
    ({"region": {3: [0, 0, 2, 2]}, "images": [3, 4]}, ["repair.region", "image 4"]),
    ({"images": []}, ["repair.images", "list"]),
    ({"images": [3, 3]}, ["repair.images=[3, 3]", "twice"]),
    ({"images": [-1]}, ["repair.images", "got -1"]),
    ({"region": [1, 2, 3]}, ["repair.region", "[1, 2, 3]"]),
    ({"region": [0, 0, 0, 3]}, ["repair.region's height", "got 0"]),
    ({"region": [0, 0, 0.5, 3]}, ["repair.region's height", "0.5"]),
    ({"region": [-1, 0, 2, 3]}, ["repair.region's top", "got -1"]),
]


@pytest.mark.parametrize(("options", "words"), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused_in_one_line(options, words):
    with pytest.raises(UserError) as caught:
        Repair(**options)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


BAD_RUNS = [
    (("repair.from_time=[0.9]",), ["repair.from_time=0.9", "solver.num_steps=4", "earlier"]),
    (("repair.from_time=[0.3,0.4]",), ["[0.3, 0.4]", "one step", "solver.num_steps=4"]),
    (
        ("repair.from_time=[0.6]", "uncertainty.skip_interval=2"),
        ["repair.from_time=0.6", "earlier"],
    ),
    (("repair.region=[6,0,4,4]",), ["repair.region=[6, 0, 4, 4]", "8 x 8"]),
    (("repair.region={3:[6,0,4,4]}",), ["repair.region=[6, 0, 4, 4]", "8 x 8"]),
    (("metrics=inception", "metrics.num_images=0"), ["repair", "metrics=classifier"]),
    (("model.num_classes=null",), ["repair", "model.num_classes=auto"]),
    (("laplace.subset=last_block",), ["repair follows the posterior of the head"]),
    (("uncertainty.max_memory=1e-6",), ["uncertainty.max_memory"]),
]


@pytest.mark.parametrize(("overrides", "words"), BAD_RUNS, ids=lambda value: str(value)[:40])
def test_what_cannot_be_drawn_is_refused_before_any_work(
    overrides, words, compose: Compose, monkeypatch
):
    monkeypatch.setattr(pipeline, "fit", lambda *_: pytest.fail("work was done"))
    with pytest.raises(UserError) as caught:
        pipeline.run(compose(*SMALL, *overrides))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_maps_that_cannot_begin_in_the_middle_are_refused_but_for_fresh_samples(compose: Compose):
    small = [word for word in SMALL if word != "uncertainty.members=2"]
    cfg = compose(*small, "uncertainty=refined", "repair.score=map.sum")
    with pytest.raises(UserError, match=r"repair.score=map.sum.*refined.*repair.ways=\[fresh\]"):
        pipeline.prepare(cfg)
    cfg.repair.ways = ["fresh"]
    pipeline.prepare(cfg)


def test_the_options_of_both_experiments_are_those_of_the_class(compose: Compose):
    names = {field.name for field in dataclasses.fields(Repair)}
    for experiment in ("rectify", "diversity"):
        given = compose(f"experiment={experiment}").repair
        assert set(given) - {"_target_"} == names
        assert list(given.ways) == list(WAYS)
