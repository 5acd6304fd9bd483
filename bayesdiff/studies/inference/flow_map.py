"""A trained flow as plain functions between latents and states, of its own head or of many."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor

from bayesdiff.models import GenerativeModel
from bayesdiff.solvers import Field, Solver, integrate, plan
from bayesdiff.solvers.encode import backward
from bayesdiff.uncertainty.members.ensemble import MemberField


class FlowMap:
    """Both ways, one state a row; gradients pass, and no weight gets one while it is ``frozen``.

    What is differentiated is what the solver computes, step by step.
    """

    def __init__(self, model: GenerativeModel, solver: Solver) -> None:
        self.model = model
        self._down = plan(solver, model.path, model.prediction)
        self._up = backward(solver, model.path, model.prediction)

    def decode(self, z: Tensor) -> Tensor:
        """States ``(B, D)`` of latents ``(B, D)``."""
        return integrate(self._field(len(z)), self._down, z, _none)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Latents ``(B, D)`` of states ``(B, D)``."""
        return integrate(self._field(len(x)), self._up, x, _none)

    def decode_under(self, heads: Tensor, z: Tensor) -> Tensor:
        """States ``(M, D)`` of latents ``(M, D)``, each under a head ``(M, C_out, P)`` of its own.

        In rows, as a Jacobian takes them.
        """
        return integrate(self._members(heads), self._down, z[:, None], _none)[:, 0]

    def encode_under(self, heads: Tensor, x: Tensor) -> Tensor:
        """Latents ``(M, D)`` of states ``(M, D)``, each under a head of its own."""
        return integrate(self._members(heads), self._up, x[:, None], _none)[:, 0]

    @contextmanager
    def frozen(self) -> Generator[None]:
        """Without dropout, and without gradients of weights."""
        training = self.model.training
        learnt = [each for each in self.model.parameters() if each.requires_grad]
        self.model.eval().requires_grad_(False)
        try:
            yield
        finally:
            self.model.train(training)
            for each in learnt:
                each.requires_grad_(True)

    def _field(self, batch: int) -> Field:
        return Field(self.model, None, batch)

    def _members(self, heads: Tensor) -> MemberField:
        return MemberField(self._field(1), heads)


def _none() -> Tensor:
    raise AssertionError("a deterministic solver draws no noise")
