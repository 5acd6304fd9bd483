"""The scripts of experiments/skip-interval and distortions, at smoke size and by hand."""

import importlib
import json
import sys

import pytest
import torch
from conftest import QUICK_CLASSIFIER, ROOT, smallest

IMAGES = torch.randint(0, 256, (40, 1, 12, 12), generator=torch.Generator().manual_seed(0)).byte()
LABELS = torch.arange(40) % 10


@pytest.fixture
def script(monkeypatch, tmp_path):
    """``script(study)``: its run.py, writing elsewhere."""

    def load(study):
        monkeypatch.syspath_prepend(str(ROOT / "experiments" / study))
        run = importlib.import_module("run")
        monkeypatch.setattr(run, "HERE", tmp_path / "study")
        monkeypatch.setattr(*QUICK_CLASSIFIER)
        return run

    yield load
    for name in ("run", "distort"):
        sys.modules.pop(name, None)


def test_distortions_grow_with_the_level_and_depend_on_the_seed_alone(script):
    run = script("distortions")
    for kind in run.STRENGTHS:
        made = [run.distorted(IMAGES, LABELS, kind, level, 1) for level in (0, *run.LEVELS)]
        assert all(one.dtype == torch.uint8 and one.shape == IMAGES.shape for one in made)
        assert made[0].equal(IMAGES) and made[5].equal(run.distorted(IMAGES, LABELS, kind, 5, 1))
        away = [(one.double() - IMAGES).square().mean() for one in made]
        assert away == sorted(away) and away[0] < away[1], kind


def test_distortions_are_as_strong_as_they_say(script):
    script("distortions")
    import distort

    grey = torch.full((500, 1, 20, 20), 128, dtype=torch.uint8)

    def generator():
        return torch.Generator().manual_seed(0)

    noisy = distort.gaussian_noise(grey, 20, generator()).double()
    assert float(noisy.std()) == pytest.approx(20, rel=0.01)
    salted = distort.salt_and_pepper(grey, 0.1, generator())
    assert float((salted == 0).double().mean()) == pytest.approx(0.05, abs=0.003)
    assert float((salted == 255).double().mean()) == pytest.approx(0.05, abs=0.003)
    covered = (distort.rectangle(grey, 0.2, generator()) == 0).double().flatten(1).mean(1)
    assert covered.min() > 0.17 and covered.max() < 0.23
    assert len(covered.unique()) > 2  # of several shapes
    point = torch.zeros(1, 1, 21, 21, dtype=torch.uint8)
    point[..., 10, 10] = 255
    spread = distort.blur(point, 1.5, generator())[0, 0].double()
    across = torch.arange(21) - 10.0
    assert float((spread.sum(0) * across**2).sum() / spread.sum()) == pytest.approx(2.25, rel=0.1)
    turned = distort.swirl(IMAGES, 0.0, generator())
    assert (turned.int() - IMAGES.int()).abs().max() <= 1  # no angle, no change
    ids = torch.arange(40, dtype=torch.uint8).view(-1, 1, 1, 1)
    left = distort.mode_drop(ids, LABELS, 8, generator()).flatten().long()
    assert len(left) == 40 and len(LABELS[left].unique()) == 2


def test_how_a_metric_follows_the_level(script):
    run = script("distortions")
    level = torch.arange(6.0, dtype=torch.float64)
    noise = torch.tensor([[0.0], [0.1], [-0.1]], dtype=torch.float64)
    rising = run.follows(level + noise)
    assert (rising["monotone"], rising["steps_up"], rising["seen_from"]) == (1, 1, 1)
    assert run.follows(-level + noise)["monotone"] == -1
    assert run.follows(-level + noise)["seen_from"] is None
    late = torch.tensor([0.0, 0, 0, 0, 3, 4], dtype=torch.float64)
    jitter = torch.tensor([1.0, -1, 0.5], dtype=torch.float64)[:, None] * (level - 2) / 10
    assert run.follows(late + jitter)["seen_from"] == 4


def test_pairs_that_fid_and_cmmd_order_differently(script):
    run = script("distortions")
    blurred = {"fid": [5.0, 5.1, 4.9], "cmmd": [1.0, 1.1, 0.9]}
    dropped = {"fid": [9.0, 9.1, 8.9], "cmmd": [0.1, 0.2, 0.1]}
    near = {"fid": [9.0, 9.3, 8.6], "cmmd": [0.1, 0.1, 0.2]}
    settings = {"blur.1": blurred, "mode_drop.1": dropped, "mode_drop.2": near}
    found = run.disagreement({"none.0": dropped, **settings})
    assert found["fid_and_cmmd.opposite"] == [
        {"fid_worse": "mode_drop.1", "cmmd_worse": "blur.1"},
        {"fid_worse": "mode_drop.2", "cmmd_worse": "blur.1"},
    ]
    assert found["fid_and_cmmd.pairs"] == 3 and found["fid_and_cmmd.pairs_apart_in_both"] == 2


def test_lpips_is_left_out_with_a_line_and_works_from_a_file(script, tmp_path, capsys):
    from torchvision import models

    run = script("distortions")
    run.NETWORK = "squeeze"  # as alex, a fiftieth of the size
    assert run.perceptual_network(tmp_path / "none.pth") is None
    assert f"LPIPS is left out: no weights at {tmp_path / 'none.pth'}" in capsys.readouterr().out
    hub, path = torch.hub.get_dir(), tmp_path / "weights.pth"
    torch.save(models.squeezenet1_1().state_dict(), path)
    network = run.perceptual_network(path)
    assert torch.hub.get_dir() == hub
    assert run.perceptual(network, IMAGES, IMAGES) == 0
    near, far = (run.distorted(IMAGES, LABELS, "blur", level, 0) for level in (1, 5))
    assert 0 < run.perceptual(network, IMAGES, near) < run.perceptual(network, IMAGES, far)


def test_the_study_of_distortions(script, tmp_path, monkeypatch):
    run = script("distortions")
    monkeypatch.setattr(run, "STORE", tmp_path / "store")
    monkeypatch.setattr(run, "LEVELS", (1, 5))
    for kind in ("gaussian_noise", "salt_and_pepper", "rectangle", "jpeg", "swirl"):
        monkeypatch.delitem(run.STRENGTHS, kind)
    run.main(["digits", f"output_dir={tmp_path}"])
    folder = tmp_path / "study"
    results = json.loads((folder / "results.json").read_text())
    one = results["sets"]["digits"]["seeds"]["blur.5"]
    for metric in ("fid", "cmmd"):
        name = f"distortion.blur.5.{metric}"
        assert results[name] == pytest.approx(sum(one[metric]) / run.SEEDS)
        assert results[f"{name}_low"] < results[name] < results[f"{name}_high"]
        assert results[name] > results[f"distortion.none.0.{metric}"]
    assert results["sets"]["digits"]["conditions"]["lpips"] is False
    made = {path.name for path in folder.iterdir() if path.suffix != ".pdf"}
    drawn = {"digits.png", "digits-distorted.png", "captions.json"}
    assert made == {"results.json", "table.md"} | drawn
    monkeypatch.setattr(run.Bench, "measure", None)  # a second call measures nothing
    run.main(["digits", f"output_dir={tmp_path}"])


def test_rankings_are_compared_as_they_should(script):
    run = script("skip-interval")
    sums = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = {"top_tenth_overlap": 1, "bottom_tenth_overlap": 1, "crossed": 0}
    assert run.compare(sums, sums) == {"rank": pytest.approx(1), "size": 1, **ends}
    assert run.compare(2 * sums, sums) == {"rank": pytest.approx(1), "size": 2, **ends}
    turned = run.compare(-sums, sums)
    assert turned["rank"] == pytest.approx(-1) and turned["crossed"] == 10
    assert turned["top_tenth_overlap"] == turned["bottom_tenth_overlap"] == 0
    swapped, order = sums.clone(), sums.argsort()
    swapped[order[[0, 20]]] = sums[order[[20, 0]]]  # one of the five least goes to the middle
    moved = run.compare(swapped, sums)
    assert moved["bottom_tenth_overlap"] == pytest.approx(0.8)
    assert (moved["top_tenth_overlap"], moved["crossed"]) == (1, 0)


def test_means_over_seeds_and_what_chance_does(script):
    run = script("skip-interval")
    generator = torch.Generator().manual_seed(0)
    sums = [torch.rand(40, generator=generator, dtype=torch.float64) for _ in range(3)]
    noisy = [each + 0.2 * torch.rand(40, generator=generator) for each in sums]
    maps = [
        {"ensemble": {str(k): own for k in run.SKIPS} | {"other": other}}
        for own, other in zip(sums, noisy, strict=True)
    ]
    seeds = [run.of_seed(each) for each in maps]
    together = run.over_seeds({str(number): one for number, one in enumerate(seeds)})
    name = "ensemble.skip.5.rank"
    assert together[name] == together[f"{name}_low"] == pytest.approx(1)
    chance = [each[f"{name}_other_draws"] for each in seeds]
    assert chance == [float(run.spearman(*pair)) for pair in zip(sums, noisy, strict=True)]
    assert together[f"{name}_other_draws"] == pytest.approx(sum(chance) / 3)
    assert together[f"{name}_other_draws_low"] < min(chance)
    crossed = [each["ensemble.skip.2.crossed_other_draws"] for each in seeds]
    assert together["ensemble.skip.2.crossed_other_draws_most"] == max(crossed)


def test_the_study_of_skip_intervals(script, copied, tmp_path, monkeypatch):
    run = script("skip-interval")
    monkeypatch.setattr(run, "SKIPS", (1, 2))
    monkeypatch.setattr(run, "IMAGES", 20)
    monkeypatch.setattr(run, "MODELS", {"flow": []})
    monkeypatch.setattr(run, "COMMON", smallest(tmp_path))  # trained already
    run.main(["seed=0"])
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    assert results["skip.1.rank"] == results["skip.1.top_tenth_overlap"] == 1
    assert results["skip.2.rank"] == results["flow.linearised.skip.2.rank"] < 1
    assert results["skip.2.rank_low"] is None  # of one seed
    # Other draws leave chance even where nothing is skipped.
    assert results["flow.ensemble.skip.1.rank_other_draws"] < 1
    made = {path.name for path in (tmp_path / "study").iterdir() if path.suffix != ".pdf"}
    assert made == {"results.json", "table.md", "skip-interval.png", "captions.json"}


def test_rejection_has_a_number_for_every_score(script, tmp_path):
    run = script("rectify")
    ends = ("", "_low", "_high")

    def row(value, **names):
        return names | {f"better{end}": value + 0.01 * place for place, end in enumerate(ends)}

    picks = [
        row(0.6, score="map.sum", among="draws"),
        row(0.7, score="map.sum", among="all"),
        row(0.8, score="classifier.off_label", among="draws"),
    ]
    conditions = {"num_images": 5, "draws": 4, "seeds": [0, 1]}
    draws = [row(0.5, time=0.0, way="fresh")]
    one = {"conditions": conditions, "original": {"quality": 0.5}, "draws": draws}
    (tmp_path / "study").mkdir()
    run.write({run.REJECTION: {"rejection": one | {"picks": picks}}}, ["a=1"])
    results = json.loads((tmp_path / "study" / "results.json").read_text())
    main = "rejection.map_better_than_original"
    assert results["overrides"] == ["a=1"]
    assert [results[main + end] for end in ends] == pytest.approx([0.6, 0.61, 0.62])
    assert results[f"{main}.by_chance"] == 0.5
    assert results[f"{run.REJECTION}.rejection.classifier.off_label.draws.better"] == 0.8
    lines = (tmp_path / "study" / "table.md").read_text().splitlines()
    assert "| map.sum | 0.6 [0.61, 0.62] |" in lines
    assert not any("0.7 [" in line for line in lines)  # among alternatives alone
    assert (tmp_path / "study" / "figures" / f"{run.REJECTION}_rejection.png").is_file()
