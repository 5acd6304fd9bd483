"""Scores of samples: FID and its kin for pictures, distances between samples for points."""

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from hydra.utils import get_object
from omegaconf import DictConfig
from torch import Tensor

from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.machine.ranks import rank
from bayesdiff.metrics import named_encoders
from bayesdiff.metrics.classifier import check_classifiable
from bayesdiff.options.targets import by_name, word_of
from bayesdiff.runs.build import Run, is_main_process
from bayesdiff.storage.artefacts import Artefact
from bayesdiff.uncertainty.chosen import check_export

if TYPE_CHECKING:  # these import torch-fidelity, which costs seconds
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    from bayesdiff.metrics.scores import Reference


class Scores(Protocol):
    """What compares samples with data; ``Space.scores`` names one."""

    def check(self, run: Run) -> None:
        """Refuse, before any work, what could not be computed."""
        ...

    def __call__(self, run: Run, images: Tensor) -> dict[str, float]:
        """Numbers by names that carry their conditions; samples are as data is stored."""
        ...


def scores_of(run: Run) -> Scores:
    """The scores that the space of the data asks for."""
    return get_object(run.data.space.scores)()


def check_metrics(run: Run) -> None:
    """Refuse scores that could not be computed once the images are there.

    Raises:
        UserError: for bad values, data without labels, or Inception weights that are not there.
    """
    cfg = run.cfg.metrics
    check_export("metrics.export", cfg.export, run, cfg.num_images)
    at_least("metrics.batch_size", cfg.batch_size)
    seed_of("metrics.seed", cfg.seed)
    if not isinstance(cfg.features, DictConfig):
        by_name(named_encoders, cfg.features, "metrics.features")
    if at_least("metrics.num_images", cfg.num_images, 0) == 1:
        raise UserError("metrics.num_images=1 cannot be scored; give 2 or more, or 0 for none")
    if cfg.num_images:
        scores_of(run).check(run)


def make_scores(run: Run, images: Tensor, file: Artefact) -> dict[str, float]:
    """Scores of the samples, made once for all cells that share them."""
    return file.record(lambda: {"metrics": scores_of(run)(run, images)})["metrics"]


class FeatureScores:
    """FID, IS, KID, precision, recall and CMMD of images, on features of ``metrics.features``."""

    def check(self, run: Run) -> None:
        """Refuse weights that are not there, and data that a classifier could not learn."""
        cfg = run.cfg.metrics
        if cfg.features != "classifier" and is_main_process():
            from bayesdiff.metrics.features import build_extractor, extract

            data, weights = run.data.data, cfg.weights_path
            made = build_extractor(cfg.features, data, cache_dir="", seed=0, weights_path=weights)
            if isinstance(cfg.features, DictConfig):
                extract(made, data.images[:2])
        if cfg.features == "classifier":
            check_classifiable(
                run.data.data, "use metrics=inception, or metrics.num_images=0 for no scores"
            )

    def __call__(self, run: Run, images: Tensor) -> dict[str, float]:
        """The scores of the images, and of real test images.

        All processes extract features; the first one has the scores, the others nothing.
        """
        from bayesdiff.metrics.cmmd import cmmd
        from bayesdiff.metrics.features import extract
        from bayesdiff.metrics.scores import scores

        cfg, data = run.cfg.metrics, run.data.data
        extractor, reference = judge(run, shared=True)
        name, seed = word_of(cfg.features), cfg.seed
        known = torch.from_numpy(reference.subset)
        own = extract(extractor, images, cfg.batch_size, shared=True)
        # Test images often come sorted by class.
        mixed = torch.randperm(
            len(data.test_images), generator=torch.Generator().manual_seed(seed)
        )
        some = data.test_images[mixed[: len(images)]]
        real = extract(extractor, some, cfg.batch_size, shared=True)
        if rank():
            return {}
        values = scores(own, reference, seed=seed, extractor=name)
        values |= cmmd(own.features, known, encoder=name)
        if len(real) > 1:
            of_real = scores(real, reference, seed=seed, extractor=name)
            of_real |= cmmd(real.features, known, encoder=name)
            values |= {f"real/{key}": value for key, value in of_real.items()}
        accuracy = getattr(getattr(extractor, "classifier", None), "test_accuracy", None)
        if accuracy is not None:
            values["classifier_test_accuracy"] = float(accuracy)
        return values


class PointScores:
    """Distances between the samples and held-out points, and between training points and those."""

    def check(self, run: Run) -> None:
        """Refuse features of pictures.

        Raises:
            UserError: for an encoder.
        """
        if run.cfg.metrics.features != "classifier":
            raise UserError(
                f"metrics.features={word_of(run.cfg.metrics.features)} looks at pictures, "
                f"{run.data.data.name} has none; leave metrics= out"
            )

    def __call__(self, run: Run, images: Tensor) -> dict[str, float]:
        """Sliced Wasserstein and energy distance of the samples, ``real/...`` of training points.

        All processes may call it; the first one has the scores, the others nothing.
        """
        from bayesdiff.metrics.two_samples import distances

        data, seed = run.data.data, run.cfg.metrics.seed
        if rank():
            return {}
        mixed = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
        some = data.images[mixed[: len(images)]]
        found = distances(images, data.test_images, seed=seed)
        of_real = distances(some, data.test_images, seed=seed)
        return found | {f"real/{name}": value for name, value in of_real.items()}


def judge(
    run: Run, seed: int | None = None, shared: bool = False
) -> tuple["FeatureExtractorBase", "Reference"]:
    """The extractor that ``metrics`` names with the statistics of the training images under it.

    Args:
        run: gives both.
        seed: of a classifier; None is that of the run's scores.
        shared: whether all processes call it and share the work.
    """
    from bayesdiff.metrics.features import build_extractor, extract, weights_hash
    from bayesdiff.metrics.scores import reference_statistics

    cfg, data = run.cfg.metrics, run.data.data
    cache = Path(run.cfg.output_dir) / "cache"
    extractor = build_extractor(
        cfg.features,
        data,
        cache_dir=cache,
        seed=cfg.seed if seed is None else seed,
        weights_path=cfg.weights_path,
        device=run.device,
    )
    reference = reference_statistics(
        lambda: extract(extractor, data.images, cfg.batch_size, shared=shared),
        key=f"{data.images_fingerprint}-{weights_hash(extractor)}",
        cache_dir=cache,
        seed=cfg.seed,
        shared=shared,
    )
    return extractor, reference
