"""Curvature pass, training and sweep against what they are made of, side by side in one run."""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from last_layer import peak_mib
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bayesdiff import pipeline
from bayesdiff.data.images import ImageData
from bayesdiff.data.module import ImageDataModule
from bayesdiff.data.spaces import to_model_range
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.machine.device import autocast_dtype
from bayesdiff.models import GenerativeModel
from bayesdiff.networks import UNet
from bayesdiff.paths import CondOT
from bayesdiff.runs.setup import Setup
from bayesdiff.runs.stages import make_maps
from bayesdiff.runs.training import fit
from bayesdiff.storage.artefacts import Artefact

ROOT = Path(__file__).parents[2]


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def paired(ours: Callable[[], Any], other: Callable[[], Any], repeats: int) -> tuple[float, float]:
    """Median seconds of both, in turn, after one warm-up of each."""
    ours(), other()
    runs = [(seconds(ours), seconds(other)) for _ in range(repeats)]
    first, second = zip(*runs, strict=True)
    return statistics.median(first), statistics.median(second)


def flow(channels: tuple[int, ...], **net: Any) -> GenerativeModel:
    """A small flow on 28x28 grey images."""
    torch.manual_seed(0)
    optimizer = partial(torch.optim.AdamW, lr=1e-3, fused=True)
    return GenerativeModel(
        UNet(1, 28, 10, channels=channels, **net), CondOT(), "velocity", optimizer, num_classes=10
    )


def made_up(count: int) -> tuple[Tensor, Tensor]:
    """Images that cost what real ones cost, and labels."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, 10, (count,), generator=generator)


def curvature_pass(repeats: int, images: int = 64) -> list[dict[str, Any]]:
    """The whole pass (features, Gram matrix, residuals) over computing the features alone."""
    x, y = made_up(images)
    rows = []
    for kernel in (1, 3):
        for width in (32, 64, 128):
            model = flow((width, 2 * width), blocks=1, head_kernel=kernel).eval()
            t = torch.rand(images)

            @torch.inference_mode()
            def features_alone(model: GenerativeModel = model, t: Tensor = t) -> None:
                model.net.features(to_model_range(x), t, y)

            whole = partial(fit_curvature, model, x, y, source="benchmark", batch_size=64)
            ours, alone = paired(whole, features_alone, repeats)
            rows.append(
                {
                    "name": "curvature_pass_over_features",
                    "features": width,
                    "kernel_size": kernel,
                    "images": images,
                    "ours_seconds": ours,
                    "theirs_seconds": alone,
                    "ratio": ours / alone,
                    "ours_peak_mib": peak_mib(whole),
                    "theirs_peak_mib": peak_mib(features_alone),
                }
            )
    return rows


class PlainImages(Dataset):
    """One PIL image and one conversion per item, as in most training scripts."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images[:, 0].numpy()
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from torchvision.transforms.functional import normalize, to_tensor

        image = Image.fromarray(self.images[index])
        return normalize(to_tensor(image), [0.5], [0.5]), self.labels[index]


def training(repeats: int, batches: int = 8) -> dict[str, Any]:
    """Images per second of ``Trainer.fit`` against a plain fp32, contiguous DataLoader loop."""
    x, y = made_up(128 * batches)
    data = ImageData.build("made-up", x, y, x[:128], y[:128], tuple("0123456789"))
    precision = "bf16-mixed" if autocast_dtype(torch.device("cpu")) else "32-true"

    def ours(epochs: int = 1) -> None:
        model = flow((64, 128), patch=2)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            precision=precision,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(model, datamodule=ImageDataModule(data, batch_size=128))

    def plain() -> None:
        net = flow((64, 128), patch=2).net.to(memory_format=torch.contiguous_format)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        for images, labels in DataLoader(PlainImages(x, y), batch_size=128, shuffle=True):
            t, x_0 = torch.rand(len(images)), torch.randn_like(images)
            x_t = t[:, None, None, None] * images + (1 - t[:, None, None, None]) * x_0
            loss = (net(x_t, t, labels) - (images - x_0)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()

    fast, slow = paired(ours, plain, repeats)
    return {
        "name": "train_vs_plain_loop",
        "images": len(x),
        "ours_seconds": fast,
        "theirs_seconds": slow,
        "ratio": slow / fast,
        "ours_peak_mib": peak_mib(ours),
        "theirs_peak_mib": peak_mib(plain),
    }


SMOKE = [
    "metrics.num_images=0", "uncertainty=ensemble", "uncertainty.num_images=16",
    "trainer.max_epochs=10",
]  # fmt: skip


def sweep(repeats: int) -> dict[str, Any]:
    """A three-cell prior sweep over one run (train, fit, sample) and two more samplings."""
    whole, parts = [], []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            given = [f"output_dir={folder}/sweep", *SMOKE]
            command = [sys.executable, "sweep.py", "-m", "laplace.prior_precision=1,10,100"]
            whole.append(seconds(partial(silent, [*command, *given])))
            given = [f"output_dir={folder}/one", *SMOKE]
            one = seconds(partial(silent, [sys.executable, "train.py", *given]))
            parts.append(one + 2 * sampling(given, Path(folder)))
    ours, theirs = statistics.median(whole), statistics.median(parts)
    return {
        "name": "sweep_overhead",
        "ours_seconds": ours,
        "theirs_seconds": theirs,
        "ratio": ours / theirs,
        "largest_process_mib": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }


def silent(command: list[str]) -> None:
    """Run a command of the project from its root, and fail if it fails."""
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)


def sampling(overrides: list[str], folder: Path) -> float:
    """Seconds of one more set of maps for a finished training."""
    cfg = pipeline.compose(*overrides)
    run, solver, estimator, laplace = pipeline.prepare(cfg)
    weights = fit(run, laplace)
    posterior = laplace.fit(run.model.eval(), run.data.data)
    setup = Setup(run, solver, estimator, posterior, weights)
    return seconds(lambda: make_maps(setup, Artefact(folder / "a.npz", "new")))
