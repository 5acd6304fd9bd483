"""Known damage to training data: exactly what was asked for, the same for a seed, nothing else."""

import json
import sys
from collections import Counter
from functools import partial

import pytest
import torch
from conftest import ROOT, Compose, compose_list, smallest
from hydra.utils import instantiate
from test_data_module import epoch_of, numbers

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.cli import explain
from bayesdiff.data.corruption import corrupted, mislabelled, truncated, undertrained
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.sources import digits
from bayesdiff.studies.scoring import ScoreOptions
from bayesdiff.uncertainty import Ensemble, Published

STUDY = ROOT / "experiments" / "known-corruption"


def images(count: int = 60) -> ImageData:
    """Image i holds the number i in every pixel but the last column, and has label i % 3."""
    x = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).repeat(1, 1, 4, 4)
    x[..., -1] = 255
    y = torch.arange(count) % 3
    return ImageData.build("n", x, y, x[:9].clone(), y[:9].clone(), ("a", "b", "c"))


CORRUPTIONS = {
    "mislabelled": partial(mislabelled, classes=["a", "b"], into=["b", "c"], share=0.25),
    "truncated": partial(truncated, classes=["a", "c"], keep=4),
    "undertrained": partial(undertrained, classes=["a", "c"], visits=0.1),
}
each = pytest.mark.parametrize("name", CORRUPTIONS)


def test_mislabelled_moves_the_share_of_each_class_to_the_class_named():
    data, found = images(), CORRUPTIONS["mislabelled"](images())
    assert torch.equal(found.images, data.images)
    moved = Counter(zip(data.labels.tolist(), found.labels.tolist(), strict=True))
    # A label that arrived in b does not go on to c.
    assert moved == {(0, 0): 15, (0, 1): 5, (1, 1): 15, (1, 2): 5, (2, 2): 20}


def test_truncated_keeps_that_many_images_of_a_class_with_their_labels():
    data, found = images(), CORRUPTIONS["truncated"](images())
    assert found.labels.bincount().tolist() == [4, 20, 4]
    kept = found.images[:, 0, 0, 0].long()
    assert torch.equal(found.labels, data.labels[kept])  # image i still has label i % 3
    assert kept.tolist() == sorted(set(kept.tolist()))  # none twice, in their order
    assert set(range(1, 60, 3)) <= set(kept.tolist())


def test_undertrained_keeps_images_and_labels():
    data, found = images(), CORRUPTIONS["undertrained"](images())
    assert torch.equal(found.images, data.images) and torch.equal(found.labels, data.labels)
    assert sorted(found.rare.tolist()) == [i for i in range(60) if i % 3 != 1]


@each
def test_a_corruption_leaves_its_input_the_test_images_and_the_classes_alone(name):
    data, before = images(), images()
    found = CORRUPTIONS[name](data)
    assert torch.equal(data.images, before.images) and torch.equal(data.labels, before.labels)
    assert torch.equal(found.test_images, before.test_images)
    assert torch.equal(found.test_labels, before.test_labels)
    assert (found.classes, found.name) == (before.classes, before.name)


@each
def test_a_seed_fixes_a_corruption_and_the_fingerprint_tells_it(name):
    one, again, other = (CORRUPTIONS[name](images(), seed=seed) for seed in (3, 3, 4))
    assert one.fingerprint == again.fingerprint
    assert len({one.fingerprint, other.fingerprint, images().fingerprint}) == 3
    assert torch.equal(one.images, again.images) and torch.equal(one.labels, again.labels)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert CORRUPTIONS[name](images(), seed=3).fingerprint == one.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


def test_other_visits_are_another_training():
    found = {undertrained(images(), ["a"], visits=v).fingerprint for v in (0.1, 0.2)}
    assert len(found) == 2


@pytest.mark.parametrize("visits", [0.1, 0.25, 0.3, 0.05])
def test_a_rare_image_is_visited_in_its_share_of_the_epochs_exactly(visits):
    data = undertrained(images(), ["a", "c"], visits=visits)
    seen = torch.zeros(60, dtype=torch.long)
    for epoch in range(60):
        places = data.visited(epoch)
        assert len(places) == len(set(places.tolist())) >= data.fewest
        seen[places] += 1
        expected = (epoch + 1) * visits
        rare = seen[data.rare]
        assert rare.min() >= int(expected + 1e-9) and rare.max() <= int(expected + 1 - 1e-9)
    assert seen[1::3].tolist() == [60] * 20  # the others, in every epoch
    assert seen[data.rare].tolist() == [round(60 * visits)] * 40


def test_batches_are_whole_and_hold_the_images_of_their_epoch():
    data = undertrained(images(), ["a", "c"], visits=0.1)  # 20 + 4 images in every epoch
    module = ImageDataModule(data, batch_size=8)
    total: Counter[int] = Counter()
    for epoch in range(10):
        batches = epoch_of(module, epoch=epoch)
        assert [len(x) for x, _ in batches] == [8, 8, 8]
        seen = numbers(batches)
        assert sorted(seen) == data.visited(epoch).tolist()
        assert [n % 3 for n in seen] == torch.cat([y for _, y in batches]).tolist()
        assert seen != sorted(seen)
        total.update(seen)
    assert {total[n] for n in range(60) if n % 3 == 1} == {10}
    assert {total[n] for n in range(60) if n % 3 != 1} == {1}


def test_the_epoch_depends_on_seed_and_number_alone_so_a_resumed_run_agrees():
    def seen(epoch, seed=0):
        data = undertrained(images(), ["a"], visits=0.3)
        return numbers(epoch_of(ImageDataModule(data, 6, seed=seed), epoch=epoch))

    straight = [seen(epoch) for epoch in range(4)]
    assert straight[2:] == [seen(2), seen(3)]
    assert straight[2] != straight[3] and straight[2] != seen(2, seed=1)


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_images_of_an_epoch(world):
    data = undertrained(images(), ["a", "c"], visits=0.1)
    module = ImageDataModule(data, batch_size=6, flip=True)
    whole = epoch_of(module, epoch=5)
    shares = [epoch_of(module, epoch=5, rank=rank, world=world) for rank in range(world)]
    assert len(whole) == 4
    for number, (x, y) in enumerate(whole):
        for rank in range(world):
            part, labels = shares[rank][number]
            assert torch.equal(part, x[rank::world]) and torch.equal(labels, y[rank::world])


def test_data_that_all_images_of_are_visited_is_served_as_before():
    """The order is the plain permutation of seed and epoch."""
    generator = torch.Generator().manual_seed(1_000_003 * 2 + 7)
    order = torch.randperm(60, generator=generator)
    assert numbers(epoch_of(ImageDataModule(images(), 60, seed=2), epoch=7)) == order.tolist()


WHERE = "data.source.corruption"
WRONG = [
    (partial(mislabelled, classes=["x"], into=["a"]), f"{WHERE}.classes: n has no class x"),
    (partial(mislabelled, classes=["a"], into=["x"]), f"{WHERE}.into: n has no class x"),
    (partial(mislabelled, classes="a", into=["b"]), f"{WHERE}.classes must be a list"),
    (partial(mislabelled, classes=[], into=[]), f"{WHERE}.classes must be a list"),
    (partial(mislabelled, classes=["a", "b"], into=["b"]), "2 classes but 1 in into"),
    (partial(mislabelled, classes=["a", "a"], into=["b", "c"]), "names a class twice"),
    (partial(mislabelled, classes=["a"], into=["a"]), "moves class a into itself"),
    (
        partial(mislabelled, classes=["a"], into=["b"], share=1.5),
        f"{WHERE}.share must be a number",
    ),
    (partial(mislabelled, classes=["a"], into=["b"], share=1), f"{WHERE}.share must be a number"),
    (partial(mislabelled, classes=["a"], into=["b"], share=-0.1), f"{WHERE}.share must be"),
    (partial(mislabelled, classes=["a"], into=["b"], share=0), f"{WHERE}.share=0 changes nothing"),
    (partial(mislabelled, classes=["a"], into=["b"], share=0.01), "of 20 images of class a moves"),
    (partial(mislabelled, classes=["a"], into=["b"], share=0.99), "of 20 images of class a moves"),
    (partial(truncated, classes=["a"], keep=0), f"{WHERE}.keep must be a whole number >= 1"),
    (partial(truncated, classes=["a"], keep=2.5), f"{WHERE}.keep must be a whole number"),
    (partial(truncated, classes=["a"], keep=20), "takes nothing from class a, which has 20"),
    (partial(truncated, classes=["x"]), f"{WHERE}.classes: n has no class x; choose from a, b, c"),
    (partial(truncated, classes=["a"], seed=-1), f"{WHERE}.seed must be a whole number"),
    (partial(undertrained, classes=["a"], visits=0), f"{WHERE}.visits=0 changes nothing"),
    (partial(undertrained, classes=["a"], visits=1), f"{WHERE}.visits must be a number"),
    (partial(undertrained, classes=["x"]), f"{WHERE}.classes: n has no class x"),
]


@pytest.mark.parametrize("corrupt, message", WRONG)
def test_bad_options_are_one_line(corrupt, message):
    with pytest.raises(UserError) as error:
        corrupt(images())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("corrupt", [partial(truncated, classes=["a"])])
def test_data_without_labels_is_refused(corrupt):
    data = images()
    bare = ImageData.build("n", data.images, None, data.test_images, None)
    with pytest.raises(UserError, match="needs classes, but n has no labels"):
        corrupt(bare)


def test_a_batch_larger_than_a_short_epoch_is_refused():
    data = undertrained(images(), ["a", "c"], visits=0.1)
    with pytest.raises(UserError, match="batch_size=25 is larger than the 24 training images"):
        ImageDataModule(data, batch_size=25)


@each
def test_the_option_of_the_command_line_is_the_function(name):
    plain, cfg = digits(), compose_list([f"corruption={name}"])
    found = instantiate(cfg.data.source)
    made = {
        "mislabelled": partial(mislabelled, classes=["3", "8"], into=["8", "3"], share=0.3),
        "truncated": partial(truncated, classes=["5"], keep=10),
        "undertrained": partial(undertrained, classes=["5"], visits=0.05),
    }
    assert found.fingerprint == made[name](plain).fingerprint != plain.fingerprint


def test_another_run_folder_for_another_corruption(compose: Compose):
    def folder(*given):
        return pipeline.prepare(compose(*given))[0].folder

    found = {folder(), *(folder(f"corruption={name}") for name in CORRUPTIONS)}
    found.add(folder("corruption=truncated", "data.source.corruption.seed=1"))
    found.add(folder("corruption=truncated", "data.source.corruption.classes=[7]"))
    assert len(found) == 6


def test_a_corruption_wraps_any_source(tmp_path):
    from test_sources import pixels, write_png

    for number in range(80):
        write_png(tmp_path / "ab"[number % 2] / f"{number}.png", pixels(number, (8, 8)))
    given = ["data=folder", f"data.root={tmp_path}", "corruption=truncated"]
    given += ["data.source.corruption.classes=[a]", "data.source.corruption.keep=3"]
    right = [*given, "data.source.source=bayesdiff.data.sources.folder"]
    found = instantiate(compose_list(right).data.source)
    assert found.labels.bincount().tolist()[0] == 3 and found.classes == ("a", "b")
    with pytest.raises(Exception) as error:  # the default reads digits
        instantiate(compose_list(given).data.source)
    line = explain(error.value)
    assert "data.source.source=bayesdiff.data.sources.digits cannot read this data" in line
    assert "\n" not in line


@pytest.mark.parametrize("source", ["nowhere", "bayesdiff.data.sources.nothing", "no.where.at"])
def test_a_source_that_is_not_there(source):
    with pytest.raises(UserError, match=f"data.source.source={source} cannot read this data"):
        corrupted(source, CORRUPTIONS["truncated"])


def test_the_curvature_sees_rare_images_as_all_others(compose: Compose):
    given = ["corruption=undertrained", "metrics.num_images=0", "laplace.num_images=null"]
    found = pipeline.run(compose(*given, "trainer.max_epochs=2"))
    assert found.settings["n_eff"] == 1497
    assert (found.folder / "metrics.json").is_file()


@pytest.fixture(scope="module")
def study():
    """The study's script, as it is imported by itself."""
    sys.path.insert(0, str(STUDY))
    try:
        import run

        yield run
    finally:
        sys.path.remove(str(STUDY))
        for name in ("run", "head", "pictures"):
            sys.modules.pop(name, None)


def test_areas_against_a_truth_made_by_hand(study):
    found = torch.tensor([True, False, True, False])
    table = {
        "right": torch.tensor([3.0, 1.0, 2.0, 0.0]),
        "opposite": torch.tensor([0.0, 2.0, 1.0, 3.0]),
        "one": torch.tensor([3.0, 1.0, 0.5, 0.0]),
        "none": torch.zeros(4),
        "unknown": torch.tensor([torch.inf, 1.0, torch.inf, torch.inf]),
    }
    areas = study.areas(table, found)
    expected = {"right": 1.0, "opposite": 0.0, "one": 0.75, "none": 0.5, "unknown": 0.75}
    assert areas == expected


def test_labels_that_are_few_or_affected(study):
    data = truncated(images(), ["c"], keep=4)
    labels = torch.tensor([0, 1, 2, 2])
    assert study.scarcity(data, labels).tolist() == [-20, -20, -4, -4]
    assert study.marked(labels, data.classes, ["b", "c"]).tolist() == [False, True, True, True]


def seed_with(value, luck=0.99, wrong=40, severe=None):
    """One seed's numbers: score a finds ``value``, b less; ``severe`` under severe corruption."""
    names = {"random": luck, "label.scarcity": 1.0, "real.realism": 1.0}
    table = names | {"a.sum": value, "b.sum": 1.2 - value}
    numbers = {"auroc": table, "wrong_auroc": table | {"a.sum": float("nan")}, "wrong": wrong}
    found = {case: numbers | {"clean_auroc": table} for case in ("truncated", "undertrained")}
    strong = found["truncated"] if severe is None else seed_with(severe)["truncated"]
    found |= {f"{case}_severe": strong for case in found}
    return found | {"mislabelled": found["truncated"]}


def test_the_choice_is_made_before_the_last_seed_and_the_target_judged_on_it(study):
    seeds = {"0": seed_with(0.9), "10": seed_with(0.2), "2": seed_with(0.8)}
    flat = study.summary(seeds)
    assert flat["truncated.best"] == "a.sum"  # nor random, nor the label, nor real images
    assert flat["truncated.best_auroc"] == 0.2 and not flat["targets_met"]
    assert flat["truncated.best_mean"] == pytest.approx(1.9 / 3)
    assert flat["truncated.a.sum.auroc"] == pytest.approx(1.9 / 3)
    low, high = flat["truncated.a.sum.interval"]
    # Student's t with 2 degrees of freedom: 4.3027 standard errors.
    spread = torch.tensor([0.9, 0.2, 0.8]).double().std() / 3**0.5
    assert high - low == pytest.approx(2 * 4.3026527 * float(spread))
    assert flat["truncated.a.sum.wrong_auroc"] == 0.5  # nothing to be found is chance
    met = study.summary({"0": seed_with(0.95), "1": seed_with(0.96)})
    assert met["targets_met"] and met["corruptions_found"] == 3
    assert "truncated.best" not in study.summary({"0": seed_with(0.95)})


def test_a_handful_of_wrong_images_counts_for_nothing(study):
    few = study.summary({"0": seed_with(0.2), "1": seed_with(0.2, wrong=2)})
    assert few["truncated.best"] == "b.sum" and "truncated.wrong_best" not in few
    assert few["wrong_corruptions_found"] == 0 and not few["wrong_targets_met"]
    many = study.summary({"0": seed_with(0.2), "1": seed_with(0.2)})
    assert many["truncated.wrong_best"] == "b.sum" and many["wrong_corruptions_found"] == 3


def test_severe_corruption_has_an_aim_of_its_own(study):
    seeds = {str(seed): seed_with(0.6, severe=0.95) for seed in (0, 1)}
    flat = study.summary(seeds)
    assert flat["corruptions_found"] == 0 and not flat["targets_met"]
    assert flat["severe_corruptions_found"] == 2 and flat["severe_targets_met"]
    lines = study.overrides("truncated_severe", 1)
    assert "corruption=truncated" in lines and "data.source.corruption.keep=2" in lines


def test_overrides_name_the_classes_of_the_seed(study):
    cfg = compose_list(study.overrides("mislabelled", 1))
    corruption = cfg.data.source.corruption
    assert (corruption.classes, corruption.into) == (["1", "7"], ["7", "1"])
    assert (cfg.seed, corruption.seed, cfg.metrics.seed) == (1, 1, 1)
    assert compose_list(study.overrides("clean", 1)).data.source._target_.endswith(".digits")


def test_the_head_sees_a_class_only_through_its_own_features(study, compose: Compose):
    """Counting the class's images again restores the ratio of one."""
    import head

    run, _, _, laplace = pipeline.prepare(compose("laplace.num_images=null"))
    posterior = laplace.fit(run.model.eval(), run.data.data)
    found = head.seen_by_the_head(run, posterior, run.data.data, 5)
    assert found["few"] == pytest.approx(1, abs=1e-3)  # nothing was cut
    cut = truncated(run.data.data, ["5"], keep=10)
    assert head.seen_by_the_head(run, posterior, cut, 5)["few"] > found["few"]


def test_the_study_runs_at_smoke_size(study, tmp_path, monkeypatch):
    monkeypatch.setattr("bayesdiff.metrics.classifier._epochs", lambda size: 1)
    maps = {
        "refined": Ensemble(members=2, noise_members=0),
        "ensemble": Ensemble(members=2, noise_members=0, seed=1),
        "published": Published(mc_samples=2, skip_interval=2),
    }
    monkeypatch.setattr(study, "MAPS", maps)
    monkeypatch.setattr(study, "SCORES", ScoreOptions(members=2, aleatoric_draws=2))
    monkeypatch.setattr(study.pictures, "MAPS", tuple(maps))
    given = [o for o in smallest(tmp_path / "out") if not o.startswith("uncertainty")]
    study.main(["1", *given], tmp_path, images=40)
    results = json.loads((tmp_path / "results.json").read_text())
    one = results["seeds"]["1"]["truncated"]
    assert one["affected"] == 4 and one["classes"] == ["2"] and one["training_images"] == {"2": 10}
    assert one["auroc"]["label.scarcity"] == 1.0 == results["truncated.label.scarcity.auroc"]
    assert set(one["all_counted"]) == {"sum", "mean_log", "relative_variance"}
    assert "published.sum" in one["auroc"] and "classifier.off_label" in one["auroc"]
    assert results["undertrained.label.scarcity.auroc"] == one["clean_auroc"]["label.scarcity"]
    made = {path.name for path in tmp_path.glob("*.*") if path.suffix != ".pdf"}
    pictures = {"auroc.png", "first-images-seed1.png", "captions.json"}
    assert made == {"results.json", "table.md"} | pictures
