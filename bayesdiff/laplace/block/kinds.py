"""How the GGN of layers beside the head is kept: ``laplace.layers``."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayesdiff.checks import UserError, at_least
from bayesdiff.data.spaces import space_of
from bayesdiff.laplace.block.fit import check_block, check_probes, fit_block
from bayesdiff.laplace.block.layers import (
    Subset,
    check_names,
    in_words,
    layer_matrix,
    layers_of,
)
from bayesdiff.laplace.block.low_rank import LowRankFactors, check_rank, fit_low_rank
from bayesdiff.laplace.block.low_rank_posterior import LowRankPosterior
from bayesdiff.laplace.block.posterior import PRIORS, STRUCTURES, BlockPosterior, LayersPosterior
from bayesdiff.laplace.block.record import BlockFactors
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.models import GenerativeModel
from bayesdiff.models.conditions import values_of
from bayesdiff.networks import Network
from bayesdiff.storage.artefacts import Artefact


@dataclass(frozen=True)
class Kind:
    """A way to keep it.

    Attributes:
        factors: record of the data's part.
        fit: the pass over the data that makes it.
        own: option of that pass that no other kind has.
        posterior: of head, factors, prior_precision and prior_per.
    """

    factors: Any
    fit: Callable[..., Any]
    own: str
    posterior: Callable[[HeadPosterior, Any, float | str, str], LayersPosterior]

    def stored(self, path: Path | None, source: str) -> Any:
        """The factors in this file, None where there are none of this very pass.

        Refused, as a ``UserError``, if they are damaged, or of other weights or data.
        """
        if path is None or not path.is_file():
            return None
        found = self.factors.load(path)
        found.require_source(source)
        # The same weights and data, but another number of draws or images: made anew.
        return found if found.source == source else None

    def once(
        self, model: GenerativeModel, data: Any, path: Path | None, source: str, **options: Any
    ) -> Any:
        """The factors kept at ``path`` if they are of this very pass, else those of a new one.

        Args:
            model: with its trained weights.
            data: with ``images`` and the values of the model's condition.
            path: None keeps nothing.
            source: as for ``fit``, like the options.
            **options: draws, num_images, batch_size, seed, subset, and the kind's own.
        """

        def make() -> Any:
            encode, given = space_of(data).encode, values_of(model.condition, data)
            return self.fit(model, data.images, given, source=source, encode=encode, **options)

        if path is None:
            return make()
        file = Artefact(path, source, "block")
        return file.once(lambda: self.stored(path, source), make, lambda new: new.save(path))


KINDS = {
    "kronecker": Kind(BlockFactors, fit_block, "probes", BlockPosterior.beside),
    "low_rank": Kind(
        LowRankFactors,
        fit_low_rank,
        "rank",
        lambda head, factors, prior, _: LowRankPosterior.beside(head, factors, prior),
    ),
}


def kind_of(name: str) -> Kind:
    """The kind with this name.

    Raises:
        UserError: if there is none.
    """
    if name not in KINDS:
        raise UserError(f"laplace.layers must be one of {', '.join(KINDS)}; got {name!r}")
    return KINDS[name]


@dataclass(frozen=True)
class Beside:
    """What is asked for beside the head.

    Attributes:
        subset: ``head`` for nothing, ``last_block``, ``all`` or names, see ``layers_of``.
        layers: how their GGN is kept, a name in ``KINDS``.
        layers_rank: directions of ``low_rank``.
        prior_per: what ``prior_precision="evidence"`` is fitted for: ``layer``, a prior for every
            layer, or ``subset``, one for all of them.
        probes: of ``fit_block``.
    """

    subset: Subset = "head"
    layers: str = "kronecker"
    layers_rank: int = 32
    prior_per: str = "layer"
    probes: int | str = 4

    def __post_init__(self) -> None:
        check_names(self.subset)
        if not isinstance(self.subset, str):  # the same layers are the same posterior
            object.__setattr__(self, "subset", sorted(set(self.subset)))
        kind_of(self.layers)
        at_least("laplace.layers_rank", self.layers_rank)
        if self.prior_per not in PRIORS:
            raise UserError(
                f"laplace.prior_per must be {' or '.join(PRIORS)}, got {self.prior_per!r}"
            )
        check_probes(self.probes)

    @property
    def asked(self) -> bool:
        """Whether there are layers beside the head."""
        return self.subset != "head"

    @property
    def kind(self) -> Kind:
        """How their GGN is kept."""
        return kind_of(self.layers)

    def check_network(self, net: Network, images: int) -> None:
        """Refuse a network without these layers, too few images, or as many directions as weights.

        Args:
            net: trained or not.
            images: of the pass.

        Raises:
            UserError: if it cannot be.
        """  # noqa: DOC502 - raised one level down
        check_block(net, images, self.subset)
        if self.layers == "low_rank":
            layers = layers_of(net, self.subset).values()
            check_rank(self.layers_rank, sum(layer_matrix(layer).numel() for layer in layers))

    @property
    def options(self) -> dict[str, Any]:
        """Of the pass, beside those of the head's."""
        own = {"probes": self.probes, "rank": self.layers_rank}
        return {"subset": self.subset, self.kind.own: own[self.kind.own]}

    def check(self, structure: str, sigma_noise: float | str) -> None:
        """Refuse a posterior of the head that has no like for other layers.

        Args:
            structure: of the head's posterior.
            sigma_noise: of the likelihood.

        Raises:
            UserError: if it has none.
        """
        if not self.asked:
            return
        asked = f"laplace.subset={in_words(self.subset)}"
        if structure not in STRUCTURES:
            raise UserError(
                f"laplace.structure={structure} is for laplace.subset=head; {asked} takes "
                f"{' or '.join(STRUCTURES)}"
            )
        if sigma_noise == "mle_per_time":
            raise UserError(
                f"laplace.sigma_noise=mle_per_time is for laplace.subset=head; {asked} has one "
                "noise for all times, use mle"
            )
