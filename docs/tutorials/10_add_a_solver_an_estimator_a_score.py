"""
A solver, an estimator and a score of your own
==============================================

Each is one Python file and one YAML file, in a folder of yours. This repository does not change,
and nothing is registered. Here we add a two-step solver, the cheapest estimator that can be
thought of, and a score, and use all three in one run.
"""

# %%
# A folder of yours
# -----------------
# Python files lie in it, YAML files in a folder for each group: ``solver``, ``uncertainty``,
# ``scores``.

import logging
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

mine = Path("outputs/tutorials/my_parts")  # or any folder of yours
sys.path.insert(0, str(mine))  # in a shell: export PYTHONPATH=mine


def write(name, text):
    path = mine / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# %%
# A solver
# --------
# A solver is coefficients, never a loop. A step is x' = a x + b g(x, t) + c z, with the network's
# output g and noise z. A multistep method also *keeps* a combination p x + q g at every step, and
# adds what earlier steps kept. This one is Adams-Bashforth: it keeps the velocity v, and takes x'
# = x + h (3 v - v_before) / 2 when steps are equal. Its first step is Euler's.
#
# Networks may predict velocity, noise or data; ``convert`` writes v as p x + q g for each of them.

write(
    "my_solver.py",
    """
from dataclasses import dataclass
from itertools import pairwise

import torch

from bayesdiff.paths import convert
from bayesdiff.solvers import Solver, Step


@dataclass(frozen=True)
class TwoStep(Solver):
    name = "two_step"  # in file names and tables

    def steps(self, path, prediction, times):
        made, before = [], None
        for start, end in pairwise(times):
            at = path.coefficients(torch.tensor(start, dtype=torch.float64))
            p, q = map(float, convert(prediction, "velocity", at))
            h = end - start
            w = h / before / 2 if before else 0.0
            a, b = 1 + h * (1 + w) * p, h * (1 + w) * q
            history = (-h * w,) if before else ()
            made.append(Step((start,), ((1.0,),), (a, b), 0.0, end, ((p, q),), history))
            before = h
        return made
""",
)
write(
    "solver/two_step.yaml",
    """
_target_: my_solver.TwoStep
num_steps: 20
""",
)

# %%
# Check it where the answer is known. ``integrate`` follows any function of x and t, here dx/dt =
# -x from x = 1, which ends at 1/e.

from my_solver import TwoStep

from bayesdiff.paths import CondOT
from bayesdiff.solvers import Euler, integrate, plan


def error(solver):
    steps = plan(solver, CondOT(), "velocity")
    end = integrate(lambda x, t: -x, steps, torch.ones(1, dtype=torch.float64), torch.randn)
    return abs(float(end) - torch.e**-1)


counts = [5, 10, 20, 40, 80]
figure, ax = plt.subplots(figsize=(5.4, 3.6), layout="constrained")
for kind, label in ((Euler, "euler"), (TwoStep, "two_step")):
    errors = [error(kind(n)) for n in counts]
    ax.loglog(counts, errors, "o-", label=label)
    print(f"{label}: twice the steps, {errors[-2] / errors[-1]:.2f} times less error")
ax.set(xlabel="steps", ylabel="error at the end of dx/dt = -x")
ax.minorticks_off()
ax.set_xticks(counts, counts)
ax.legend()
plt.show()

# %%
# Two is order 1, four is order 2.
#
# An estimator
# ------------
# An estimator is given the start of a batch (noise, labels, steps) and the posterior of the head.
# It returns the model's own images, and a variance for every pixel. This one takes the variance
# that the posterior gives the network's *last* output, and forgets all steps before. It costs no
# further evaluation of the network. Whether it is any good, we shall see.

write(
    "my_estimator.py",
    """
from dataclasses import dataclass
from typing import ClassVar

import torch

from bayesdiff.solvers import integrate
from bayesdiff.uncertainty import Estimator
from bayesdiff.uncertainty.recorder import Recorder


@dataclass(frozen=True, kw_only=True)
class LastStep(Estimator):
    name: ClassVar[str] = "last_step"

    def check(self, solver): ...  # every solver is served

    def copies(self, solver):
        return 1  # network inputs per image that are held at once

    @torch.inference_mode()
    def __call__(self, start, posterior):
        field, steps, states = start.field(), start.steps(), [start.initial()]
        keep = lambda step, x: states.append(x)
        image = integrate(field, steps, states[0], start.draw, keep)
        last = steps[-1]  # x' = a x + b g + what earlier steps kept
        net, features = field.model.net, field.features(states[-2], last.times[-1])
        output = net.head(features)
        variance = posterior.predictive_variance(features).to(output).expand_as(output)
        variance = last.output[-1] ** 2 * net.fold(variance)  # to the pixels of the image
        recorder = Recorder(len(steps), self.times)
        for step, state in zip(steps, states[1:], strict=True):
            recorder(step.end, state, variance if step is last else torch.zeros_like(image))
        return recorder.samples(image, variance, start.labels, field.evaluations, self.name)
""",
)
write(
    "uncertainty/last_step.yaml",
    """
_target_: my_estimator.LastStep
num_images: 64 # images that get a map
batch_size: 16
""",
)

# %%
# A score
# -------
# A score is one number for each image; the higher, the more uncertain. It is given what its
# arguments name: ``images`` in [-1, 1], ``variance`` in squared units of these, ``members``,
# ``logits`` and others. This one is the variance of bright pixels alone.

write(
    "my_score.py",
    """
def bright(variance, images, floor=0.0):
    return (variance * (images > floor)).flatten(1).sum(1)
""",
)
write(
    "scores/bright.yaml",
    """
bright: {_target_: my_score.bright, _partial_: true, floor: 0.25}
""",
)

# %%
# All three in one run
# --------------------
# They are chosen by the names of their files, and ``config_dir`` is where these are. In a shell:
# ``python train.py --config-dir mine solver=two_step uncertainty=last_step scores=bright`` and the
# words below. The second run changes the estimator alone, so it trains nothing.

settings = [
    "solver=two_step",
    "model=flow",
    "data=digits",
    "net.channels=[16,32]",
    "net.patch=2",
    "data.batch_size=64",
    "data.epochs=40",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "uncertainty.num_images=40",
    "metrics.num_images=0",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
scored = ["scores=bright", "report.sorted_by=[own.bright]"]
own = run(compose(*settings, "uncertainty=last_step", *scored, config_dir=mine))
reference = run(compose(*settings, "uncertainty=ensemble", config_dir=mine))

# %%
# The score in the report
# -----------------------
# ``report.sorted_by`` draws all images in the order of a score. A score of yours is called
# ``own.`` and its name, wherever scores are named.

figure, ax = plt.subplots(figsize=(11, 2.7), layout="constrained")
(sheet,) = own.folder.rglob("*sorted*.png")
ax.imshow(plt.imread(sheet))
ax.set_axis_off()
plt.show()

# %%
# Is the estimator any good?
# --------------------------
# An ensemble that follows whole trajectories is the reference. Rows of maps have a scale each, for
# their sizes differ. This network answers for blocks of 2x2 pixels, and the posterior's variance
# is the same for all four: so ``last_step`` cannot tell them apart.

samples = stored_samples(own.samples)
cheap = samples.variance.sqrt()
whole = stored_samples(reference.samples).variance.sqrt()

figure, axes = plt.subplots(3, 10, figsize=(11, 3.6), layout="constrained")
for k in range(10):
    axes[0, k].imshow(samples.images[k, 0], cmap="gray", vmin=-1, vmax=1)
for line, deviation, label in ((axes[1], cheap, "last_step"), (axes[2], whole, "ensemble")):
    for axis, each in zip(line, deviation, strict=False):
        shown = axis.imshow(each[0], cmap="magma", vmin=0, vmax=deviation[:10].max())
    line[0].set_ylabel(label)
    figure.colorbar(shown, ax=line.tolist(), label="sd of the pixel", pad=0.01)
for axis in axes.flat:
    axis.set(xticks=[], yticks=[])
plt.show()

sums = [deviation.square().flatten(1).sum(1) for deviation in (cheap, whole)]
ranks = torch.stack([each.argsort().argsort().double() for each in sums])
print(f"size of the maps, last_step over ensemble: {float(cheap.mean() / whole.mean()):.3f}")
print(f"rank correlation of their sums, 40 images: {float(torch.corrcoef(ranks)[0, 1]):.2f}")

# %%
# One step knows little of what the weights have done on the whole way. That is why the estimators
# of this package carry the posterior through all of them.
#
# What next
# ---------
# - Your source is part of the key of what it makes: edit ``my_estimator.py``, and the same command
#   makes maps again, and keeps the training.
# - All that each of them may do: :doc:`/extend/solver`, :doc:`/extend/estimator`,
#   :doc:`/extend/score`. Other parts: :doc:`/extend/index`, and :doc:`06_your_own_network`.
# - :doc:`02_is_my_map_right`: compare any estimator with a reference in one option.
