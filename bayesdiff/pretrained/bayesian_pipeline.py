"""A pipeline of diffusers whose last layer is Bayesian: images with maps, post hoc."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import bayesdiff.pretrained.export  # noqa: F401 - diffusers reads its folders once it is imported
from bayesdiff.checks import UserError, at_least, seed_of
from bayesdiff.laplace.curvature import fit_curvature
from bayesdiff.laplace.posterior import HeadPosterior
from bayesdiff.laplace.record import Curvature
from bayesdiff.machine.progress import track
from bayesdiff.models import GenerativeModel
from bayesdiff.pretrained.asked import (
    check_kinds,
    check_pass_options,
    check_posterior,
    count_of,
    shown_by,
)
from bayesdiff.pretrained.call import Prompts
from bayesdiff.pretrained.coder import PipelineCoder
from bayesdiff.pretrained.convention import Convention
from bayesdiff.pretrained.doctor import Finding
from bayesdiff.pretrained.followed import FollowedPipeline
from bayesdiff.pretrained.needs import Counts, Needs, needs_of_pipeline
from bayesdiff.pretrained.output import Output, record_of
from bayesdiff.pretrained.schedule import schedule_key
from bayesdiff.pretrained.training_images import TrainingImages
from bayesdiff.solvers import Solver
from bayesdiff.solvers.step import check_finite, check_solver
from bayesdiff.storage.artefacts import key_of, read_json, weights_key, write_json
from bayesdiff.uncertainty import Ensemble, Estimator, Samples, starts_of
from bayesdiff.uncertainty.memory import images_at_once

_CURVATURE, _RECORD = "curvature.safetensors", "posterior.json"


class BayesianPipeline:
    """A pipeline of diffusers with a posterior of its network's last layer.

    Nothing of the pipeline is described: it is run, and listened to. It is never changed.

    Args:
        pipe: of diffusers, with one network that is called at every step.
        arguments: of every call of the pipeline, such as ``max_sequence_length``.
        settings: of ``HeadPosterior.fit``: structure, sigma_noise, prior_precision, n_eff, rank.

    Example:
        After the example of ``NetworkPipeline``; any other pipeline goes as well, with
        ``prompts`` or ``labels`` of the images where it takes some:

        >>> import tempfile
        >>> bayes = BayesianPipeline.of(pipe).fit(torch.rand(16, 1, 8, 8))
        >>> out = bayes(num_images=2, num_inference_steps=5, seed=1)
        >>> out.images.shape, out.variance.shape, out.scores["map.sum"].shape
        (torch.Size([2, 1, 8, 8]), torch.Size([2, 1, 8, 8]), torch.Size([2]))
        >>> bayes.save(folder := tempfile.mkdtemp())
        >>> again = BayesianPipeline.load(pipe, folder)
    """

    def __init__(
        self, pipe: Any, arguments: Mapping[str, Any] | None = None, **settings: Any
    ) -> None:
        self.followed, self.settings = FollowedPipeline(pipe, arguments), settings
        check_posterior(settings)
        self.posterior: HeadPosterior | None = None
        self.schedule = ""  # that the posterior was fitted under
        self._known: dict[str, Convention] = {}

    @classmethod
    def of(
        cls, pipe: Any, arguments: Mapping[str, Any] | None = None, **settings: Any
    ) -> "BayesianPipeline":
        """The pipeline, to be fitted."""
        return cls(pipe, arguments, **settings)

    def doctor(self, num_inference_steps: int = 20) -> tuple[Finding, ...]:
        """What will spoil results on this pipeline, each with its cure."""
        return self.followed.doctor(num_inference_steps)

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
            images: of the size the pipeline makes, see ``TrainingImages.of``.
            prompts: one for each image, where the pipeline takes prompts; None for those of the
                data set.
            labels: classes, where it takes these; None for those of the folder, zip or data set.
            batch_size: images at once.
            options: of ``fit_curvature``: draws, seed, num_images, time_bins.
        """
        at_least("batch_size", batch_size)
        check_pass_options(options)
        given, pipeline = TrainingImages.of(images), self.followed
        pipeline.parts.check(pipeline.pipe)
        if labels is None and pipeline.condition == "class_labels":
            labels = given.second(int)
        if prompts is None and pipeline.condition == "prompt":
            prompts = given.second(str)
        shown = shown_by(self.followed, prompts, labels, len(given))
        size = pipeline.sized(*given.size)
        first = {**pipeline.asking_for(shown[0] if shown else None), **size}
        heard = pipeline.heard(3, first)
        model, coder = pipeline.model_at(pipeline.convention(heard, first), heard.scheduler, first)
        values = self._values(model, shown, size)
        parts = given.batches(batch_size)
        states = torch.cat([coder.encode(2 * part - 1) for part in parts])
        sums = weights_key(nn.ParameterList([nn.Parameter(states, requires_grad=False)]))
        source = f"{pipeline.key}-{key_of(sums, shown, options)}"
        curvature = fit_curvature(
            model, states, values, source=source, batch_size=batch_size, encode=_as_it_is,
            **options,
        )  # fmt: skip
        self.posterior = HeadPosterior.fit(curvature, **self.settings)
        self.schedule = schedule_key(heard.scheduler)
        return self

    @torch.no_grad()
    def needs(
        self,
        num_inference_steps: int = 50,
        uncertainty: Estimator | None = None,
        *,
        num_images: int = 1,
        fitted_to: int = 1000,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> Needs:
        """What posterior and maps take, by one evaluation of the network: print it.

        Args:
            num_inference_steps: see the call, as ``uncertainty`` and ``kwargs``.
            uncertainty: see there.
            num_images: that get a map.
            fitted_to: images that the posterior is fitted to.
            batch_size: see ``fit``.
            kwargs: of the pipeline.
        """
        estimator = uncertainty or Ensemble(members=16)
        check_kinds(estimator, None)
        counts = Counts(num_inference_steps, num_images, fitted_to, batch_size)
        return needs_of_pipeline(self.followed, estimator, counts, kwargs)

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
            prompt: one, or several that images have in turn.
            class_labels: the same for pipelines that take classes.
            num_images: how many; None for one of each prompt or class.
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
        pipeline, estimator = self.followed, uncertainty or Ensemble(members=16)
        pipeline.parts.check(pipeline.pipe)
        prompts = [prompt] if isinstance(prompt, str) else prompt
        shown = shown_by(self.followed, prompts, class_labels, None)
        count = count_of(shown, num_images)
        pipeline.require(kwargs)
        at_least("num_inference_steps", num_inference_steps)
        seed_of("seed", seed)
        check_kinds(estimator, solver)
        asked = [{**pipeline.asking_for(each), **kwargs} for each in (shown or [None])]
        model, coder, solver = pipeline.ready(asked, num_inference_steps, solver, self.schedule)
        samples = self._samples(model, coder, solver, estimator, seed, count)
        record = {"pipeline": pipeline.who, "posterior": self.posterior.settings}
        record |= {"weights": pipeline.key, **record_of(samples, solver, seed, asked)}
        return Output.of(samples, record)

    def save(self, folder: str | Path) -> None:
        """Keep the posterior in a folder: its curvature and its settings.

        Raises:
            UserError: before ``fit``.
        """
        if self.posterior is None:
            raise UserError("there is no posterior to save yet; call fit(images, ...) first")
        self.followed.parts.check(self.followed.pipe)
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.posterior.curvature.save(folder / _CURVATURE)
        record = {"weights": self.followed.key, "schedule": self.schedule}
        write_json(folder / _RECORD, record | {"settings": self.settings})

    @classmethod
    def load(
        cls, pipe: Any, folder: str | Path, arguments: Mapping[str, Any] | None = None
    ) -> "BayesianPipeline":
        """A pipeline with the posterior that ``save`` has kept.

        Raises:
            UserError: for a folder without one, or one of another network.
        """
        record = read_json(Path(folder) / _RECORD)
        if record is None or not {"weights", "schedule", "settings"} <= record.keys():
            raise UserError(f"{folder} has no {_RECORD}; give a folder that save has written")
        made = cls(pipe, arguments, **record["settings"])
        if record["weights"] != made.followed.key:
            raise UserError(
                f"{folder} is the posterior of another network than this {made.followed.who}'s; "
                "fit it again, or give the pipeline that it was fitted to"
            )
        curvature = Curvature.load(Path(folder) / _CURVATURE)
        made.posterior = HeadPosterior.fit(curvature, **made.settings)
        made.schedule = record["schedule"]
        if made.schedule != schedule_key(pipe.scheduler):
            raise UserError(
                f"{folder} is the posterior of another schedule or prediction than this "
                f"{made.followed.who}'s scheduler has; give the scheduler that it was fitted under"
            )
        return made

    def _values(
        self, model: GenerativeModel, shown: Sequence[Any], size: Mapping[str, int]
    ) -> Tensor | None:
        """Numbers of what images show in the table of the model, which is filled here."""
        if not isinstance(model.condition, Prompts):
            return None
        distinct = list(dict.fromkeys(shown))
        for each in track(distinct, "conditions", "conditions"):
            asked = {**self.followed.asking_for(each), **size}
            if str(asked) not in self._known:
                heard = self.followed.heard(2, asked)
                self._known[str(asked)] = self.followed.convention(heard, asked)
        asked_for = [str({**self.followed.asking_for(each), **size}) for each in distinct]
        model.condition.show([self._known[each] for each in asked_for])
        number = {each: k for k, each in enumerate(distinct)}
        return torch.tensor([number[each] for each in shown])

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
        if not coder.trivial:
            estimator.check_decoded()
        estimator.check_model(model)
        device = next(model.parameters()).device
        decoder = None if coder.trivial else coder.decode
        start_of = starts_of(model, solver, seed, coder.shape, device, decoder)
        estimator.check_aleatoric(start_of([0]))
        check_finite(solver, model.prediction, start_of([0]).steps())
        ready = estimator.fit(start_of, posterior)
        size = images_at_once(ready, solver, model, coder.shape)
        batches = [batch.tolist() for batch in torch.arange(count).split(size)]
        made = [
            ready.mapped(start_of, b, posterior) for b in track(batches, "maps", "images", len)
        ]
        return replace(Samples.join(made), numbers=torch.arange(count))


def _as_it_is(states: Tensor) -> Tensor:
    return states
