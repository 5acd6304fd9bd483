"""Command lines of the scripts in ``experiments/``, and results that a later call adds to."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from bayesdiff.checks import UserError, few
from bayesdiff.storage.artefacts import read_json

# Overrides that only say where runs are kept, and change no number.
_PLACES = ("output_dir=", "run_dir=", "logger=", "~logger")


@dataclass(frozen=True)
class Asked:
    """What a command line asks for.

    Attributes:
        names: of models, data sets or settings, in the order given.
        options: values of the script's own options by their names.
        overrides: all other ``KEY=VALUE``, for the configuration.
    """

    names: list[str]
    options: dict[str, list[str]]
    overrides: list[str]

    @classmethod
    def of(cls, words: Sequence[str], known: Collection[str], *options: str) -> Self:
        """Sort the words of a command line.

        Args:
            words: of the command line.
            known: names that the script has.
            options: names of its own options, such as ``seed`` for ``seed=1``.

        Raises:
            UserError: for an unknown name.
        """
        names = [word for word in words if "=" not in word]
        for name in names:
            if name not in known:
                raise UserError(f"unknown {name}; choose from {few(known, 20)}")
        split = [word.partition("=") for word in words if "=" in word]
        own = {name: [value for key, _, value in split if key == name] for name in options}
        rest = [key + sign + value for key, sign, value in split if key not in options]
        return cls(names, own, rest)

    @property
    def recorded(self) -> list[str]:
        """The overrides that can change a number, sorted."""
        return sorted(word for word in self.overrides if not word.startswith(_PLACES))

    def kept(self, path: Path, part: str) -> dict[str, Any]:
        """A part of the results of earlier calls, to which this one adds; empty without any.

        Raises:
            UserError: if those had other overrides: one file would hold numbers that nobody can
                tell apart.
        """
        results = read_json(path)
        if results is None:
            return {}
        earlier = results.get("overrides", [])
        if earlier != self.recorded:
            raise UserError(
                f"{path} holds results of overrides {earlier}, this call has {self.recorded}; "
                "give the same ones, or move the file away"
            )
        kept: dict[str, Any] = results.get(part, {})
        return kept
