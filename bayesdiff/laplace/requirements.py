"""What callbacks need of a user's own module, network and data, refused before any training."""

from typing import Any

import lightning as L

from bayesdiff.checks import UserError

_ADD = {
    "head": "self.head = nn.Conv2d(...) # the last layer",
    "features": "def features(self, x, t, y=None): return ... # the input of self.head",
    "fold": "def fold(self, output): return output # the head's output as an image",
}


def require_module(module: Any, who: str, *more: str) -> None:
    """Refuse a module that the passes over the data could not use.

    Args:
        module: a ``GenerativeModel``, or one like it.
        who: needs it, for the message.
        more: attributes that it needs beside those of every pass.

    Raises:
        UserError: names what is missing, and what to add.
    """
    for name in ("net", "path", "corrupt", "condition", "prediction", *more):
        if not hasattr(module, name):
            raise UserError(
                f"{who} needs {type(module).__name__}.{name} and there is none; derive your "
                f"module from bayesdiff.models.GenerativeModel, or add {name} as it has it"
            )
    missing = [name for name in _ADD if not hasattr(module.net, name)]
    if missing:
        lines = "; ".join(_ADD[name] for name in missing)
        raise UserError(
            f"{who} needs a network whose forward is fold(head(features(x, t, y))), and "
            f"{type(module.net).__name__} lacks {', '.join(missing)}; add to it: {lines}"
        )


def require_data(trainer: L.Trainer, who: str, *names: str) -> Any:
    """The images of the trainer's data module.

    Args:
        trainer: at the start of ``fit``.
        who: needs them, for the message.
        names: of what they must have beside ``images``.

    Raises:
        UserError: if there are none, or something of them is missing.
    """
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    if getattr(data, "images", None) is None:
        raise UserError(
            f"{who} needs the images in datamodule.data.images; "
            "call trainer.fit(model, datamodule=...) with such a data module"
        )
    for name in names:
        if not hasattr(data, name):
            raise UserError(
                f"{who} needs datamodule.data.{name}; "
                "make the data module from bayesdiff.data.images.ImageData"
            )
    return data
