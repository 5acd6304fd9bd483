"""
A network of your own
=====================

Any network can be trained here, if its last layer can be seen. That layer, the *head*, becomes
Bayesian; what comes before it are *features*; what comes after it only moves numbers to their
pixels and is called *fold*. This tutorial brings a small transformer: one Python file and one YAML
file in a folder of yours. Nothing in this repository changes.
"""

# %%
# The Python file
# ---------------
# An image is cut into patches of 2x2 pixels. Every patch is one token; two blocks of attention let
# tokens read each other; the head says four pixels for every token; ``fold`` puts these back.
#
# The constructor is given what it names: ``in_channels``, ``image_size`` and ``num_classes`` come
# from the data, the others from the YAML. Label ``num_classes`` stands for "no class".

import logging
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from bayesdiff.pipeline import compose, run
from bayesdiff.uncertainty.stored import stored_samples

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no tips, no list of devices

mine = Path("outputs/tutorials/my_network")  # or any folder of yours
(mine / "net").mkdir(parents=True, exist_ok=True)
(mine / "my_transformer.py").write_text('''
import torch
import torch.nn.functional as F
from torch import nn


class PatchTransformer(nn.Module):
    def __init__(self, in_channels, image_size, num_classes, width=64, blocks=2, heads=4):
        super().__init__()
        self.num_classes, self.side = num_classes, image_size // 2
        self.patches = nn.Linear(4 * in_channels, width)
        self.places = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_classes + 1, width)  # the last one is "no class"
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 4 * in_channels)  # becomes Bayesian

    def features(self, x, t, y=None):
        """(B, C, H, W), (B,), (B,) -> input of the head (B, tokens, width)."""
        if y is None:
            y = torch.full(t.shape, self.num_classes, device=t.device)
        tokens = self.patches(F.pixel_unshuffle(x, 2).flatten(2).mT) + self.places
        tokens = tokens + (self.time(t[:, None].to(x)) + self.label(y))[:, None]
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def fold(self, output):
        """(B, tokens, 4 C) -> (B, C, H, W)."""
        return F.pixel_shuffle(output.mT.unflatten(2, (self.side, self.side)), 2)

    def forward(self, x, t, y=None):
        return self.fold(self.head(self.features(x, t, y)))
''')

# %%
# The YAML file
# -------------
# It lies in a folder ``net``, the group that it belongs to. Its name is what you choose it by, and
# ``_target_`` says what is made. There is nothing to register.

(mine / "net/patches.yaml").write_text("""
_target_: my_transformer.PatchTransformer
width: 64 # of every token
blocks: 2
heads: 4
""")

# %%
# Does it do what it should?
# --------------------------
# A run tries the network before it trains: shapes, "no class", and that ``fold`` moves numbers and
# changes none. What it cannot know is whether your network reads its time and its label.

sys.path.insert(0, str(mine))  # in a shell: export PYTHONPATH=mine
from my_transformer import PatchTransformer

net = PatchTransformer(1, 8, 10).eval()
x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.8]), torch.tensor([3, 7])
with torch.no_grad():
    print("it reads the time: ", not torch.allclose(net(x, t, y), net(x, t.flip(0), y)))
    print("it reads the label:", not torch.allclose(net(x, t, y), net(x, t, y.flip(0))))
print("weights:", sum(p.numel() for p in net.parameters()))
print("of them in the head:", sum(p.numel() for p in net.head.parameters()))

# %%
# Train it
# --------
# ``config_dir`` is where your YAML files are. All else is as for any other network. In a shell
# this is ``python train.py --config-dir mine net=patches`` with the words below.

settings = [
    "net=patches",
    "model=flow",
    "data=digits",
    "data.batch_size=64",
    "data.epochs=45",
    "data.ema_decay=0.99",
    "model.optimizer.lr=2e-3",
    "uncertainty=ensemble",
    "uncertainty.num_images=20",
    "metrics.num_images=300",
    "report.pdf=false",
    "callbacks.samples=null",
    "callbacks.progress=null",
    "output_dir=outputs/tutorials",
]
result = run(compose(*settings, config_dir=mine))
for name, value in result.metrics.items():
    if name.removeprefix("real/").startswith("fid@") or name == "laplace/parameters":
        print(f"{name:30} {value:8.2f}")

# %%
# ``real/`` is the same for 300 held-out digits: compare with that.
#
# Its maps
# --------
# Two samples of every class, each with the standard deviation of its pixels, in units of images in
# [-1, 1]. All maps are on one scale.

samples = stored_samples(result.samples)
deviation = samples.variance.sqrt()
figure, axes = plt.subplots(4, 10, figsize=(11, 4.7), layout="constrained")
for k in range(20):
    above, below = axes[2 * (k // 10) : 2 * (k // 10) + 2, k % 10]
    above.imshow(samples.images[k, 0], cmap="gray", vmin=-1, vmax=1)
    above.set_title(f"{samples.labels[k]}")
    shown = below.imshow(deviation[k, 0], cmap="magma", vmin=0, vmax=deviation.max())
    above.set_axis_off()
    below.set_axis_off()
figure.colorbar(shown, ax=axes.ravel().tolist(), label="sd of the pixel", pad=0.01)
plt.show()

# %%
# What happens to a mistake
# -------------------------
# A network that breaks the rule is refused before anything is trained, in one line. Here ``fold``
# changes values, so that the head would no longer be the last layer.

from bayesdiff.checks import UserError

source = (mine / "my_transformer.py").read_text()
wrong = source.replace("return F.pixel_shuffle(", "return 2 * F.pixel_shuffle(")
(mine / "my_mistake.py").write_text(wrong)
(mine / "net/mistake.yaml").write_text("_target_: my_mistake.PatchTransformer")
try:
    run(compose(*settings, "net=mistake", config_dir=mine))
except UserError as error:
    print(error)

# %%
# What next
# ---------
# - :doc:`/extend/network`: all that a network may have, and ``Adapter``, for a module that exists
#   already and shall stay as it is.
# - :doc:`10_add_a_solver_an_estimator_a_score`: other parts of your own, in the same way.
# - :doc:`05_your_own_images`, :doc:`/extend/data`: data of your own.
