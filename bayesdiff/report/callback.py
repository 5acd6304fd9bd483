"""Pictures while a model trains."""

import lightning as L
from lightning.pytorch.callbacks import Callback


class SampleGrid(Callback):
    """placeholder"""

    def __init__(self, every_n_epochs: int = 1) -> None:
        self.every_n_epochs = every_n_epochs
