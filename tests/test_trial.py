"""A network of one's own that would train, and make wrong maps, is refused before any training."""

import pytest
import torch
import torch.nn.functional as F
from conftest import hydra_composes, smallest
from torch import nn

from bayesdiff import pipeline
from bayesdiff.checks import UserError
from bayesdiff.networks.trial import try_network

LABELS = torch.tensor([0, 1])
NOTHING = torch.tensor([2, 2])


class Small(nn.Module):
    """One convolution on blocks of pixels, with labels; ``wrong`` changes one thing of it."""

    def __init__(self, in_channels=1, num_classes=2, wrong=""):
        super().__init__()
        self.num_classes, self.wrong = num_classes, wrong
        self.body = nn.Conv2d(4 * in_channels, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.5)
        self.classes = nn.Embedding(num_classes + (wrong != "room"), 6)
        self.head = nn.Conv2d(7 if wrong == "head" else 6, 4 * in_channels, 1)

    def features(self, x, t, y=None):
        y = torch.full(t.shape, self.num_classes) if y is None else y
        hidden = self.body(F.pixel_unshuffle(x, 2)) + self.classes(y)[..., None, None]
        return self.dropout(torch.tanh(hidden + t[:, None, None, None].to(x)))

    def fold(self, output):
        done = {"tanh": torch.tanh, "abs": torch.abs, "scale": lambda v: 2 * v}
        wider = 1 if self.wrong == "shape" else 2
        return F.pixel_shuffle(done.get(self.wrong, lambda v: v)(output), wider)

    def forward(self, x, t, y=None):
        made = self.fold(self.head(self.features(x, t, y)))
        if self.wrong == "noise":
            return made + torch.randn_like(made)
        if self.wrong == "tuple":
            return made, None
        return made + 0.1 * x if self.wrong == "more" else made


def tried(wrong, y=(None, NOTHING, LABELS)):
    net = Small(wrong=wrong)
    try_network(net, (1, 4, 4), (1, 4, 4), y)
    return net


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("room", "with y=None, which is no condition and needs room too: index out of range"),
        ("head", r"does not run on states \(1, 4, 4\) .*to have 7 channels"),
        ("shape", r"gives \(4, 2, 2\) for states \(1, 4, 4\); its output must be"),
        ("tuple", r"gives a tuple for states \(1, 4, 4\)"),
        ("noise", "gives other values each time"),
        ("more", "forward gives other values than fold"),
        ("tanh", "fold changes values"),
        ("abs", "fold changes values"),
        ("scale", "fold changes values"),
    ],
)
def test_what_would_make_wrong_maps_is_refused(wrong, message):
    with pytest.raises(UserError, match=message) as refusal:
        tried(wrong)
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith("Small")


def test_a_trial_leaves_no_trace():
    torch.manual_seed(3)
    expected = [Small().state_dict()["body.weight"], torch.rand(1)]
    torch.manual_seed(3)
    net = tried("")
    assert torch.equal(net.body.weight, expected[0]) and torch.equal(torch.rand(1), expected[1])
    assert net.training and net.dropout.training


def test_a_condition_is_told_by_its_values():
    with pytest.raises(UserError, match=r"with y=\[5, 5\]: index out of range"):
        tried("", [torch.tensor([5, 5])])


def test_a_run_tries_its_network(tmp_path):
    given = [o for o in smallest(tmp_path, "uncertainty=ensemble") if not o.startswith("net")]
    own = "net._target_=test_trial.Small"
    for wrong in ("", "more"):
        cfg = hydra_composes([*given, "uncertainty.members=2", own, f"+net.wrong={wrong!r}"])
        if not wrong:
            pipeline.prepare(cfg)
            continue
        with pytest.raises(UserError, match="Small.forward gives other values"):
            pipeline.prepare(cfg)


def test_a_fault_of_its_own_is_not_blamed_on_the_condition():
    class Faulty(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv2d(1, 1, 1)

        def features(self, x, t, y=None):
            return x[:, None]  # one dimension too many

        def fold(self, output):
            return output

        def forward(self, x, t, y=None):
            return self.fold(self.head(self.features(x, t, y)))

    with pytest.raises(UserError) as error:
        try_network(Faulty(), (1, 4, 4), (1, 4, 4), (None, torch.tensor([0, 1])))
    assert "y=[0, 1]" in str(error.value) and "no condition" not in str(error.value)
