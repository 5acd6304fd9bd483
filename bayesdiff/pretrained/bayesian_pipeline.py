"""A pipeline of diffusers whose last layer is Bayesian: images with maps, post hoc."""

import copy
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError, at_least, one_line
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.machine.progress import track
from bayesdiff.models import GenerativeModel
from bayesdiff.options.spelling import near
from bayesdiff.pretrained.call import Call, Called, Prompts, Table
from bayesdiff.pretrained.coder import PipelineCoder, coder_of
from bayesdiff.pretrained.convention import Convention, convention_of
from bayesdiff.pretrained.doctor import Finding
from bayesdiff.pretrained.doctor import affinity_findings as examine
from bayesdiff.pretrained.head import tapped
from bayesdiff.pretrained.listening import Heard, listen, network_name, sharing_copy
from bayesdiff.pretrained.schedule import path_and_prediction
from bayesdiff.pretrained.scheduled import Scheduled, scheduled
from bayesdiff.solvers import Solver
from bayesdiff.solvers.step import check_finite, check_solver
from bayesdiff.storage.artefacts import key_of, read_json, weights_key, write_json
from bayesdiff.uncertainty import Ensemble, Estimator, Samples, starts_of
from bayesdiff.uncertainty.memory import images_at_once
from bayesdiff.uncertainty.scores.of_maps_and_images import mean, top_mean, total

log = logging.getLogger(__name__)

_CURVATURE, _RECORD = "curvature.safetensors", "posterior.json"


@dataclass(frozen=True)
class Output:
    """Images of a pipeline with what the posterior says of them.

    Attributes:
        images: ``(N, C, H, W)`` in [0, 1].
        variance: of their pixels, ``(N, C, H, W)``, in squared units of these images.
        latent_variance: of the states they are decoded from; None where states are images.
        scores: one number per image, ``(N,)``, by name.
        record: what all this was made with.
        samples: images and variances in full, with their course over time.
    """

    images: Tensor
    variance: Tensor
    latent_variance: Tensor | None
    scores: dict[str, Tensor]
    record: dict[str, Any]
    samples: Samples


class BayesianPipeline:
    """A pipeline of diffusers with a posterior of its network's last layer.

    Example::

        pipe = DiffusionPipeline.from_pretrained(path)
        bayes = BayesianPipeline.of(pipe).fit(images, prompts=prompts)
        out = bayes("a red fox", num_inference_steps=20, seed=1)
        bayes.save(folder)
        bayes = BayesianPipeline.load(pipe, folder)

    Nothing of the pipeline is described: it is run, and listened to. It is never changed.

    Args:
        pipe: of diffusers, with one network that is called at every step.
        arguments: of every call of the pipeline, such as max_sequence_length.
        settings: of ``HeadPosterior.fit``: structure, sigma_noise, prior_precision, n_eff, rank.

    Raises:
        UserError: for a pipeline that cannot be followed; the line names what cannot.
    """

    def __init__(
        self, pipe: Any, arguments: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        self.pipe, self.arguments, self.settings = pipe, dict(arguments or {}), settings
        self.who = type(pipe).__name__
        _check_pipeline(pipe)
        self.takes = set(inspect.signature(pipe.__call__).parameters)
        self.network = sharing_copy(getattr(pipe, network_name(pipe)))
        self.posterior: HeadPosterior | None = None
        classes = getattr(self.network, "config", {}).get("num_class_embeds")
        # A network of classes in a pipeline that does not know of any; the last is "no class".
        self.hidden_classes = None if self.takes & {"prompt", "class_labels"} else classes
        self._outputs: list[Tensor] = []
        self._models: dict[tuple[Any, ...], tuple[GenerativeModel, PipelineCoder]] = {}
        self._given: dict[str, Convention] = {}

    @classmethod
    def of(
        cls, pipe: Any, arguments: Mapping[str, Any] | None = None, **settings: Any
    ) -> "BayesianPipeline":
        """The pipeline, to be fitted."""
        return cls(pipe, arguments, **settings)

    # What the pipeline does

    def _example(self) -> dict[str, Any]:
        """Arguments of one image, whatever it shows."""
        if "prompt" in self.takes:
            return {"prompt": ""}
        return {"class_labels": [0]} if self.takes_classes else {}

    @property
    def takes_classes(self) -> bool:
        """Whether samples have classes."""
        return "class_labels" in self.takes or self.hidden_classes is not None

    def _heard(self, num_inference_steps: int, **kwargs: Any) -> Heard:
        """One run of the pipeline for one image, the network's outputs noise."""
        generator = torch.Generator().manual_seed(0)

        def answer(number: int, really: Any) -> Tensor:
            # Outputs of another shape, for another size of image, begin with a real one.
            if number == 0 or not self._outputs:
                self._outputs = [really()]
            like = self._outputs[0]
            return torch.randn(like.shape, generator=generator).to(like)

        given = {**self.arguments, **kwargs, "num_inference_steps": num_inference_steps}
        return listen(self.pipe, answer=answer, **self._for_pipeline(given))

    def _for_pipeline(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments as the pipeline takes them; classes that it does not know of beside them."""
        if self.hidden_classes is None:
            return dict(arguments)
        given = {k: v for k, v in arguments.items() if k not in ("class_labels", "guidance_scale")}
        return given | {"beside": {"class_labels": torch.tensor(arguments["class_labels"])}}

    def convention(self, heard: Heard, arguments: Mapping[str, Any]) -> Convention:
        """What a run tells, with guidance where the pipeline does not know of any."""
        found = convention_of(heard, self.who)
        if self.hidden_classes is None:
            return found
        key = next(name for name in found.given if name[-1] == "class_labels")
        nothing = {**found.given, key: torch.full((1,), self.hidden_classes - 1)}
        return replace(
            found, nothing=nothing, guidance=float(arguments.get("guidance_scale", 1.0))
        )

    def _model_at(
        self, convention: Convention, scheduler: Any, arguments: Mapping[str, Any]
    ) -> tuple[GenerativeModel, PipelineCoder]:
        """The network for states of one shape, as a model of this package."""
        key = convention.shape, _plain_key(convention.call)
        if key not in self._models:
            path, prediction = path_and_prediction(scheduler)
            given = {**self.arguments, **arguments, "num_inference_steps": 2}
            coder = coder_of(self.pipe, convention.shape, **self._for_pipeline(given))
            path.arrange = _arranged(coder)
            table = Table([convention.given] if convention.given else [])
            called = Called(sharing_copy(self.network), convention.call, path.schedule_time, table)
            one = torch.zeros(1, dtype=torch.long) if convention.given else None
            net = tapped(called, convention.shape, one)
            condition: Any = Prompts(table) if convention.given else None
            never = torch.optim.SGD  # it is trained already
            model = GenerativeModel(net, path, prediction, never, condition=condition).eval()
            self._models[key] = model.requires_grad_(False), coder
        return self._models[key]

    # The posterior

    def fit(
        self,
        images: Any,
        prompts: Sequence[str] | None = None,
        labels: Sequence[int] | None = None,
        batch_size: int = 32,
        **options: Any,
    ) -> "BayesianPipeline":
        """Fit the posterior to images that the network was trained on, or ones like them.

        Args:
            images: ``(N, C, H, W)``, uint8 or float in [0, 1]; of the size that the pipeline makes.
            prompts: one for each image, where the pipeline takes prompts.
            labels: classes, where it takes these.
            batch_size: images at once.
            options: of ``fit_curvature``: draws, seed, num_images.

        Raises:
            UserError: for images without the prompts or labels that the pipeline takes.
        """
        images = _as_images(images)
        conditions = self._conditions(prompts, labels, len(images))
        size = self._size(images)
        first = conditions[0] if conditions else self._example()
        heard = self._heard(3, **first, **size)
        convention = self.convention(heard, first | size)
        model, coder = self._model_at(convention, heard.scheduler, first | size)
        values = self._filled(model, conditions, size)
        parts = images.split(batch_size)
        states = torch.cat(
            [coder.encode(2 * part - 1) for part in track(parts, "latents", "images", len)]
        )
        curvature = fit_curvature(
            model, states, values, source=self._source(states, conditions, options),
            batch_size=batch_size, encode=_as_it_is, **options,
        )  # fmt: skip
        self.posterior = HeadPosterior.fit(curvature, **self.settings)
        return self

    def _conditions(
        self, prompts: Sequence[str] | None, labels: Sequence[int] | None, count: int
    ) -> list[dict[str, Any]]:
        """Arguments of the pipeline for every image; none where it takes neither."""
        name = "prompt" if "prompt" in self.takes else None
        name = "class_labels" if self.takes_classes else name
        given = {"prompt": prompts, "class_labels": labels}
        for other, values in given.items():
            plural = "prompts" if other == "prompt" else "labels"
            if other != name and values is not None:
                raise UserError(f"{self.who} takes no {plural}; leave them out")
            if other == name and values is None:
                raise UserError(f"{self.who} needs {plural}: one for each image")
            if other == name and values is not None and len(values) != count:
                raise UserError(f"{len(values)} {plural} for {count} images; give one for each")
        if name is None:
            return []
        values = given[name]
        assert values is not None
        return [{name: v if name == "prompt" else [int(v)]} for v in values]

    def _size(self, images: Tensor) -> dict[str, int]:
        """Height and width, where the pipeline takes them."""
        sides = {"height": images.shape[2], "width": images.shape[3]}
        return {name: value for name, value in sides.items() if name in self.takes}

    def _filled(
        self, model: GenerativeModel, conditions: Sequence[dict[str, Any]], size: dict[str, int]
    ) -> Tensor | None:
        """Numbers of the conditions in the model's table, which gets what it lacks."""
        if not conditions or model.condition is None:
            return None
        distinct = {str(each): each for each in conditions}
        lacking = [each for name, each in distinct.items() if name + str(size) not in self._given]
        for each in track(lacking, "conditions", "prompts"):
            heard = self._heard(2, **each, **size)
            self._given[str(each) + str(size)] = self.convention(heard, each)
        table: Table = model.condition.table  # type: ignore[attr-defined]
        table.given = [self._given[name + str(size)].given for name in distinct]
        table.nothing = []
        number = {name: k for k, name in enumerate(distinct)}
        return torch.tensor([number[str(each)] for each in conditions])

    def _source(self, *parts: Any) -> str:
        return f"{self.key}-{key_of(*[_digest(each) for each in parts])}"

    @property
    def key(self) -> str:
        """Of the network's weights."""
        return weights_key(self.network)

    def for_classes(
        self, conditions: Sequence[dict[str, Any]], size: Mapping[str, int]
    ) -> tuple[GenerativeModel, PipelineCoder]:
        """The network as a model of this package, with one condition for each class of data.

        Args:
            conditions: arguments of the pipeline for one image of each class; none for a pipeline
                without conditions.
            size: height and width, where the pipeline takes them.
        """
        asked = list(conditions) or [self._example()]
        guided = {"guidance_scale": 2.0} if "guidance_scale" in self.takes else {}
        heard = [self._heard(3, **guided, **each, **size) for each in asked]
        known = [self.convention(each, own) for each, own in zip(heard, asked, strict=True)]
        model, coder = self._model_at(known[0], heard[0].scheduler, {**asked[0], **size})
        if conditions and model.condition is not None:
            table: Table = model.condition.table  # type: ignore[attr-defined]
            table.given = [own.given for own in known]
            table.nothing = [own.nothing for own in known if own.nothing]
            model.condition = Prompts(table, len(asked))
            model.num_classes = len(asked)
        return model, coder

    # Images

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: Sequence[int] | None = None,
        num_images: int | None = None,
        num_inference_steps: int = 50,
        seed: int = 0,
        uncertainty: Estimator | None = None,
        solver: Solver | None = None,
        **kwargs: Any,
    ) -> Output:
        """Images with the variance that the posterior gives their pixels.

        Args:
            prompt: one, or one for each image in turn.
            class_labels: the same for pipelines that take classes.
            num_images: how many; None for one of each prompt or label.
            num_inference_steps: of the scheduler.
            seed: of the noise.
            uncertainty: how the posterior is carried along; None for an ensemble of 16.
            solver: one of ours in the scheduler's place.
            kwargs: of the pipeline: guidance_scale, negative_prompt, height, width and others.

        Raises:
            UserError: before ``fit`` or ``load``, and for arguments that do not go together.
        """
        if self.posterior is None:
            raise UserError("this pipeline has no posterior yet; call fit(images, ...) or load")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        count = len(prompts or class_labels or [0])
        asked = self._conditions(prompts, class_labels, count) or [{}]
        count = count if num_images is None else at_least("num_images", num_images)
        estimator = uncertainty or Ensemble(members=16)
        heard = [self._heard(num_inference_steps, **each, **kwargs) for each in asked]
        known = [
            self.convention(each, own | kwargs) for each, own in zip(heard, asked, strict=True)
        ]
        model, coder = self._model_at(known[0], heard[0].scheduler, asked[0] | kwargs)
        if model.condition is not None:
            table = Table(
                [own.given for own in known], [own.nothing for own in known if own.nothing]
            )
            condition = model.condition
            condition.table.given, condition.table.nothing = table.given, table.nothing  # type: ignore
            condition.chosen = list(range(len(known)))  # type: ignore[attr-defined]
        if solver is None:
            solver = scheduled(heard[0].scheduler, model.path, known[0].guidance)
        samples = self._samples(model, coder, solver, estimator, seed, count)
        return self._output(samples, solver, estimator, seed, asked, kwargs)

    def _samples(
        self,
        model: GenerativeModel,
        coder: PipelineCoder,
        solver: Solver,
        estimator: Estimator,
        seed: int,
        count: int,
    ) -> Samples:
        """Samples 0 ... count - 1, a batch at a time."""
        posterior = self.posterior
        assert posterior is not None
        check_solver(solver, model.path, model.condition is not None)
        estimator.check(solver)
        device = next(model.parameters()).device
        decoder = None if coder.coder is None else coder.decode
        start_of = starts_of(model, solver, seed, coder.shape, device, decoder)
        check_finite(solver, model.prediction, start_of([0]).steps())
        ready = estimator.fit(start_of, posterior)
        size = images_at_once(ready, solver, model, coder.shape)
        batches = torch.arange(count).split(size)
        made = [
            ready(start_of(b.tolist()), posterior) for b in track(batches, "maps", "images", len)
        ]
        return replace(Samples.join(made), numbers=torch.arange(count))

    def _output(
        self,
        samples: Samples,
        solver: Solver,
        estimator: Estimator,
        seed: int,
        asked: Sequence[dict[str, Any]],
        kwargs: Mapping[str, Any],
    ) -> Output:
        posterior = self.posterior
        assert posterior is not None
        unit = samples.in_unit_range()
        scores = {"map.sum": total(unit.variance), "map.mean": mean(unit.variance)}
        scores["map.top_mean"] = top_mean(unit.variance)
        record = {
            "pipeline": self.who,
            "solver": getattr(solver, "called", solver.name),
            "guidance": solver.guidance,
            "estimator": samples.estimator,
            "nfe": samples.nfe,
            "seed": seed,
            "asked": list(asked),
            "arguments": {name: str(value) for name, value in kwargs.items()},
            "posterior": posterior.settings,
            "weights": self.key,
            "decoder_calls": "one per image and one per member or direction"
            if samples.latents is not None
            else "none",
        }
        images = unit.images.clamp(0, 1)
        return Output(images, unit.variance, samples.latent_variance, scores, record, samples)

    def scheduled(
        self, name: str | None, options: Mapping[str, Any], num_steps: int, guidance: float
    ) -> Scheduled:
        """A solver that is the pipeline's scheduler, or another of diffusers in its place.

        Args:
            name: of its class; None for the pipeline's own.
            options: of its configuration.
            num_steps: given to ``set_timesteps``.
            guidance: of the solver.

        Raises:
            UserError: for a name that is no scheduler, or steps that are not affine.
        """
        before = self.pipe
        path, _ = path_and_prediction(before.scheduler)
        if name is not None or options:
            self.pipe = copy.copy(before)
            self.pipe.scheduler = _scheduler(before.scheduler, name, options)
        try:
            heard = self._heard(num_steps, **self._example())
        finally:
            self.pipe = before
        return scheduled(heard.scheduler, path, guidance)

    # Files

    def save(self, folder: str | Path) -> None:
        """Keep the posterior in a folder: its curvature and its settings.

        Raises:
            UserError: before ``fit``.
        """
        if self.posterior is None:
            raise UserError("there is no posterior to save yet; call fit(images, ...) first")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.posterior.curvature.save(folder / _CURVATURE)
        write_json(folder / _RECORD, {"weights": self.key, "settings": self.settings})

    @classmethod
    def load(cls, pipe: Any, folder: str | Path) -> "BayesianPipeline":
        """A pipeline with the posterior that ``save`` has kept.

        Raises:
            UserError: for a folder without one, or one of another network.
        """
        record = read_json(Path(folder) / _RECORD)
        if record is None:
            raise UserError(f"{folder} has no {_RECORD}; give a folder that save has written")
        made = cls(pipe, **record["settings"])
        if record["weights"] != made.key:
            raise UserError(
                f"{folder} is the posterior of another network than this {made.who}'s; fit it "
                "again, or give the pipeline that it was fitted to"
            )
        curvature = Curvature.load(Path(folder) / _CURVATURE)
        made.posterior = HeadPosterior.fit(curvature, **made.settings)
        return made

    def doctor(self, num_inference_steps: int = 20, **kwargs: Any) -> tuple[Finding, ...]:
        """What will spoil results on this pipeline, each with its cure."""
        heard = self._heard(num_inference_steps, **self._example(), **kwargs)
        return examine(heard.scheduler)


def _scheduler(own: Any, name: str | None, options: Mapping[str, Any]) -> Any:
    """Another scheduler with the same training behind it.

    Raises:
        UserError: for a name or an option that diffusers does not know.
    """
    import diffusers

    kind = type(own) if name is None else getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        known = [each for each in dir(diffusers) if each.endswith("Scheduler")]
        raise UserError(f"diffusers has no scheduler {name!r}{near(str(name), known)}")
    try:
        return kind.from_config(own.config, **options)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(
            f"{kind.__name__} does not take these options: {one_line(error)}"
        ) from error


def _as_it_is(states: Tensor) -> Tensor:
    return states


def _arranged(coder: PipelineCoder) -> Any:
    """Noise in the decoder's order as states, where the orders differ."""
    if coder.places is None:
        return None
    return lambda noise: coder.from_ordered(noise.flatten(1).unflatten(1, coder.latents))


def _plain_key(call: Call) -> str:
    constants = {str(name): str(_digest(value)) for name, value in call.constants.items()}
    return key_of(str((call.sample, call.time, call.scale, call.shift, call.channels)), constants)


def _digest(value: Any) -> Any:
    if isinstance(value, Tensor):
        return weights_key(nn.ParameterDict({"x": nn.Parameter(value, requires_grad=False)}))
    return value


def _as_images(images: Any) -> Tensor:
    """Images as float32 in [0, 1], ``(N, C, H, W)``."""
    if not isinstance(images, Tensor) or images.dim() != 4:
        raise UserError("images must be a tensor (N, C, H, W), uint8 or float in [0, 1]")
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def _check_pipeline(pipe: Any) -> None:
    """Refuse what changes images behind the decoder, and what is no pipeline.

    Raises:
        UserError: one line with the cure.
    """
    if not hasattr(pipe, "components") or not hasattr(pipe, "scheduler"):
        raise UserError(
            f"{type(pipe).__name__} is no pipeline of diffusers; load one with "
            "DiffusionPipeline.from_pretrained(path)"
        )
    if pipe.components.get("safety_checker") is not None:
        raise UserError(
            "safety_checker puts black images in the place of some, whose maps would be of others; "
            "load the pipeline with safety_checker=None"
        )
