"""The scripts of experiments/filtering at smoke size."""

import json
import sys

import pytest
from conftest import QUICK_CLASSIFIER, ROOT, Trained, smallest
from test_filtering import SMALL

from bayesdiff.report.pictures import Pictures

STUDY = ROOT / "experiments" / "filtering"
BEST = "members.joint"


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Both scripts, writing elsewhere."""
    monkeypatch.syspath_prepend(str(STUDY))
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    import over_time
    import run

    monkeypatch.setattr(run, "HERE", tmp_path / "study")
    monkeypatch.setattr(*QUICK_CLASSIFIER)
    yield run, over_time
    for name in ("run", "over_time"):
        sys.modules.pop(name, None)


def test_the_study_and_its_times_agree(study, copied: Trained, tmp_path, monkeypatch):
    run, over_time = study
    given = smallest(tmp_path, *SMALL[1:])
    monkeypatch.setattr(run, "MODELS", {"digits": given})
    monkeypatch.setattr(over_time, "MODELS", {"digits": given})
    monkeypatch.setattr(run, "POOL", [])
    run.main(["digits"])
    folder = tmp_path / "study"
    results = json.loads((folder / "results.json").read_text())
    assert results["digits.best"] == BEST
    seeds = [results["models"]["digits"]["seeds"][seed] for seed in ("0", "5")]
    main = [
        {row["score"]: row for row in rows if (row["mode"], row["keep"]) == ("per_class", 0.8)}
        for rows in seeds
    ]
    assert results["digits.best_z"] == main[1][BEST]["z"]
    lead = sum(rows["random"]["fid"] - rows[BEST]["fid"] for rows in main) / 2
    assert results["digits.best_over.random"] == pytest.approx(lead)
    low, high = results["digits.per_class.ensemble.sum.interval"]
    assert low < results["digits.per_class.ensemble.sum.fid_gain"] < high
    made = {path.name for path in folder.glob("*.*")}
    assert made == {
        "digits.png", "digits.pdf", "captions.json", "results.json",
        "table-finds.md", "table-global.md", "table-per-class.md",
    }  # fmt: skip

    over_time.main(["digits"], folder)
    rows = json.loads((folder / "over-time.json").read_text())["digits"]
    assert rows[-1]["time"] == 1.0 and (folder / "over-time.png").is_file()
    # At the end of the trajectory it is the map's own sum.
    assert rows[-1]["z"] == pytest.approx(results["digits.per_class.ensemble.sum.z"], rel=1e-4)
