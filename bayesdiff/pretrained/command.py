"""What ``model=pretrained`` is made of: a pipeline's folder in the place of a training."""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from bayesdiff.checks import UserError, at_least, one_line
from bayesdiff.data.images import ImageData
from bayesdiff.data.spaces import Latents, Pixels, Space
from bayesdiff.models import GenerativeModel
from bayesdiff.paths import ProbabilityPath
from bayesdiff.pretrained.call import Prompts
from bayesdiff.pretrained.coder import PipelineCoder
from bayesdiff.pretrained.followed import FollowedPipeline
from bayesdiff.pretrained.scheduled import Scheduled


@cache
def opened(folder: str | None) -> FollowedPipeline:
    """The pipeline in a folder, read without running code of it.

    Raises:
        UserError: for a folder that is none, or whose pipeline cannot be followed.
    """
    if not folder:
        raise UserError("model=pretrained has no network yet; give model.path=FOLDER")
    try:
        from diffusers import DiffusionPipeline

        import bayesdiff.pretrained.export  # noqa: F401 - so that its folders can be read
    except ImportError as error:
        raise UserError(
            "model=pretrained needs diffusers; install it with pip install bayesdiff[pretrained]"
        ) from error
    if not Path(folder).is_dir():
        raise UserError(
            f"no folder at model.path={folder}; a pipeline on a hub is downloaded first, as by "
            "hf download NAME --local-dir FOLDER"
        )
    if not (Path(folder) / "model_index.json").is_file():
        raise UserError(
            f"model.path={folder} has no model_index.json; give a folder that "
            "pipe.save_pretrained has written"
        )
    options: dict[str, Any] = {"local_files_only": True, "use_safetensors": True}
    try:
        pipe = DiffusionPipeline.from_pretrained(folder, **options)
    except Exception as error:  # it raises whatever its parts do
        raise UserError(f"model.path={folder} cannot be loaded: {one_line(error)}") from error
    return FollowedPipeline(pipe)


@cache
def _built(
    folder: str | None, shown: tuple[str | int, ...], size: tuple[int, int]
) -> tuple[GenerativeModel, PipelineCoder]:
    """Model and coder for classes and a size of images; made once of a command."""
    pipeline = opened(folder)
    return pipeline.for_classes(shown, pipeline.sized(*size))


# What the condition of a run asked for: network, path and model of the same run take it up.
_LAST: dict[str | None, tuple[GenerativeModel, PipelineCoder]] = {}


def space(data: ImageData, folder: str | None = None) -> Space:
    """Pixels, or the latents that the pipeline decodes: the ``_target_`` of ``data.space``.

    Raises:
        UserError: for images of another size or number of channels.

    Example:
        >>> import tempfile
        >>> from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
        >>> from bayesdiff.data.sources import digits
        >>> unet = UNet2DModel(
        ...     sample_size=8, in_channels=1, out_channels=1, num_class_embeds=11,
        ...     block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        ... )
        >>> folder, data = tempfile.mkdtemp(), digits()
        >>> pipe = DDPMPipeline(unet, DDIMScheduler(clip_sample=False))
        >>> pipe.save_pretrained(folder)  # in place of one that was trained
        >>> space(data, folder).shape
        (1, 8, 8)
    """
    pipeline = opened(folder)
    if data.images.dim() != 4:
        raise UserError(f"{pipeline.who} makes pictures, and {data.name} has none; give images")
    _, coder = _built(folder, (), tuple(data.images.shape[2:]))
    if not coder.trivial:
        return Latents(data, coder)
    if tuple(data.images.shape[1:]) != coder.shape:
        raise UserError(
            f"{pipeline.who} makes images of {coder.shape}, {data.name} has "
            f"{tuple(data.images.shape[1:])}; give data.resize={coder.shape[1]} "
            "data.crop=square, or other images"
        )
    return Pixels(data)


def condition(
    data: ImageData,
    num_classes: Any,
    folder: str | None = None,
    prompts: Sequence[str] | str | None = None,
    labels: Sequence[int] | None = None,
) -> Prompts | None:
    """The data's classes as the pipeline knows them: the ``_target_`` of ``model.condition``.

    Args:
        data: with classes, where the pipeline takes prompts or classes.
        num_classes: ``auto``; None for the pipeline's "nothing" alone.
        folder: of the pipeline.
        prompts: one for each class, or one in which ``{}`` is the class's name.
        labels: the pipeline's own numbers of the classes; None for 0, 1, ...

    Raises:
        UserError: for another number of prompts than classes.

    Example:
        After the example of ``space``:

        >>> prompts = condition(data, "auto", folder)
        >>> prompts.num_classes, prompts.of_samples([0, 1, 10])  # classes come in turn
        (10, tensor([0, 1, 0]))
    """
    pipeline = opened(folder)
    classes = data.classes if num_classes == "auto" else ()
    size = tuple(data.images.shape[2:])
    given: tuple[str | int, ...] = ()
    if pipeline.condition == "prompt":
        names = classes or ("",)
        if isinstance(prompts, str):
            prompts = [prompts.replace("{}", str(name)) for name in names]
        given = tuple(str(name) for name in (names if prompts is None else prompts))
    elif pipeline.condition is not None:
        given = tuple(range(len(classes) or 1) if labels is None else labels)
    if given and classes and len(given) != len(classes):
        raise UserError(
            f"model.condition has {len(given)} prompts or labels and {data.name} has "
            f"{len(classes)} classes; give one for each"
        )
    _LAST[folder] = model, _ = _built(folder, given, size)
    found = model.condition
    return found if isinstance(found, Prompts) and found.num_classes else None


def path(folder: str | None = None) -> ProbabilityPath:
    """The path that the pipeline's scheduler tells of: the ``_target_`` of ``path``.

    Example:
        After the example of ``space``:

        >>> at = path(folder).coefficients(torch.tensor([0.0, 0.5]))
        >>> (at.alpha**2 + at.sigma**2).round(decimals=6)
        tensor([1., 1.], dtype=torch.float64)
    """
    return _model(folder).path


def network(folder: str | None = None) -> nn.Module:
    """The pipeline's network with its last layer apart: the ``_target_`` of ``net``.

    Example:
        After the example of ``space``:

        >>> net = network(folder)
        >>> net.head.in_channels, net.head.out_channels
        (8, 1)
    """
    net: Any = _model(folder).net
    return net


def model(
    net: nn.Module, path: ProbabilityPath, folder: str | None = None, **options: Any
) -> GenerativeModel:
    """The pipeline's network as a model: the ``_target_`` of ``model``.

    Args:
        net: from ``network``.
        path: from ``path``.
        folder: of the pipeline.
        options: of ``GenerativeModel``.

    Example:
        After the example of ``space``:

        >>> made = model(network(folder), path(folder), folder, optimizer=torch.optim.Adam)
        >>> made.prediction, made.net is network(folder)
        ('noise', True)
    """
    made = _model(folder)
    own = {k: v for k, v in options.items() if k in ("likelihood", "seed")}
    return GenerativeModel(
        net, path, made.prediction, options["optimizer"], condition=made.condition,
        class_dropout=0.1 if made.condition else 0.0, **own,
    )  # fmt: skip


def _model(folder: str | None) -> GenerativeModel:
    """The model that the condition was made for, or one without classes."""
    if folder not in _LAST:
        _LAST[folder] = opened(folder).for_classes([], {})
    return _LAST[folder][0]


def solver(
    folder: str | None = None,
    num_steps: int = 25,
    guidance: float = 1.0,
    scheduler: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Scheduled:
    """The pipeline's scheduler, or another of diffusers: the ``_target_`` of ``solver``.

    Args:
        folder: of the pipeline.
        num_steps: given to ``set_timesteps``; evaluations may be more.
        guidance: classifier-free guidance scale; 1 for none.
        scheduler: name of a class of diffusers that takes the place of the pipeline's.
        options: of its configuration, in place of those that the pipeline's has.


    Example:
        After the example of ``space``:

        >>> steps = solver(folder, num_steps=5)
        >>> steps.num_steps, len(steps.times(path(folder)))
        (5, 6)
    """
    at_least("solver.num_steps", num_steps)
    return opened(folder).scheduled(scheduler, dict(options or {}), num_steps, guidance)
