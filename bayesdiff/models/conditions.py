"""What a network is given of an image beside its time: a label, an embedding vector, or nothing.

The values of a condition are one tensor whose first axis is the batch, so that repeating,
splitting and indexing are those of tensors. A condition of another kind (prompts, say) is one
class like those here and one YAML file in the group ``condition``.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.images import ImageData

_OPTIONS = ("num_classes", "embedding_size")  # of networks that are made for one of those here


class Condition(Protocol):
    """How values get into training, into samples, and out of the unguided half of guidance.

    Attributes:
        field: of ``ImageData``, which holds the values of all training images; those of the test
            images are in ``test_<field>``.
    """

    field: str

    @property
    def num_classes(self) -> int | None:
        """Classes that samples have in turn; None where they have none."""

    def options(self) -> dict[str, Any]:
        """What the network has to know, as arguments by name."""
        ...

    def hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Values ``(B, ...)`` with "nothing" in the places where ``hidden (B,)`` is true."""
        ...

    def empty(self, values: Tensor) -> Tensor | None:
        """The values of "nothing", ``(B, ...)``; None where the network knows it as None."""
        ...

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Values of samples, which depend on their numbers alone."""
        ...

    def labels(self, values: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """Classes ``(B,)`` that samples of these values and numbers show; None if unknown."""
        ...


class Labels:
    """Whole numbers 0 ... K - 1; K is "no class". Samples have the classes in turn.

    Args:
        num_classes: K.
    """

    field = "labels"

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes

    def options(self) -> dict[str, Any]:
        """The number of classes."""
        return {"num_classes": self.num_classes}

    def hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Labels ``(B,)`` with K in the hidden places."""
        return torch.where(hidden, self.num_classes, values)

    def empty(self, values: Tensor) -> None:
        """None: networks know it as "no class"."""

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Number modulo K, int64 ``(B,)``."""
        return torch.tensor(list(numbers)) % self.num_classes

    def labels(self, values: Tensor, numbers: Sequence[int]) -> Tensor:
        """The values themselves."""
        return values


class Embedding:
    """One vector per image. Samples have those of the test images, in a fixed random order.

    Args:
        vectors: float ``(M, E)`` that samples are made for.
        classes: that images of these vectors show, int64 ``(M,)``, for figures; None if unknown.
        empty: vector ``(E,)`` in the place of a hidden one; zeros if None.

    Raises:
        UserError: for an empty vector of another length.
    """

    field = "embeddings"
    num_classes = None

    def __init__(
        self, vectors: Tensor, classes: Tensor | None = None, empty: Sequence[float] | None = None
    ) -> None:
        self.size = vectors.shape[1]
        # Test images often come sorted by class.
        order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
        self.vectors = vectors[order]
        self.classes = None if classes is None else classes[order]
        self.nothing = torch.zeros(self.size) if empty is None else torch.tensor(list(empty))
        if self.nothing.shape != (self.size,):
            raise UserError(
                f"model.condition.empty has {len(self.nothing)} numbers, the embeddings of the "
                f"data have {self.size}; give as many, or null for zeros"
            )

    def options(self) -> dict[str, Any]:
        """The length of the vectors."""
        return {"embedding_size": self.size}

    def hide(self, values: Tensor, hidden: Tensor) -> Tensor:
        """Vectors ``(B, E)`` with the empty one in the hidden places."""
        return torch.where(hidden[:, None], self.nothing.to(values), values)

    def empty(self, values: Tensor) -> Tensor:
        """The empty vector for each, ``(B, E)``."""
        return self.nothing.to(values).expand_as(values)

    def of_samples(self, numbers: Sequence[int]) -> Tensor:
        """Vector of test image number modulo M in the fixed order, ``(B, E)``."""
        return self.vectors[self._places(numbers)]

    def labels(self, values: Tensor, numbers: Sequence[int]) -> Tensor | None:
        """Class of the test image whose vector a sample has."""
        return None if self.classes is None else self.classes[self._places(numbers)]

    def _places(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(list(numbers)) % len(self.vectors)


def labels(data: ImageData, num_classes: Any = "auto") -> Labels | None:
    """Condition on the classes of the data: the ``_target_`` of ``condition=labels``.

    Args:
        data: with or without labels.
        num_classes: ``auto`` for the data's own, None for an unconditional model.

    Raises:
        UserError: for another number of classes than the data has.

    Example:
        >>> from bayesdiff.data.sources import digits
        >>> condition = labels(digits())
        >>> condition.options()  # of the network
        {'num_classes': 10}
        >>> condition.of_samples([0, 1, 9, 10])  # classes come in turn
        tensor([0, 1, 9, 0])
        >>> condition.hide(torch.tensor([3, 7]), torch.tensor([True, False]))  # 10 is "no class"
        tensor([10,  7])
    """
    classes = (data.num_classes or None) if num_classes == "auto" else num_classes
    if classes is None:
        return None
    at_least("model.num_classes", classes)
    if classes != data.num_classes:
        raise UserError(
            f"model.num_classes={classes} but {data.name} has {data.num_classes} classes; "
            "use model.num_classes=auto, or null for an unconditional model"
        )
    return Labels(classes)


def embedding(
    data: ImageData, num_classes: Any = "auto", empty: Sequence[float] | None = None
) -> Embedding:
    """Condition on the vectors of the data: the ``_target_`` of ``condition=embedding``.

    Args:
        data: with ``embeddings``; its labels, if there are any, name samples in figures.
        num_classes: ``auto``; there are no others than the data's.
        empty: vector in the place of a hidden one; zeros if None.

    Raises:
        UserError: for data without vectors, or a number of classes.

    Example:
        >>> images, vectors = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.eye(4)
        >>> data = ImageData.build(
        ...     "mine", images, None, images, None, embeddings=(vectors, vectors)
        ... )
        >>> condition = embedding(data)
        >>> condition.options()  # of the network
        {'embedding_size': 4}
        >>> condition.of_samples([1])
        tensor([[0., 1., 0., 0.]])
    """
    if data.embeddings is None or data.test_embeddings is None:
        raise UserError(
            f"condition=embedding needs a vector per image and data set {data.name} has none; "
            "use condition=labels, or a source that gives embeddings, such as data=array"
        )
    if num_classes not in ("auto", None):
        raise UserError(
            f"model.num_classes={num_classes} with condition=embedding; leave it at auto"
        )
    return Embedding(data.test_embeddings, data.test_labels, empty)


def repeated(values: Tensor, copies: int) -> Tensor:
    """The whole batch so many times, ``(B, ...) -> (copies B, ...)``."""
    return values.repeat(copies, *[1] * (values.ndim - 1))


def values_of(condition: Condition | None, data: Any) -> Tensor | None:
    """The condition's values of all training images ``(N, ...)``; None without a condition."""
    return None if condition is None else getattr(data, condition.field)


def check_network(net: object, condition: Condition | None) -> None:
    """Refuse values that the network would not read, and a network that would never get any.

    Raises:
        UserError: if the numbers differ; a network without such an attribute is taken as it is.
    """
    given = dict.fromkeys(_OPTIONS) | (condition.options() if condition else {})
    for name, value in given.items():
        known = getattr(net, name, value)
        if (known or None) != (value or None):
            raise UserError(
                f"{type(net).__name__} has {name}={known} and the model has {name}={value}; "
                "give both the same number, or None for no condition"
            )
