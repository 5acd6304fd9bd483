"""A pipeline that is followed: its network is a model of this package, its scheduler a solver."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from bayesdiff.checks import UserError
from bayesdiff.models import GenerativeModel
from bayesdiff.options.spelling import near
from bayesdiff.pretrained.call import Called, Prompts, Table
from bayesdiff.pretrained.classes import check_classes, class_rows
from bayesdiff.pretrained.coder import PipelineCoder, coder_of
from bayesdiff.pretrained.convention import Convention, convention_of
from bayesdiff.pretrained.doctor import Finding, diagnose
from bayesdiff.pretrained.head import TIMES, check_tokens, gains, tapped
from bayesdiff.pretrained.listening import Heard, listen, network_name, sharing_copy
from bayesdiff.pretrained.loop_checks import OURS, check_start, noise_finding, warn_once
from bayesdiff.pretrained.parts import Parts, check_pipeline
from bayesdiff.pretrained.schedule import path_and_prediction, schedule_key
from bayesdiff.pretrained.scheduled import Scheduled, another_scheduler, scheduled
from bayesdiff.solvers import Solver
from bayesdiff.storage.artefacts import key_of, weights_key

Arguments = Mapping[str, Any]  # of a pipeline, for one image


class FollowedPipeline:
    """What a pipeline does, learnt by running it; it is never changed.

    Args:
        pipe: of diffusers, with one network that is called at every step.
        arguments: of every call of the pipeline, such as ``max_sequence_length``.

    Attributes:
        who: the pipeline's class.
        takes: names of its arguments.
        network: that shares its weights with the pipeline's.
        hidden_classes: rows of a network's embedding of classes that the pipeline does not know
            of, the last for "no class"; None where there are none.
    """

    def __init__(self, pipe: Any, arguments: Arguments | None = None) -> None:
        check_pipeline(pipe)
        self.pipe, self.arguments = pipe, dict(arguments or {})
        self.who = type(pipe).__name__
        self.takes = set(inspect.signature(pipe.__call__).parameters)
        self.network = sharing_copy(getattr(pipe, network_name(pipe)))
        rows = getattr(self.network, "config", {}).get("num_class_embeds")
        self.hidden_classes = None if self.takes & {"prompt", "class_labels"} else rows
        self.parts = Parts(pipe)
        self.require(self.arguments)
        self._output: Tensor | None = None
        self._models: dict[str, tuple[GenerativeModel, PipelineCoder]] = {}

    @property
    def key(self) -> str:
        """Of the network's weights."""
        return self.parts.key

    @cached_property
    def class_rows(self) -> int | None:
        """Classes that the network has rows for; None for unknown, or where it takes none."""
        if self.hidden_classes is not None or self.condition != "class_labels":
            return self.hidden_classes
        return class_rows(self.network, lambda k: self.heard(1, self.asking_for(k)))

    @property
    def condition(self) -> str | None:
        """Name of the argument that says what an image shows; None for a pipeline without."""
        if "prompt" in self.takes:
            return "prompt"
        classes = "class_labels" in self.takes or self.hidden_classes is not None
        return "class_labels" if classes else None

    def asking_for(self, value: Any = None) -> dict[str, Any]:
        """Arguments of one image that shows this prompt or class; of any, for None."""
        if self.condition is None:
            return {}
        if self.condition == "prompt":
            return {"prompt": "" if value is None else str(value)}
        return {"class_labels": [value or 0]}

    def sized(self, height: int, width: int) -> dict[str, int]:
        """Arguments for images of this size, where the pipeline takes one."""
        sides = {"height": height, "width": width}
        return {name: side for name, side in sides.items() if name in self.takes}

    def require(self, arguments: Arguments) -> None:
        """Refuse arguments that the pipeline does not have; many take any, and ignore them.

        Raises:
            UserError: with the name that was meant.
        """
        more = set() if self.hidden_classes is None else {"guidance_scale"}
        for name in arguments:
            if name in OURS:
                raise UserError(f"{name} is the pipeline's own; {OURS[name]}")
            if name not in self.takes | more:
                raise UserError(f"{self.who} takes no {name!r}{near(name, sorted(self.takes))}")

    def heard(self, num_inference_steps: int, arguments: Arguments) -> Heard:
        """One run of the pipeline for one image, its network's outputs noise."""
        generator = torch.Generator().manual_seed(0)

        def answer(number: int, really: Callable[[], Tensor]) -> Tensor:
            # Images of another size have outputs of another shape: runs begin with a real one.
            if number == 0 or self._output is None:
                self._output = really()
            return torch.randn(self._output.shape, generator=generator).to(self._output)

        given = {**arguments, "num_inference_steps": num_inference_steps}
        if "generator" not in self.takes:
            return listen(self.pipe, answer=answer, **self._given(given))
        noise = torch.Generator().manual_seed(0)
        given["generator"] = noise.clone_state()
        heard = listen(self.pipe, answer=answer, **self._given(given))
        check_start(heard, noise, self.who)
        return heard

    def convention(self, heard: Heard, arguments: Arguments) -> Convention:
        """What a run tells, with guidance where the pipeline does not know of any."""
        found = convention_of(heard, self.who)
        if self.hidden_classes is None:
            return found
        key = next(name for name in found.given if name[-1] == "class_labels")
        nothing = {**found.given, key: torch.full((1,), self.hidden_classes - 1)}
        scale = float(arguments.get("guidance_scale", 1.0))
        return replace(found, nothing=nothing, guidance=scale)

    def model_at(
        self, convention: Convention, scheduler: Any, arguments: Arguments
    ) -> tuple[GenerativeModel, PipelineCoder]:
        """The network for states of one shape, as a model of this package, and their coder."""
        call = convention.call
        constants = {str(name): _digest(value) for name, value in call.constants.items()}
        told = schedule_key(scheduler), str((convention.shape, replace(call, constants={})))
        key = key_of(told, constants)
        if key not in self._models:
            self._models[key] = self._model(convention, scheduler, arguments)
        return self._models[key]

    def ready(
        self,
        asked: Sequence[Arguments],
        num_inference_steps: int,
        solver: Solver | None = None,
        schedule: str = "",
    ) -> tuple[GenerativeModel, PipelineCoder, Solver]:
        """Model, coder and solver for images that show these, in turn.

        Args:
            asked: arguments of one image each.
            num_inference_steps: of the scheduler.
            solver: in the scheduler's place, None for the scheduler.
            schedule: that the posterior was fitted under; empty for any.

        Raises:
            UserError: for another schedule.
        """
        heard = [self.heard(num_inference_steps, each) for each in asked]
        if schedule not in ("", schedule_key(heard[0].scheduler)):
            raise UserError(
                f"the posterior is of another schedule or prediction than {self.who}'s "
                "scheduler has now; fit it again, or give back the scheduler's betas and "
                "prediction_type"
            )
        # A clock shows over several steps; few may be asked for.
        told = heard if num_inference_steps > 2 else [self.heard(3, each) for each in asked]
        known = [self.convention(run, each) for run, each in zip(told, asked, strict=True)]
        model, coder = self.model_at(known[0], heard[0].scheduler, asked[0])
        if isinstance(model.condition, Prompts):
            model.condition.show(known)
        if solver is None:
            path, _ = path_and_prediction(heard[0].scheduler)
            solver = scheduled(heard[0], path, known[0].guidance)
        elif solver.guidance == 1:
            solver = replace(solver, guidance=known[0].guidance)
        return model, coder, solver

    def _model(
        self, convention: Convention, scheduler: Any, arguments: Arguments
    ) -> tuple[GenerativeModel, PipelineCoder]:
        """A model with a table of its own."""
        call = convention.call
        path, prediction = path_and_prediction(scheduler)
        given = self._given({**arguments, "num_inference_steps": 2})
        coder = coder_of(self.pipe, convention.shape, **given)
        if coder.places is not None:
            path.arrange = coder.arranged
        table = Table([convention.given] if convention.given else [])
        clock = path.schedule_time if call.follows == "timesteps" else path.noise_level
        called = Called(sharing_copy(self.network), call, clock, table)
        first = torch.zeros(1, dtype=torch.long) if convention.given else None
        if path.takes == "score":
            # A network that divides by sigma says the noise before, whose errors are alike at
            # all times; those of the score are not.
            behind = path.noise_level(TIMES) * gains(called, convention.shape, first)
            if float((behind / behind[0] - 1).abs().max()) < 1e-3:
                called.gain, prediction = path.noise_per_score, "noise"
        net = tapped(called, convention.shape, first)
        if any(value.dim() > 2 for value in convention.given.values()):
            check_tokens(net, type(self.network).__name__)
        condition = Prompts(table) if convention.given else None
        never = torch.optim.SGD  # it is trained already
        model = GenerativeModel(net, path, prediction, never, condition=condition)
        return model.eval().requires_grad_(False), coder

    def for_classes(
        self, shown: Sequence[Any], size: Arguments
    ) -> tuple[GenerativeModel, PipelineCoder]:
        """A model of its own with one condition for each class of data, and its states' coder.

        Args:
            shown: prompt or number of each class; none for samples without a condition.
            size: from ``sized``.
        """
        if self.condition == "class_labels":
            check_classes(shown, self.class_rows, self.who)
        guided = {"guidance_scale": 2.0} if "guidance_scale" in self.takes else {}
        asked = [{**self.asking_for(each), **size} for each in (shown or [None])]
        heard = [self.heard(3, guided | each) for each in asked]
        known = [self.convention(run, each) for run, each in zip(heard, asked, strict=True)]
        model, coder = self._model(known[0], heard[0].scheduler, asked[0])
        if isinstance(model.condition, Prompts):
            model.condition.show(known, len(shown) or None)
            model.num_classes = model.condition.num_classes
        rows = [{str(k): _digest(v) for k, v in own.given.items()} for own in known]
        schedule = sorted((name, str(value)) for name, value in self.pipe.scheduler.config.items())
        made_from = key_of(schedule_key(self.pipe.scheduler), schedule, rows).encode()
        # Beside the weights, so that whatever is made of the model is known to come from it too.
        cast(nn.Module, model.net).register_buffer("made_from", torch.tensor(list(made_from)))
        return model, coder

    def scheduled(
        self, name: str | None, options: Arguments, num_steps: int, guidance: float
    ) -> Scheduled:
        """A solver that is the pipeline's scheduler, or another of diffusers in its place.

        Args:
            name: of its class; None for the pipeline's own.
            options: of its configuration.
            num_steps: given to ``set_timesteps``.
            guidance: of the solver.

        Raises:
            UserError: for a scheduler of another training.
        """
        path, _ = path_and_prediction(self.pipe.scheduler)
        other = copy.copy(self)
        if name is not None or options:
            other.pipe = copy.copy(self.pipe)
            other.pipe.scheduler = another_scheduler(self.pipe.scheduler, name, options)
            if schedule_key(other.pipe.scheduler) != schedule_key(self.pipe.scheduler):
                raise UserError(
                    f"{type(other.pipe.scheduler).__name__} with these options is of another "
                    f"training than {type(self.pipe.scheduler).__name__} of the pipeline; its "
                    "betas and its prediction_type must stay"
                )
        heard = other.heard(num_steps, other.asking_for())
        # Another one's loop is ours, and what a pipeline would do to its noise is no matter.
        own = other.pipe is self.pipe
        made = scheduled(heard, path, guidance, own_noise=own)
        findings = [*diagnose(heard.scheduler), *(noise_finding(self.who, heard) if own else ())]
        for finding in findings:
            warn_once(f"{made.called}: {finding.what}: {finding.why}; {finding.cure}")
        return made

    def doctor(self, num_inference_steps: int = 20) -> tuple[Finding, ...]:
        """What will spoil results on this pipeline, each with its cure."""
        self.parts.check(self.pipe)
        heard = self.heard(num_inference_steps, self.asking_for())
        return (*diagnose(heard.scheduler), *noise_finding(self.who, heard))

    def _given(self, arguments: Arguments) -> dict[str, Any]:
        """Arguments as the pipeline takes them; classes that it does not know of beside them."""
        given = {**self.arguments, **arguments}
        if "output_type" in self.takes:
            given["output_type"] = "pt"  # others are made by NumPy, which has no bfloat16
        if self.hidden_classes is None:
            return given
        beside = {"class_labels": torch.tensor(given.pop("class_labels"))}
        given.pop("guidance_scale", None)
        return given | {"beside": beside}


def _digest(value: Any) -> str:
    """What changes with the value of a constant argument."""
    if not isinstance(value, Tensor):
        return str(value)
    return weights_key(nn.ParameterDict({"value": nn.Parameter(value, requires_grad=False)}))
