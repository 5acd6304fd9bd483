"""The script of experiments/guarantee, on the smallest run and on hand-made images."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import QUICK_CLASSIFIER, ROOT, Trained, compose_list, smallest

from bayesdiff import pipeline
from bayesdiff.runs.training import fit


@pytest.fixture
def script(monkeypatch, tmp_path):
    """run.py, writing elsewhere; its networks are the smallest run."""

    def prepared(setting, seed, *words):
        run, solver, _, laplace = pipeline.prepare(compose_list(smallest(tmp_path, *words)))
        fit(run, laplace)
        return run, solver, laplace

    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(prepared=prepared))
    monkeypatch.syspath_prepend(str(ROOT / "experiments" / "guarantee"))
    monkeypatch.setattr(*QUICK_CLASSIFIER)
    import run

    (tmp_path / "study").mkdir()
    monkeypatch.setattr(run, "HERE", tmp_path / "study")
    for name, value in (("COUNT", 30), ("CALIBRATION", 40), ("NOISE", (0, 1)), ("SPLITS", 3)):
        monkeypatch.setattr(run, name, value)
    yield run
    sys.modules.pop("run", None)


def test_the_script_writes_what_it_promises(script, copied: Trained, monkeypatch, tmp_path):
    monkeypatch.setattr(script, "ASKED", (0.2,))
    script.main(["digits_flow", "seed=0", "members=2"])
    found = json.loads((tmp_path / "study" / "results.json").read_text())
    assert found["conditions"]["images"] == 60
    (setting,) = found["settings"]
    rows = {row["score"]: row for row in found["settings"][setting]["rows"]}
    assert rows.keys() == {script.MAIN, script.OF_MEMBERS, script.RANDOM}
    assert all(row["splits"] == 3 for row in rows.values())
    assert found["guarantee.violations"] == rows[script.MAIN]["violations"]
    assert found["guarantee.digits_flow.0.2.kept"] == rows[script.MAIN]["kept"]
    made = {path.name for path in (tmp_path / "study").iterdir()}
    assert {"results.json", "table.md", "asked-and-found.png"} <= made


def test_violations_are_those_of_the_population_that_the_splits_are_drawn_from(
    script, monkeypatch
):
    generator = torch.Generator().manual_seed(0)

    def images(shift):
        scores = torch.rand(1500, generator=generator, dtype=torch.float64)
        bad = torch.rand(1500, generator=generator).double() < scores**3 + shift
        noise = torch.rand(1500, generator=generator, dtype=torch.float64)
        return {script.MAIN: scores, script.RANDOM: noise}, bad

    for name, value in (("CALIBRATION", 500), ("SPLITS", 40), ("ASKED", (0.9,))):
        monkeypatch.setattr(script, name, value)
    found = script.measured("digits_flow", {0: images(0.0), 1: images(0.3)})
    rows = {row["score"]: row for row in found["rows"]}
    good = next(row for row in found["trainings"] if row["seed"] == 0)
    # Up to s the risk is s^3 / 4, 0.1 at 0.74; the other training is bad everywhere.
    assert good["holds"] == 1 and 0.5 < good["kept"] < 0.74 and good["risk"] < 0.1
    assert good["violations"] <= 0.1 + 3 * (0.09 / 40) ** 0.5 < good["plain_violations"]
    assert good["other_violations"] == 1 and good["other_risk"] > 0.3
    assert rows[script.RANDOM]["holds"] == 0 and rows[script.RANDOM]["violations"] == 0
    assert script.flat({"digits_flow": found})["guarantee.random.violations"] == 0
