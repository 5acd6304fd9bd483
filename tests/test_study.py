"""What studies share: no name is known, keys hold what has an effect and nothing else."""

import json
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from conftest import Compose, Trained, compose_list, smallest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.report import board
from bayesdiff.report.pictures import Pictures
from bayesdiff.runs.address import maps_settings, scores_at
from bayesdiff.runs.setup import Setup, with_effect
from bayesdiff.studies import image_pool as pools
from bayesdiff.studies import study
from bayesdiff.studies.filtering.filtering import Filtering
from bayesdiff.studies.image_pool import ImagePool
from bayesdiff.studies.interpolation.interpolation import Interpolation
from bayesdiff.studies.repair.repair import Repair
from bayesdiff.studies.study import Report, Study, conditions, study_key
from bayesdiff.uncertainty import Ensemble, Linearised, Refined

# All that keys read of one.
POSTERIOR = SimpleNamespace(curvature=SimpleNamespace(source="x"), settings=[])

ALL = (
    "experiment=filtering",
    "metrics.num_images=0",
    "solver.num_steps=5",
    "filtering.num_images=40",
    "filtering.keep=[0.5,0.8]",
    "interpolation={_target_:bayesdiff.studies.interpolation.interpolation.Interpolation}",
    "repair={_target_:bayesdiff.studies.repair.repair.Repair,num_images:6,from_time:[0.2]}",
)
MINE = ("+mine={_target_:test_study.Mine,factor:2,batch_size:3}", "metrics.num_images=0")


@dataclass(frozen=True, kw_only=True)
class Mine(Study):
    """A study of somebody else's."""

    factor: int
    batch_size: int = 1

    @property
    def map_count(self):
        return 1000

    def check(self, run, solver, estimator):
        if self.factor > 9:
            raise UserError(f"mine.factor={self.factor} is too much; give less")

    def make(self, at, place):
        return Report(
            {"steps": self.factor * at.solver.num_steps},
            tables={"table.md": conditions(at.settings)},
            scalars={"factor": self.factor},
            headlines={"factor": self.factor, "none": None},
        )


def test_a_new_study_is_one_class_and_nobody_else_knows_its_name(
    copied: Trained, compose: Compose, monkeypatch
):
    monkeypatch.setattr(Pictures, "every", lambda *_: ())
    told = []
    real = board.write_study
    monkeypatch.setattr(
        board, "write_study", lambda *given, **more: told.append(given) or real(*given, **more)
    )
    result = pipeline.run(compose(*MINE))
    (folder,) = result.studies
    assert folder.parent == copied.folder and folder.name.startswith("mine-euler-")
    results = json.loads((folder / "results.json").read_text())
    assert results["steps"] == 6 and results["headlines"] == {"mine/factor": 2, "mine/none": None}
    assert result.headlines == {"mine/factor": 2.0} and result.metrics["mine/factor"] == 2
    assert "mine" in result.folder.name
    caption = (folder / "table.md").read_text().replace("\u00a0", " ")
    for word in ("digits", "euler, 3 steps", "seed 0", "posterior full", "estimator ensemble"):
        assert word in caption
    # Loggers get the run's settings beside the study's own.
    ((_, scalars, _, _, loggers, hparams),) = told
    assert scalars == {"mine/factor": 2} and loggers.kind == "mine"
    assert hparams["solver.name"] == "euler" and hparams["mine"]["factor"] == 2
    monkeypatch.setattr(Mine, "make", None)
    assert pipeline.run(compose(*MINE, "mine.batch_size=1")).studies == (folder,)
    with pytest.raises(UserError, match="mine.factor=10 is too much"):
        pipeline.prepare(compose(*MINE, "mine.factor=10"))


@pytest.mark.parametrize(
    "override", ["filtering=3", "+repair.num_images=3", "ablation={_target_:builtins.dict}"]
)
def test_what_is_no_study_is_refused(override, compose: Compose):
    with pytest.raises(UserError, match="is no study; ask for one by experiment="):
        pipeline.prepare(compose(override))


def test_every_map_of_the_own_estimator_counts(compose: Compose):
    assert Filtering(num_images=100, keep=[0.8], seeds=[3, 4]).map_count == 200
    assert Interpolation(pairs=5, points=3).map_count == 15
    assert Interpolation(pairs=[[0, 10]], points=5).map_count == 5
    assert Repair(num_images=7).map_count == 7
    assert Repair(images=[3, 5, 8]).map_count == 3
    boxes = {3: [0, 0, 2, 2], 5: [0, 0, 2, 2]}
    assert Repair(region=boxes).map_count == 2
    # An image's own map, and from each of two times on one of it and of each alternative.
    times, ways = [0.3, 0.5], ["independent", "isotropic", "fresh"]
    few = Repair(num_images=1, from_time=times, ways=ways, draws=4, score="map.sum")
    assert few.map_count == 1 + 2 * (1 + 2 * 4) + 4
    auto = ("uncertainty=auto", "uncertainty.train_images=1000", "uncertainty.epochs=30")
    cfg = compose(*auto, "experiment=rectify", "repair.region={3:[0,0,2,2]}",
                  "solver.num_steps=20")  # fmt: skip
    assert isinstance(pipeline.prepare(cfg)[2], Ensemble)
    for many in (MINE, ("experiment=interpolation", "interpolation.pairs=500")):
        assert isinstance(pipeline.prepare(compose(*auto, *many))[2], Refined)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A run with three studies, and its solver: keys read no more of it than the configuration."""
    folder = tmp_path_factory.mktemp("ready")
    return pipeline.prepare(compose_list(smallest(folder, *ALL)))[:2]


def keys(ready, *overrides):
    """Keys of all studies under further settings, and the run with them."""
    cfg = OmegaConf.create(OmegaConf.to_container(ready[0].cfg))
    cfg.merge_with_dotlist(list(overrides))
    run = replace(ready[0], cfg=cfg, studies=study.studies_of(cfg))
    at = Setup(run, ready[1], instantiate(cfg.uncertainty), POSTERIOR, "x")
    return {name: study_key(at, name, each) for name, each in run.studies.items()}, run


def test_what_changes_no_number_makes_no_study_anew(ready):
    before, run = keys(ready)
    assert len(set(before.values())) == 3
    idle = ("uncertainty.num_images=9", "uncertainty.times=[0.5]", "uncertainty.units=unit",
            "uncertainty.batch_size=7", "metrics.batch_size=7", "metrics.num_images=20",
            "filtering.maps.published.batch_size=3")  # fmt: skip
    same, other = keys(ready, *idle)
    assert same == before
    assert scores_at(run, "x") == scores_at(other, "x")
    for override, changed in (
        ("uncertainty.members=3", {*before}),
        ("metrics.seed=1", {"filtering", "repair"}),
        ("filtering.maps.published.skip_interval=2", {"filtering"}),
        ("interpolation.seed=1", {"interpolation"}),
    ):
        after, _ = keys(ready, override)
        assert {name for name in before if before[name] != after[name]} == changed


OWN = """
import bayesdiff.uncertainty

class Own(bayesdiff.uncertainty.Ensemble):
    name = "own"

def mask(images):
    return images[:, :1] > 0
"""


def test_the_users_code_is_in_the_keys_of_studies_and_pools(ready, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(tmp_path))
    files = {name: tmp_path / f"own_{name}.py" for name in ("run", "maps", "mask")}
    for file in files.values():
        file.write_text(OWN)
    given = (
        "uncertainty._target_=own_run.Own",
        "filtering.maps.mine._target_=own_maps.Own",
        "filtering.segmentation._target_=own_mask.mask",
        "filtering.segmentation._partial_=true",
    )
    before, run = keys(ready, *given)
    parts = {name: pools._code(each) for name, each in run.studies["filtering"].maps.items()}
    assert parts["mine"].keys() == {"own_maps"}
    for name, changed in (
        ("run", {*before}),
        ("maps", {"filtering"}),
        ("mask", {"filtering"}),
    ):
        files[name].write_text(OWN + "# another\n")
        monkeypatch.delitem(sys.modules, f"own_{name}")  # as the next command loads it
        after, run = keys(ready, *given)
        assert {name for name in before if before[name] != after[name]} == changed
        before = after
    assert pools._code(run.studies["filtering"].maps["mine"]) != parts["mine"]


def test_an_ensemble_in_place_of_another_makes_the_very_maps_of_an_ensemble(compose: Compose):
    auto = pipeline.prepare(compose("uncertainty=auto"))
    plain = pipeline.prepare(
        compose("uncertainty=ensemble", "uncertainty.members=16", "uncertainty.noise_members=8")
    )
    assert auto[0].instead_of == "refined, for few maps" and plain[0].instead_of is None
    assert replace(auto[2], batch_size=2) == replace(plain[2], batch_size=2)
    assert maps_settings(auto[0], auto[2]) == maps_settings(plain[0], plain[2])


def test_a_posterior_of_the_last_block_is_followed_by_sensitivities(compose: Compose):
    estimator = pipeline.prepare(compose("uncertainty=auto", "laplace.subset=last_block"))[2]
    assert isinstance(estimator, Linearised)


def test_boxes_of_a_file_stand_in_the_configuration(ready, tmp_path):
    file = tmp_path / "boxes.json"
    file.write_text('{"7": [0, 0, 2, 3], "2": [4, 4, 4, 4]}')
    before, run = keys(ready, f"repair.region={file}")
    boxes = {7: [0, 0, 2, 3], 2: [4, 4, 4, 4]}
    assert OmegaConf.to_container(run.cfg.repair.region) == boxes
    run.cfg.repair.region = dict(reversed(boxes.items()))
    assert keys((run, ready[1]))[0] == before
    file.write_text('{"7": [0, 0, 2, 3], "2": [4, 4, 2, 4]}')
    assert keys(ready, f"repair.region={file}")[0]["repair"] != before["repair"]


def test_a_pool_smaller_than_the_maps_that_are_validated_is_made(
    copied: Trained, compose: Compose, monkeypatch
):
    monkeypatch.setattr(pools, "BLOCK", 4)
    import torch

    more = ("uncertainty.validate=true", "uncertainty.validate_images=3")
    run, solver, estimator, laplace = pipeline.prepare(compose(*more))
    run.model.load_state_dict(torch.load(copied.checkpoint, weights_only=True)["state_dict"])
    posterior = laplace.fit(run.model.eval(), run.data.data)
    at = Setup(run, solver, estimator, posterior, "x")
    assert len(ImagePool(at, 5, 3).maps(estimator).images) == 5
    assert with_effect(run.cfg.uncertainty).keys() & {"validate", "num_images"} == {"num_images"}
