"""What a configuration has other than the shipped one with the same choices, for names and tables.

All of it follows from values: the same configuration has the same differences, whatever was typed.
"""

import glob
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from bayesdiff.options.config_folders import shipped_configs
from bayesdiff.options.trainer import weighty
from bayesdiff.options.values import leaves
from bayesdiff.report.series import plain_number, short_names
from bayesdiff.runs.fit_key import displays, takes_weights
from bayesdiff.storage.atomic import file_name

# Where files are, what is shown, and how the work is done: nothing a run is told apart by.
_ASIDE = re.compile(
    r"(output_dir|run_dir|ckpt_path|init_from|fit|dry_run|process_timeout|logger|report|scores|objective|direction)(\.|$)"
    r"|.*\b_(target|partial|convert)_$|uncertainty\.few_maps"
    r"|(path|net|data\.space|solver|model|model\.condition)\.folder$"  # they repeat model.path
)
_MOST = 72  # signs of all settings in a name
_VALUE = 16  # of one value
_NAME = 32  # of a network that exists already


@cache
def shipped(choices: tuple[tuple[str, str], ...]) -> Mapping[str, Any]:
    """Leaves of the shipped configuration, without this machine's own settings; by dotted name.

    Args:
        choices: groups and names; those that are not shipped are left as they are by default.
    """
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.utils import create_config_search_path
    from hydra.types import RunMode

    folder = shipped_configs()
    known = [f"{g}={name}" for g, name in choices if (folder / g / f"{name}.yaml").is_file()]
    # Beside Hydra's own global state, which belongs to the command that runs.
    loader = ConfigLoaderImpl(config_search_path=create_config_search_path(str(folder)))
    cfg = loader.load_configuration("train", [*known, "~local"], RunMode.RUN, from_shell=False)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    for name, value in leaves(OmegaConf.to_container(cfg)).items():
        if value == "???":  # only a user can give it
            OmegaConf.update(cfg, name, None)
    return leaves(cfg)


def is_aside(name: str, cfg: DictConfig) -> bool:
    """Whether an option says where files are, what is shown, or how work is done.

    No runs are told apart by it.

    Args:
        name: with its dots.
        cfg: whose option it is; a callback is looked up there.
    """
    return bool(_ASIDE.match(name)) or _shows(name, cfg)


def _shows(name: str, cfg: DictConfig) -> bool:
    """Whether it is of a callback that a training's key leaves out."""
    parts = name.split(".")
    if parts[0] != "callbacks" or len(parts) < 2:
        return False
    place = ".".join(parts[:2])
    target = OmegaConf.select(cfg, f"{place}._target_") or shipped(()).get(f"{place}._target_")
    return displays({"_target_": target})


def differences(cfg: DictConfig, **choices: str) -> dict[str, Any]:
    """Values of ``cfg`` that are not those of the shipped configuration, by dotted name.

    Options of a study, which nothing shipped runs by itself, are not among them.

    Args:
        cfg: of a run.
        **choices: names of the groups that it is made from, such as ``data="digits"``.
    """
    there = shipped(tuple(sorted(choices.items())))
    if not there:
        return {}
    nothing = object()
    given = leaves(cfg)
    return {
        name: value
        for name, value in {**given, **_gone(there, given)}.items()
        if not is_aside(name, cfg)
        and there.get(name.partition(".")[0], nothing) is not None
        and there.get(name, nothing) != value
        and (name.partition(".")[0] != "callbacks" or value is not None or _begins(there, name))
    }


def _begins(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(f"{start}.") for name in names)


def _gone(there: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, None]:
    """What was taken out of the shipped configuration, as null, which switches it off as well.

    Options of another class that stands in the place of theirs are not missed.
    """
    parents = {name[:at] for name in given for at in _dots(name)}
    found: dict[str, None] = {}
    for name in there:
        for at in (*_dots(name), len(name)):
            part, target = name[:at], f"{name[:at]}._target_"
            if part in given:
                break
            if part not in parents:
                found[part] = None
                break
            if target in there and given.get(target) != there[target]:
                break
    return found


def _dots(name: str) -> list[int]:
    return [at for at, sign in enumerate(name) if sign == "."]


def preset(group: str, options: Any) -> str:
    """Name of the shipped options that these are, else that of their class."""
    given: Any = OmegaConf.to_container(options, resolve=True)
    for path in sorted((shipped_configs() / group).glob("*.yaml")):
        if OmegaConf.to_container(OmegaConf.load(path)) == given:
            return path.stem
    return str(given.get("_target_", options)).rpartition(".")[2]


def words(values: Mapping[str, Any], names: Iterable[str] = ()) -> str:
    """Settings as a part of a file name: ``-lr_0.001-seed_1``, nothing where there are none.

    Only signs that no shell, file system or command line of Hydra takes for something else; what
    has no room is counted.

    Args:
        values: by dotted name, in the order of their weight; the last part of a name is written.
        names: all that could be there; the whole name is written where two end alike.
    """
    text, left = "", 0
    for name, value in zip(short_names(list(values), names), values.values(), strict=True):
        word = f"-{_safe(name)}_{_safe(_short(value))[:_VALUE]}"
        fits = len(text) + len(word) <= _MOST
        text, left = text + word * fits, left + (not fits)
    return text + f"-and_{left}_more" * bool(left)


def named(folder: Path, prefix: str, text: str, key: str) -> Path:
    """The place with this key in ``folder``: the one that is there, whatever its words, or a new.

    Args:
        folder: of both.
        prefix: that the name begins with.
        text: from ``words``, for a new one.
        key: its first 8 digits end the name.
    """
    there = sorted(folder.glob(f"{glob.escape(prefix)}*-{key[:8]}"))
    return there[0] if there else folder / f"{prefix}{text}-{key[:8]}"


# What changes a training, most telling first; model.seed is the seed.
_TELLING = (
    r"model\.optimizer\.lr", "seed", r"data\.binarise", r"trainer\..+",
    r"model\.(?!seed$|optimizer\.lr$).+", r"path\..+", r"data\.space\.(.+\.)?(?!_target_$)[^.]+",
    r"net\..+", r"data\.(batch_size|flip)", "sample_from",
    r"data\.source\.(?!name$|root$|test_root$|source$|download$).+",
    r"callbacks\..+",
)  # fmt: skip


# What only a training reads; weights from a file have learnt as their own note says.
LEARNT = re.compile(
    r"(trainer|callbacks|model\.optimizer)\..+|model\.(warmup_steps|class_dropout|time_sampling)"
    r"|data\.(batch_size|flip|epochs|ema_decay)|sample_from"
)


def damage_of(cfg: DictConfig) -> str | None:
    """Name of the known damage to the training data, None where there is none."""
    target = OmegaConf.select(cfg, "data.source.corruption._target_")
    return target and str(target).rpartition(".")[2]


_USUAL = "gaussian"


def likelihood_choice(cfg: DictConfig) -> str:
    """Name of the shipped likelihood, that of its class; the usual one where there is none."""
    target = OmegaConf.select(cfg, "model.likelihood._target_") or _USUAL
    return str(target).rpartition(".")[2].lower()


def _of_model(choices: Mapping[str, str]) -> str:
    """Name of the likelihood that a shipped model comes with."""
    target = shipped(tuple(sorted(choices.items()))).get("model.likelihood._target_") or _USUAL
    return str(target).rpartition(".")[2].lower()


def run_folder(cfg: DictConfig, data: str, family: str, key: str) -> Path:
    """Place of a training, named by what it is told apart by and found by its key.

    Args:
        cfg: whole configuration.
        data: name of the images.
        family: of the path.
        key: of the training.
    """
    damage = damage_of(cfg) or ""
    likelihood = likelihood_choice(cfg)
    choices = {"data": str(cfg.data.get("name")), "model": family}
    if likelihood != _of_model(choices):
        choices["likelihood"] = likelihood
    found = differences(cfg, **choices, corruption=damage)
    learnt = {f"trainer.{name}" for name in weighty(cfg.trainer, validated=True)}
    found = {k: v for k, v in found.items() if k in learnt or not k.startswith("trainer.")}
    if takes_weights(cfg):
        found = {k: v for k, v in found.items() if not LEARNT.fullmatch(k)}
    telling = {"corruption": damage} if damage else {}
    telling |= {"likelihood": likelihood} if "likelihood" in choices else {}
    space = OmegaConf.select(cfg, "data.space._target_")
    usual = shipped(tuple(sorted(choices.items()))).get("data.space._target_")
    telling |= {"space": str(space).rpartition(".")[2]} if space and space != usual else {}
    telling |= {} if cfg.get("init_from") is None else {"init_from": "weights"}
    telling |= {n: v for place in _TELLING for n, v in found.items() if re.fullmatch(place, n)}
    # Networks that exist already go by the last part of where they are.
    source = telling.pop("model.path", None)
    text = f"-{_safe(Path(str(source)).resolve().name)[:_NAME]}" if source else ""
    return named(Path(cfg.output_dir), f"{data}-{family}", text + words(telling), key)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return plain_number(value)
    if isinstance(value, list | tuple):
        return "_".join(map(_short, value))
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(value)


def _safe(text: str) -> str:
    return file_name(text).strip("_") or "_"
