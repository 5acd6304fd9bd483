"""metrics=clip and metrics=dinov2 as a user types them, with random weights."""

import pytest
import torch
from conftest import Compose
from test_bad_input import check_line, refused
from test_features import clip_state, dino_state
from test_sources import pixels, write_png

from bayesdiff import pipeline


@pytest.mark.parametrize("name", ["clip"])  # DINOv2 takes minutes for many training images
def test_metrics_of_an_encoder_carry_its_name(name, compose: Compose, tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"clip": clip_state, "dinov2": dino_state}[name](), path)
    for number in range(60):
        part = "test" if number < 12 else "train"
        write_png(tmp_path / "images" / part / f"{number}.png", pixels(number, (8, 8)))
    overrides = [f"metrics={name}", f"metrics.weights_path={path}", "metrics.num_images=12"]
    overrides += ["data=folder", f"data.root={tmp_path}/images", "data.batch_size=32"]
    overrides += ["laplace.num_images=48"]
    metrics = pipeline.run(compose(*overrides)).metrics
    for score in ("fid", "kid", "precision", "recall", "cmmd"):
        assert metrics[f"{score}@12/{name}"] == metrics[f"{score}@12/{name}"]
        assert f"real/{score}@12/{name}" in metrics
    assert f"is@12/{name}" not in metrics


def test_encoders_without_a_file_are_refused_before_any_work(compose: Compose, tmp_path):
    for name, file in (("clip", "ViT-B-32.pt"), ("dinov2", "dinov2_vitb14")):
        path = tmp_path / "none.pt"
        overrides = [f"metrics={name}", f"metrics.weights_path={path}", "metrics.num_images=12"]
        check_line(refused(compose, *overrides), ["none.pt does not exist", file])
