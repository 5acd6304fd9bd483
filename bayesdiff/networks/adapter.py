"""Any module ``forward(x, t[, y])`` that ends in a linear layer, as a network of this package."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, one_line


class _Reached(Exception):
    """Carries the input of the last layer out of a forward pass, which ends there."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


class _Tap(nn.Module):
    """Stands where the last layer was."""

    def forward(self, features: Tensor) -> Tensor:
        raise _Reached(features)


class Adapter(nn.Module):
    """forward = fold(head(features(x, t, y))), for a module that was written for something else.

    In Python, and on the command line::

        net = Adapter(MyNet(), head="out")
        model = GenerativeModel(net, CondOT(), "velocity", optimizer)

        python train.py net._target_=bayesdiff.networks.Adapter +net.module._target_=mine.MyNet \
            +net.head=out model.num_classes=null

    The module's own last layer becomes ``head``; its forward pass, which ends there from now on,
    gives the features. Whatever it did after that layer is ``fold``.

    Args:
        module: with its weights; its last layer is taken out of it.
        head: name of the last layer, an ``nn.Linear`` or ``nn.Conv2d``: ``out``, ``final.linear``.
        fold: from the head's output to the image: name of a method of the module, or a function;
            None where the head's output is the image. It may move pixels and nothing else.
        num_classes: labels that the module takes as ``y``; it gets this number for "no class".
            None for a module without labels.
        embedding_size: length of the vectors that it takes as ``y``; None for one without.
        in_channels: channels of the images; with ``image_size``, the adapted network is compared
            with the module before anything is trained.
        image_size: side of square images, or (height, width).

    Raises:
        UserError: for a layer that is not there, a module that takes no ``y``, or a network that
            says something else than the module did.

    Example:
        >>> class Mine(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.body, self.out = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        ...     def forward(self, x, t):
        ...         return self.out(torch.relu(self.body(x)))
        >>> module, x, t = Mine(), torch.randn(2, 1, 8, 8), torch.rand(2)
        >>> before = module(x, t)
        >>> net = Adapter(module, head="out")
        >>> net.features(x, t).shape, torch.equal(net(x, t), before)
        (torch.Size([2, 8, 8, 8]), True)
    """

    def __init__(
        self,
        module: nn.Module,
        head: str,
        fold: str | Callable[[Tensor], Tensor] | None = None,
        num_classes: int | None = None,
        embedding_size: int | None = None,
        in_channels: int | None = None,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes, self.embedding_size = num_classes, embedding_size
        kind = type(module).__name__
        self.takes_condition = _takes_condition(module)
        if (num_classes or embedding_size) and not self.takes_condition:
            raise UserError(
                f"{kind}.forward takes no third argument and would not see the condition; use "
                "model.num_classes=null with condition=labels"
            )
        where, _, name = head.rpartition(".")
        try:
            self.head = module.get_submodule(head)
        except AttributeError as error:
            raise UserError(f"{kind} has no layer {head}; net.head names its last one") from error
        if isinstance(fold, str) and not callable(getattr(module, fold, None)):
            raise UserError(f"{kind} has no method {fold}; net.fold names what follows the head")
        self._fold = fold
        sides = (image_size, image_size) if isinstance(image_size, int) else image_size
        shape = None if in_channels is None or sides is None else (in_channels, *sides)
        self.module = module
        truth = None if shape is None else self._truth(shape, kind)
        setattr(module.get_submodule(where), name, _Tap())
        if shape is not None:
            self._compare(truth, shape, kind)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Prediction of the images' shape."""
        return self.fold(self.head(self.features(x, t, y)))

    @property
    def time_dtype(self) -> torch.dtype:
        """What times are given in; a module that tells close ones apart asks for float64."""
        return getattr(self.module, "time_dtype", torch.float32)

    def features(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Input of the head: ``(B, D, h, w)``, or ``(B, ..., D)`` for a linear one.

        Raises:
            UserError: for a module that does not come to its last layer.
        """
        try:
            self.module(x, t, *self._condition(t, y))
        except _Reached as reached:
            return self._wide(reached.features)
        raise UserError(
            f"{type(self.module).__name__}.forward does not call the layer that net.head names; "
            "name its last one"
        )

    def fold(self, output: Tensor) -> Tensor:
        """The head's output as images ``(B, C, H, W)``."""
        if self._fold is None:
            return output
        own = getattr(self.module, self._fold) if isinstance(self._fold, str) else self._fold
        image: Tensor = own(output)
        return image

    def _wide(self, features: Tensor) -> Tensor:
        """Features of a module in half precision as its head in float32 reads them."""
        narrow = next(self.module.parameters()).dtype.itemsize < 4
        return features.float() if narrow else features

    def _condition(self, t: Tensor, y: Tensor | None) -> tuple[Tensor | None, ...]:
        if not self.takes_condition:
            return ()
        if y is None and self.num_classes:
            y = torch.full(t.shape, self.num_classes, device=t.device)
        if y is None and self.embedding_size:
            y = t.new_zeros(len(t), self.embedding_size)
        return (y,)

    def _truth(self, shape: Sequence[int], kind: str) -> Tensor:
        """What the module gives before anything of it is replaced."""
        try:
            output = self._once(self.module, shape)
        except (IndexError, RuntimeError, ValueError, TypeError, StopIteration) as error:
            raise UserError(
                f"{kind} does not take label {self.num_classes}, which is no class; give it room "
                f"for {self.num_classes} + 1 labels"
                if self.num_classes and isinstance(error, IndexError)
                else f"{kind} does not run on images {shape}: {one_line(error) or 'no weights'}"
            ) from error
        if not isinstance(output, Tensor):
            raise UserError(
                f"{kind} gives a {type(output).__name__}, no tensor; wrap it in a module that "
                "returns the prediction alone"
            )
        return output

    @torch.no_grad()
    def _once(self, net: nn.Module, shape: Sequence[int]) -> Tensor:
        """Output for two images of noise, the same for every call."""
        generator = torch.Generator().manual_seed(0)
        like = next(self.module.parameters())
        x = torch.randn(2, *shape, generator=generator).to(like)
        t = torch.tensor([0.25, 0.75]).to(like.device)
        given = self._condition(t, None) if net is self.module else ()
        modes = {module: module.training for module in net.modules()}
        try:
            output: Tensor = net.eval()(x, t, *given)
        finally:  # a part that is frozen in its own mode stays so
            for module, training in modes.items():
                module.training = training
        return output

    def _compare(self, truth: Any, shape: Sequence[int], kind: str) -> None:
        try:
            own = self._once(self, shape)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UserError(f"net.fold does not take what {kind}'s head gives: {error}") from error
        if own.shape != truth.shape or not torch.allclose(own, truth, rtol=1e-4, atol=1e-5):
            raise UserError(
                f"{kind} does more after its last layer than net.fold does: it gives "
                f"{tuple(truth.shape)}, the adapted one {tuple(own.shape)} or other values; "
                "net.fold must name the method that makes images of the head's output"
            )
        if truth.shape[1:] != tuple(shape):
            raise UserError(
                f"{kind} gives {tuple(truth.shape[1:])} for images of {tuple(shape)}; its output "
                "must have their shape"
            )


def _takes_condition(module: nn.Module) -> bool:
    """Whether forward has a third argument, or takes any number."""
    parameters = inspect.signature(module.forward).parameters.values()
    if any(each.kind is each.VAR_POSITIONAL for each in parameters):
        return True
    placed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(each.kind in placed for each in parameters) > 2
