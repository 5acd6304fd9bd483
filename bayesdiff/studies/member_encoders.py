"""Further encoders that the members' features come from: ``filtering.encoders``."""

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

from bayesdiff.checks import UserError
from bayesdiff.metrics import named_encoders
from bayesdiff.options.targets import by_name
from bayesdiff.runs.build import Run

if TYPE_CHECKING:  # torch-fidelity costs seconds
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

_OPTION = "filtering.encoders"


def check_encoders(encoders: Mapping[str, Any], run: Run) -> None:
    """Try each once.

    Args:
        encoders: by name, each with its weights file or None, or a callable of one's own.
        run: gives the data.

    Raises:
        UserError: for an unknown name, weights that cannot be had or that nothing would read, or
            the trained classifier.
    """
    from bayesdiff.metrics.features import extract

    for name, source in encoders.items():
        if callable(source):
            extract(encoder(run, name, source), run.data.data.images[:2])
            continue
        takes = signature(by_name(named_encoders, name, _OPTION)).parameters
        if "cache_dir" in takes:
            raise UserError(f"{_OPTION}.{name} is there anyway; leave it out")
        if source is not None and "weights_path" not in takes:
            raise UserError(f"{_OPTION}.{name}={source} has no weights to read; give null")
        encoder(run, name, source)


def encoder(run: Run, name: str, source: Any) -> "FeatureExtractorBase":
    """One of them, on the run's device.

    Args:
        run: gives the data.
        name: of the encoder.
        source: its weights file or None, or a callable of one's own.
    """
    from bayesdiff.metrics.features import build_extractor

    own = callable(source)
    return build_extractor(
        source if own else name,
        run.data.data,
        cache_dir="",
        seed=run.cfg.metrics.seed + 1,
        weights_path=None if own else source,
        device=run.device,
        option=f"{_OPTION}.{name}",
    )
