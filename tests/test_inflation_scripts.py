"""Scripts of the studies of inflationary flows: what is cut, judged, drawn and collected."""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from bayesdiff.data.spaces import Pixels
from bayesdiff.runs.invertible import InvertibleFlow


def script(study, name, tmp_path, monkeypatch):
    path = ROOT / "experiments" / study / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_of_{study}".replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HERE", tmp_path)
    return module


def test_numbers_of_a_latent_that_are_cut(tmp_path, monkeypatch):
    few = script("inflation-images", "few", tmp_path, monkeypatch)
    z = torch.randn(3, 1, 2, 2)
    assert torch.equal(few.cut(z, 4), z)
    kept = few.cut(z, 1).flatten(1)
    assert torch.equal(kept[:, 0], z.flatten(1)[:, 0]) and not kept[:, 1:].any()
    images = torch.randint(0, 256, (5, 1, 2, 2), dtype=torch.uint8)
    data = SimpleNamespace(test_images=images, images=images)
    space = Pixels(data)

    class Still(InvertibleFlow):
        def encode(self, data, condition=None):
            return data.float() / 127.5 - 1

        def decode(self, latents, condition=None):
            return latents

    flow = Still(None, space, None, "")
    found, rows = few.of_flow(flow, data, lambda x: float(len(x)), 6, [4, 2])
    assert found["keep_4.grey_mse"] == pytest.approx(0, abs=1e-6) and found["keep_2.fid"] == 6
    lost = images.float().flatten(1)[:, 2:] - 127.5
    assert found["keep_2.grey_mse"] == pytest.approx(float(lost.square().sum() / 20), rel=1e-5)
    assert few.drawn(rows, "made so").axes
    assert few.name_of(SimpleNamespace(path=SimpleNamespace(dims_to_keep=None))) == "prp"


def leave(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text)


def test_numbers_of_runs_are_collected(tmp_path, monkeypatch):
    config = "data: {name: circles}\npath: {schedule: prp, dims_to_keep: null}\n"
    files = {
        ".hydra/config.yaml": config, "fit.json": {},
        "stages.jsonl": {"stage": "training", "amount": 8190, "seconds": 9.0},
        "heun-1/metrics.json": {
            "metrics": {"sliced_wasserstein@2k": 0.04, "fid@1k/classifier": 3.0},
        },
        "inversion-heun-1/results.json": {
            "round_trip_mse": 1e-9, "psnr": 80.0, "conditions": {"nfe": 120},
        },
        "coverage-heun-1/results.json": {"coverage_error": 0.01, "changed_sides": 3},
        "inference-heun-1/results.json": {
            "headlines": {"inference/weights_covered": 1.0, "inference/speedup": 30.0},
        },
    }  # fmt: skip
    leave(tmp_path / "out" / "run", files)
    toys = script("inflation-toys", "collect", tmp_path, monkeypatch)
    toys.main([str(tmp_path / "out")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["circles_prp.round_trip_mse"] == 1e-9 and found["circles_prp.changed_sides"] == 3
    assert found["hmc.weights_covered"] == 1 and found["hmc.speedup"] == 30
    assert found["circles_prp.training.seconds"] == 9
    images = script("inflation-images", "collect", tmp_path, monkeypatch)
    leave(tmp_path, {"few_numbers.json": {"prp.keep_2.fid": 9.0}})
    images.main([str(tmp_path / "out")])
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["prp.fid@1k/classifier"] == 3 and found["prp.round_trip_nfe"] == 120
    assert found["prp.psnr"] == 80 and found["prp.keep_2.fid"] == 9
