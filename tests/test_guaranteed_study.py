"""The guarantee within a filtering: one run, its labels, other trainings, refusals."""

import json
import shutil

import pytest
import torch
from conftest import QUICK_CLASSIFIER, Trained, compose_list, smallest
from test_filtering import SMALL

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.data.spaces import to_uint8
from bayesdiff.metrics.features import extract
from bayesdiff.report.pictures import Pictures
from bayesdiff.runs.scores import judge
from bayesdiff.runs.setup import starts
from bayesdiff.solvers import integrate
from bayesdiff.studies.filtering import guarantee_sheet
from bayesdiff.studies.filtering.calibration import guarantee_results
from bayesdiff.studies.filtering.filtering import Filtering
from bayesdiff.studies.filtering.guarantee import guaranteed
from bayesdiff.studies.filtering.guaranteed import Marked
from bayesdiff.studies.filtering.labels import read_labels

# A training of two batches: what is good of its images is a matter of chance.
ASKED = (
    "filtering.guarantee=0.1",
    "filtering.guarantee_level=0.3",
    "filtering.guarantee_score=classifier.class_entropy",
    "filtering.judge=0.05",
    "filtering.members=0",
    "filtering.aleatoric_draws=0",
    "filtering.rules=[]",
    "filtering.keep=[0.5]",
    "filtering.main_keep=0.5",
    "~filtering.maps.published",
)
GUARANTEED = (*(o for o in SMALL if "published" not in o), *ASKED)


@pytest.fixture(scope="module")
def filtered(trained: Trained, tmp_path_factory):
    """A filtering with another training beside it: its folder, results and what was given."""
    place = tmp_path_factory.mktemp("guaranteed")
    here, other = trained.copy_to(place / "here"), place / "other"
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*QUICK_CLASSIFIER)
        patch.setattr(Pictures, "every", lambda *_: ())
        pipeline.run(compose_list(smallest(other, "seed=1", "metrics.num_images=0")))
        (training,) = other.glob("digits-flow-*")
        drawn = guarantee_sheet.kept_and_bad
        patch.setattr(guarantee_sheet, "kept_and_bad", lambda *a: seen.append(a) or drawn(*a))
        words = [*GUARANTEED, f"filtering.also=[{training}]"]
        cfg = compose_list(smallest(place / "here", *words))
        (folder,) = pipeline.run(cfg).studies
        yield here, folder, json.loads((folder / "results.json").read_text()), seen, training


def test_the_threshold_is_that_of_the_first_pool(filtered):
    _, folder, results, seen, _ = filtered
    found = results["guarantee"]
    assert found["asked"] == 0.1 and found["score"] == "classifier.class_entropy"
    assert [row["seed"] for row in found["seeds"]] == [5] and found["calibration"]["seed"] == 0
    ((samples, marked, shown, _),) = seen
    row = found["seeds"][0]
    assert found["seeds"][0]["kept"] and found["holds"]
    keep = marked.scores <= shown["threshold"]
    assert (row["kept"], row["bad"]) == (int(keep.sum()), int((keep & marked.bad).sum()))
    assert row["images"] == len(samples.images) == 40
    if row["kept"]:
        assert row["risk_low"] <= row["risk"] == row["bad"] / row["kept"] <= row["risk_high"]
    headlines = results["headlines"]
    assert headlines["filtering/guarantee/kept@0.1"] == found["new_noise"]["share_kept"]
    assert "calibration, seed 0" in (folder / "table-guarantee.md").read_text()
    names = {path.stem for path in (folder / "figures").glob("*.png")}
    assert "kept_and_discarded_by_guarantee" in names


def test_another_training_makes_its_own_images_of_noise_that_did_not_calibrate(filtered):
    here, _, results, _, training = filtered
    rows = results["guarantee"]["also"]
    assert [(row["training"], row["seed"]) for row in rows] == [(str(training), 5)]
    (place,) = (here.folder / "also").iterdir()
    assert list(place.glob("curvature-*")) and list((place / "pools").glob("*-seed5-*"))
    assert not list((place / "pools").glob("*-seed0-*"))
    # Judged as a run of these weights would be.
    cfg = compose_list(smallest(training.parent, "seed=1", "metrics.num_images=0"))
    run, solver, _, laplace = pipeline.prepare(cfg)
    pipeline.fit(run, laplace)
    run.model.eval()
    start = starts(run, solver, 5)(range(40))
    with torch.no_grad():
        images = integrate(start.field(), start.steps(), start.initial(), start.draw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*QUICK_CLASSIFIER)
        run.cfg.output_dir = str(here.output_dir)
        logits = extract(judge(run)[0], to_uint8(images), 64).logits
    own = logits.double().softmax(1).gather(1, start.labels[:, None]).squeeze(1)
    assert rows[0]["risk_of_all"] == pytest.approx(float((own < 0.05).double().mean()))


def labels_file(place, *lines):
    file = place / "bad.csv"
    file.write_text("\n".join(lines) + "\n")
    return str(file)


def test_labels_are_read_by_number_and_seed(tmp_path):
    file = labels_file(tmp_path, "number, bad", "3,1", "", "0, 0")
    assert read_labels(file, [7, 1], 5) == {7: {3: True, 0: False}}
    file = labels_file(tmp_path, "seed,bad,number,remark", "1,0,4,odd stroke", "7,1,4,")
    assert read_labels(file, [7, 1], 5) == {1: {4: False}, 7: {4: True}}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["number,good", "1,1"],
            r"bad.csv, line 1 has columns \['number', 'good'\]; give a first",
        ),
        (["number,bad", "1,1,0"], "line 2 has 3 values for 2 columns"),
        (["number,bad", "1,0", "2,yes"], "line 3 has bad='yes'; give 0 or 1"),
        (["number,bad", "5,0"], "line 2 has number='5'; give a number below .*num_images=5"),
        (["number,bad", "-1,0"], "line 2 has number='-1'; give a number"),
        (["seed,number,bad", "2,1,0"], r"line 2 has seed='2'; give one of filtering.seeds=\[7"),
        (["number,bad", "1,0", "1,1"], "line 3 has number=1 of seed 7 again; give it once"),
        ([""], "line 1 has columns"),
    ],
)
def test_labels_that_cannot_be_are_refused_in_one_line(lines, message, tmp_path):
    with pytest.raises(UserError, match=message) as refusal:
        read_labels(labels_file(tmp_path, *lines), [7, 1], 5)
    assert "\n" not in str(refusal.value)


SCORE = "filtering.guarantee_score"
FEW = ("filtering.guarantee=0.9", "filtering.num_images=60", "filtering.keep=[0.8]")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["filtering.guarantee=0.99"], "guarantee=0.99: 40 calibration images test 20, .*189"),
        ([f"{SCORE}=members.joint"], "ranks an image among the others .* use members.predictive"),
        ([f"{SCORE}=members.log_det"], "members.log_det reads members; give filtering.members"),
        ([f"{SCORE}=image.size"], f"unknown {SCORE}=image.size; choose from .*image.saturation"),
        (["filtering.seeds=[3]"], r"calibrates on the first of filtering.seeds=\[3\]"),
        (["filtering.labels=none.csv"], "filtering.labels=none.csv cannot be read as CSV"),
        (["filtering.also=[none]"], "filtering.also names none, where nothing is"),
        (["filtering.also=[none,none]"], "filtering.also=.* names one twice"),
        (
            ["model.num_classes=null", "filtering.judge=class"],
            "filtering.judge=class needs classes, .* filtering.judge=0.9",
        ),
    ],
)
def test_what_cannot_be_guaranteed_is_refused_before_any_work(options, message, compose):
    with pytest.raises(UserError, match=message) as refusal:
        pipeline.prepare(compose(*GUARANTEED, *options))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"guarantee": 1.5}, "filtering.guarantee must be .* below 1, got 1.5"),
        ({"guarantee": 0}, "filtering.guarantee=0 asks for nothing"),
        ({"guarantee": 0.9, "guarantee_level": 0}, "filtering.guarantee_level=0 asks for nothing"),
        ({"guarantee": 0.9, "judge": "human"}, "unknown filtering.judge 'human'; choose class, "),
        ({"guarantee": 0.9, "judge": 0}, "unknown filtering.judge 0; choose class, or a prob"),
        ({"guarantee": 0.9, "labels": 3}, "filtering.labels must be a path, got 3"),
        ({"guarantee": 0.9, "labels": "a.csv", "also": ["b"]}, "filtering.labels are of this tr"),
        ({"also": ["a"]}, "filtering.also is read for filtering.guarantee"),
        ({"labels": "a.csv"}, "filtering.labels is read for filtering.guarantee"),
    ],
)
def test_values_that_mean_nothing_are_refused(given, message):
    with pytest.raises(UserError, match=message) as refusal:
        Filtering(**given)
    assert "\n" not in str(refusal.value)


def test_other_trainings_are_others_of_the_same_kind(copied: Trained, compose):
    with pytest.raises(UserError, match="filtering.also=.* names this run itself"):
        pipeline.prepare(compose(*GUARANTEED, f"filtering.also=[{copied.folder}]"))
    elsewhere = copied.folder.with_name("other")
    shutil.copytree(copied.folder, elsewhere)
    odd = ("net.blocks=2", f"filtering.also=[{elsewhere}]")
    with pytest.raises(UserError, match="was trained with net.blocks=.*, not "):
        pipeline.prepare(compose(*GUARANTEED, *odd))


def test_labels_take_the_place_of_the_judge(tmp_path):
    lines = [f"{seed},{k},{int(k % 4 == 0)}" for seed in (0, 5) for k in range(0, 40 - seed, 1)]
    file = labels_file(tmp_path, "seed,number,bad", *lines)
    options = Filtering(guarantee=0.5, labels=file, seeds=[0, 5, 6], num_images=40)
    labels = read_labels(file, [0, 5, 6], 40)
    score = torch.arange(40.0)
    pools = {
        seed: options.mark(score, torch.zeros(40, 3), None, labels.get(seed, {}))
        for seed in (0, 5, 6)
    }
    found = guarantee_results(options, pools)
    assert found["bad"] == "labelled so in bad.csv"
    assert [row["seed"] for row in found["seeds"]] == [5]  # the last has no label
    assert found["seeds"][0]["images"] == 35
    bad = torch.arange(40) % 4 == 0
    assert found["threshold"] == guaranteed(score, bad, 0.5, 0.1)
    assert found["calibration"]["risk_of_all"] == 0.25


def test_nothing_is_kept_in_words_where_no_threshold_holds(caplog):
    options = Filtering(guarantee=0.9, seeds=[0, 1])
    all_bad = Marked(torch.arange(100), torch.rand(100), torch.ones(100).bool())
    found = guarantee_results(options, {0: all_bad, 1: all_bad})
    assert not found["holds"] and found["threshold"] is None and found["new_noise"]["kept"] == 0
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("filtering.guarantee=0.9: no threshold of members.predictive_entropy ")
    assert line.endswith("nothing is kept (of all images 1 are bad)")


def test_the_judge_looks_at_the_class_or_at_its_probability():
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.1, 0.0]])
    labels = torch.tensor([0, 0, 0])
    assert Filtering(guarantee=0.9).bad_by_judge(logits, labels).tolist() == [0, 1, 0]
    # Probabilities of the label 0.88, 0.12, 0.52; of the likeliest class 0.88, 0.88, 0.52.
    sure = Filtering(guarantee=0.9, judge=0.6)
    assert sure.bad_by_judge(logits, labels).tolist() == [0, 1, 1]
    assert sure.bad_by_judge(logits, None).tolist() == [0, 0, 1]
