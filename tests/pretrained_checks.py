"""Slow, independent truths about a followed pipeline, for tests and the study of families."""

import copy
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bayesdiff.laplace.training_draws import draws_of
from bayesdiff.pretrained.bayesian_pipeline import BayesianPipeline
from bayesdiff.solvers import SampleNoise
from bayesdiff.uncertainty import Ensemble, Linearised

# Arguments of a call that belong to every call of its pipeline.
_STANDING = ("use_resolution_binning", "clean_caption", "max_sequence_length")


def fitted(
    pipe: Any, call: dict[str, Any], count: int = 12, wide: bool = False, **settings: Any
) -> tuple[BayesianPipeline, dict[str, Any], Tensor]:
    """The pipeline with a posterior of random images, arguments of its call, and the images."""
    call = dict(call)
    if wide:
        pipe = in_double(pipe)
    standing = {name: call.pop(name) for name in _STANDING if name in call}
    image = torch.as_tensor(pipe(**call, **standing, output_type="np").images)
    height, width, channels = image.shape[1:]
    generator = torch.Generator().manual_seed(0)
    size = count, channels, height, width
    images = torch.rand(size, generator=generator, dtype=torch.float32)
    shown: dict[str, Any] = {}
    if "prompt" in call:
        shown["prompts"] = ["a cat", "a dog"] * (count // 2)
    if "class_labels" in call:
        shown["labels"] = [1, 2] * (count // 2)
    bayes = BayesianPipeline.of(pipe, standing, **settings).fit(images, **shown, batch_size=6)
    return bayes, call, images


def in_double(pipe: Any) -> Any:
    """The pipeline with all its networks in float64."""
    twin = copy.copy(pipe)
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            setattr(twin, name, copy.deepcopy(part).double())
    return twin


@contextmanager
def double_by_default() -> Generator[None]:
    """For pipelines that draw noise in the default precision, whatever their network's is."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def scheduler_error(
    bayes: BayesianPipeline, pipe: Any, call: dict[str, Any], seed: int = 3
) -> float:
    """Largest difference of our images and the pipeline's own, which lie in [0, 1]."""
    given = dict(call)
    prompt, steps = given.pop("prompt", None), given.pop("num_inference_steps")
    asked = {} if prompt is None else {"prompt": prompt}
    own = bayes(
        prompt, num_inference_steps=steps, seed=seed, uncertainty=Ensemble(members=2), **given
    )
    generator = SampleNoise(seed, [0], (1,)).generators[0]
    standing = bayes.followed.arguments
    theirs = pipe(
        **asked, **given, **standing, num_inference_steps=steps, generator=generator,
        output_type="np",
    ).images  # fmt: skip
    return float((own.images - torch.as_tensor(theirs).permute(0, 3, 1, 2)).abs().max())


def split_error(bayes: BayesianPipeline, seed: int = 0) -> float:
    """Relative difference of fold(head(features)) and the network's own output, untouched."""
    model, raw = _model(bayes), bayes.followed.network
    net: Any = model.net
    generator = torch.Generator().manual_seed(seed)
    shape = _shape(bayes)
    like = next(raw.parameters())
    x = torch.randn(2, *shape, generator=generator).to(like)
    t = torch.tensor([0.15, 0.85], dtype=torch.float64)
    y = None if model.condition is None else torch.zeros(2, dtype=torch.long)
    theirs = net.module.finished(_raw(raw, net.module, x, t, y), t)
    own = net(x, t, y)
    return float((own - theirs).abs().max() / theirs.abs().max())


def curvature_error(bayes: BayesianPipeline, images: Tensor, shown: Tensor | None) -> float:
    """Relative error of the Gram matrix against the dense Jacobian of the network itself."""
    model, coder = next(iter(bayes.followed._models.values()))
    net: Any = model.net
    raw = copy.deepcopy(bayes.followed.network).double()
    name = _head_name(bayes)
    head = raw.get_submodule(name)
    called = copy.copy(net.module)
    states = coder.encode(2 * images - 1)
    weight, rows = head.weight.detach(), net.head.weight.shape[0]
    total = torch.zeros((weight[0].numel() + (head.bias is not None),) * 2, dtype=torch.float64)
    for seen in draws_of(model, states, shown, batch_size=6, encode=lambda x: x):

        def output(w: Tensor, b: Tensor | None, seen: Any = seen) -> Tensor:
            given = {f"{name}.weight": w} | ({} if b is None else {f"{name}.bias": b})
            whole = _raw(raw, called, seen.x_t.double(), seen.time, seen.y, given)
            return called.finished(whole, seen.time).flatten()

        jacobian = jacrev(output, argnums=(0, 1) if head.bias is not None else 0)(
            weight, head.bias.detach() if head.bias is not None else None
        )
        parts = jacobian if isinstance(jacobian, tuple) else (jacobian,)
        flat = [part.flatten(2) if part.dim() > 2 else part[..., None] for part in parts]
        dense = torch.cat(flat, 2)  # (outputs, rows, P)
        total += torch.einsum("orp,orq->pq", dense, dense) / rows
    gram = bayes.posterior.curvature.gram
    return float((gram - total).abs().max() / total.abs().max())


def image_rank(bayes: BayesianPipeline, call: dict[str, Any], count: int, members: int) -> float:
    """Rank correlation of the images' summed variance, linearised against an ensemble."""
    given = dict(call)
    prompt = given.pop("prompt", None)
    given["num_images"] = count
    ensemble = bayes(prompt, uncertainty=Ensemble(members=members), **given)
    first_order = bayes(prompt, uncertainty=Linearised(draws="all"), **given)
    return spearman(ensemble.scores["map.sum"], first_order.scores["map.sum"])


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation."""
    ranks = [v.argsort().argsort().double() for v in (a, b)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


def _model(bayes: BayesianPipeline) -> Any:
    return next(iter(bayes.followed._models.values()))[0]


def _shape(bayes: BayesianPipeline) -> Sequence[int]:
    return next(iter(bayes.followed._models.values()))[1].shape


def _head_name(bayes: BayesianPipeline) -> str:
    """The last linear or convolution layer that was replaced by the tap."""
    net: Any = _model(bayes).net
    taps = [
        name
        for name, part in net.module.module.named_modules()
        if type(part).__name__.endswith("Tap")
    ]
    return taps[0]


def _raw(
    raw: nn.Module, called: Any, x: Tensor, t: Tensor, y: Tensor | None,
    weights: dict[str, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """What the untouched network says where the followed one would be called."""
    args, kwargs = called.arguments(x, t, y)
    like = next(raw.parameters()).dtype
    time = called.call.time[0]  # which networks embed in the precision that they get it in
    args = [value if n == time else _cast(value, like) for n, value in enumerate(args)]
    kwargs = {n: value if n == time else _cast(value, like) for n, value in kwargs.items()}
    output: Any = functional_call(raw, weights or {}, tuple(args), kwargs)
    return output if isinstance(output, Tensor) else output[0]


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {name: _cast(each, dtype) for name, each in value.items()}
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value
