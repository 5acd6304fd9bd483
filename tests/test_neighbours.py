from itertools import combinations

import numpy as np
import pytest
import torch
from hand import density_coverage
from torch_fidelity.metric_prc import prc_features_to_metric

from bayesdiff.checks import UserError
from bayesdiff.metrics import neighbours as module
from bayesdiff.metrics.cmmd import cmmd, cmmd_of_subsets
from bayesdiff.metrics.neighbours import neighbours, radii, squared_distances


def normal(count, *, dims=5, seed=0, scale=1.0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return shift + scale * torch.randn(count, dims, generator=generator, dtype=torch.float64)


def column(*values):
    return torch.tensor(values, dtype=torch.float64).unsqueeze(1)


def slow(generated, real, k):
    """The definitions, image by image and ball by ball."""
    generated, real = generated.double().numpy(), real.double().numpy()
    size = [np.sort(np.linalg.norm(real - centre, axis=1))[k] for centre in real]
    half = np.quantile(size, 0.5)
    rows = []
    for point in generated:
        distances = [np.linalg.norm(point - centre) for centre in real]
        pairs = list(zip(size, distances, strict=True))
        around = [r for r, d in pairs if d <= r]
        realism = max(r / d for r, d in pairs if r <= half)
        rows.append((realism, min(around, default=np.nan), len(around)))
    covered = [
        any(np.linalg.norm(point - centre) <= r for point in generated)
        for centre, r in zip(real, size, strict=True)
    ]
    return np.array(rows), np.array(covered)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("count", [40, 41])
def test_neighbours_against_loops(k, count, monkeypatch):
    generated, real = normal(30, seed=1, scale=1.2, shift=0.4), normal(count)
    found = neighbours(generated, real, k)
    rows, covered = slow(generated, real, k)
    np.testing.assert_allclose(found.realism, rows[:, 0], rtol=1e-10)
    np.testing.assert_allclose(found.rarity, rows[:, 1], rtol=1e-10)
    np.testing.assert_array_equal(found.balls, rows[:, 2])
    np.testing.assert_array_equal(found.inside, rows[:, 2] > 0)
    np.testing.assert_array_equal(found.covered, covered)
    assert 0 < found.inside.double().mean() < 1 and 0 < covered.mean() < 1
    density, coverage = density_coverage(generated, real, k)
    assert density == pytest.approx(rows[:, 2].mean() / k, rel=1e-12)
    assert coverage == pytest.approx(covered.mean(), rel=1e-12)

    monkeypatch.setattr(module, "BLOCK", 7 * count)  # blocks of seven rows
    assert max(part.numel() for part in squared_distances(generated, real)) == 7 * count
    parts = neighbours(generated, real, k)
    torch.testing.assert_close(parts.rarity, found.rarity, rtol=1e-12, atol=0, equal_nan=True)
    assert torch.equal(parts.balls, found.balls) and torch.equal(parts.covered, found.covered)


def test_a_line_of_numbers_by_hand():
    """Five balls around 0, 1, 2, 4, 8 of radius 1, 1, 1, 2, 4; the first three are the half."""
    real, generated = column(0, 1, 2, 4, 8), column(0.5, 3, 6, 20, 2)
    assert radii(real, 1).tolist() == [1, 1, 1, 2, 4]
    found = neighbours(generated, real, 1)
    # 3 and 6 lie on the surface of the balls around 2 and 4; 2 is a copy, on two surfaces.
    assert found.balls.tolist() == [2, 2, 2, 0, 3]
    assert found.inside.tolist() == [True, True, True, False, True]
    assert found.realism.tolist() == pytest.approx([2, 1, 1 / 4, 1 / 18, np.inf])
    assert found.rarity[[0, 1, 2, 4]].tolist() == [1, 1, 2, 1] and found.rarity[3].isnan()
    assert found.covered.all()
    assert density_coverage(generated, real, 1) == (9 / 5, 1)
    assert density_coverage(column(0.5), real, 1) == (2, 2 / 5)


@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_copies_of_the_real_images_are_as_real_as_can_be(shift):
    real = normal(60, shift=shift)
    found = neighbours(real.flip(0), real, 3)
    assert found.inside.all() and found.covered.all()
    # Where the own ball is pruned, only others are left to compare with.
    small = radii(real.flip(0), 3) <= radii(real, 3).quantile(0.5)
    assert torch.equal(found.realism.isinf(), small) and small.sum() == 30
    # Every ball holds its centre and exactly three others.
    assert float(found.balls.double().mean()) == 4
    assert density_coverage(real, real, 5) == (pytest.approx(6 / 5), 1)


def test_far_images_are_outside_everything():
    real, generated = normal(50), normal(20, seed=1, shift=100)
    found = neighbours(generated, real, 3)
    assert not found.inside.any() and not found.covered.any() and not found.balls.any()
    assert found.rarity.isnan().all()
    assert (found.realism > 0).all() and (found.realism < 0.02).all()
    assert density_coverage(generated, real) == (0, 0)


def test_equal_distributions_have_density_and_coverage_of_the_theory():
    """Naeem et al. 2020: coverage is 1 - (N-1)...(N-k) / ((2N-1)...(2N-k)), density 1."""
    count, k = 1500, 5
    density, coverage = density_coverage(normal(count, dims=2, seed=1), normal(count, dims=2), k)
    steps = np.arange(1, k + 1)
    assert coverage == pytest.approx(
        1 - np.prod((count - steps) / (2 * count - steps)), abs=4 * (0.03 / count) ** 0.5
    )
    assert density == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("copies", [1, 4])
def test_balls_of_no_radius_hold_copies_only(copies):
    real = torch.cat([normal(10), normal(1, seed=2).repeat(copies, 1)])
    generated = torch.cat([real[-1:], real[-1:] + 1e-3])
    found = neighbours(generated, real, 3)
    assert (float(radii(real, 3)[-1]) == 0) == (copies == 4)
    assert found.realism[0].isinf() and bool(found.inside[0])
    if copies == 4:
        assert found.rarity[0] == 0 and found.balls[1] < found.balls[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_share_inside_is_the_precision_of_torch_fidelity(dtype):
    generated, real = normal(300, seed=1, scale=1.3).to(dtype), normal(200).to(dtype)
    inside = neighbours(generated, real, 3).inside
    for part in (slice(None), slice(20, 170)):
        theirs = prc_features_to_metric(
            generated[part], real, prc_neighborhood=3, prc_batch_size=100,
            save_cpu_ram=True, verbose=False,
        )  # fmt: skip
        assert float(inside[part].double().mean()) == pytest.approx(theirs["precision"], abs=1e-6)
        assert 0.3 < theirs["precision"] < 0.99


def test_unusable_features_are_refused_in_one_line():
    good = normal(5)
    bad = good.clone()
    bad[3, 1] = torch.nan
    for arguments, message in [
        ((good, good, 5), "k must be below the number of real images, got 5 for 5"),
        ((good, good, 0), "k must be a whole number >= 1, got 0"),
        ((bad, good, 1), "generated features of image 3 are not finite"),
        ((good[0], good, 1), r"generated features must be \(N, F\)"),
        ((good, good[:0], 1), r"real features must be \(N, F\)"),
    ]:
        with pytest.raises(UserError, match=message) as refusal:
            neighbours(*arguments)
        assert "\n" not in str(refusal.value)


# CMMD


def slow_cmmd(x, y):
    x, y = (v.double() / v.double().norm(dim=1, keepdim=True) for v in (x, y))

    def mean(a, b, skip):
        values = [
            -np.expm1(-float((a[i] - b[j]).square().sum()) / 200)
            for i in range(len(a))
            for j in range(len(b))
            if not (skip and i == j)
        ]
        return np.mean(values)

    return 1000 * (2 * mean(x, y, False) - mean(x, x, True) - mean(y, y, True))


def test_cmmd_against_a_loop(monkeypatch):
    x, y = normal(23, seed=1, shift=0.3), normal(31)
    expected = slow_cmmd(x, y)
    assert cmmd(x, y, encoder="classifier") == {
        "cmmd@23/classifier": pytest.approx(expected, rel=1e-11)
    }
    assert cmmd(x.float(), 7 * y, encoder="clip")["cmmd@23/clip"] == pytest.approx(
        expected, rel=1e-5
    )
    subsets = [torch.tensor([0, 5, 7]), torch.arange(3, 20), torch.arange(23)]
    found = cmmd_of_subsets(x, y, subsets)
    np.testing.assert_allclose(found, [slow_cmmd(x[s], y) for s in subsets], rtol=1e-10)
    monkeypatch.setattr(module, "BLOCK", 40)
    torch.testing.assert_close(cmmd_of_subsets(x, y, subsets), found, rtol=1e-11, atol=0)


def test_cmmd_of_one_distribution_is_zero_on_average():
    """Over all ways to split ten images into halves the unbiased estimate averages to zero."""
    images = normal(10, dims=3)
    values = []
    for half in combinations(range(10), 5):
        rest = [i for i in range(10) if i not in half]
        values.append(float(cmmd_of_subsets(images, images[rest], torch.tensor([half]))))
    assert abs(np.mean(values)) < 1e-13 < 0.1 < np.std(values)


@pytest.mark.parametrize("angle", [1e-6, 1e-3, 1.0])
def test_cmmd_of_a_turned_point_mass_is_exact(angle):
    """All images at one place on the circle: twice one minus the kernel of the distance."""
    turned = torch.tensor([[np.cos(angle), np.sin(angle)]]).repeat(6, 1)
    fixed = torch.tensor([[1.0, 0.0]], dtype=torch.float64).repeat(4, 1)
    expected = -2000 * np.expm1(-((2 * np.sin(angle / 2)) ** 2) / 200)
    found = cmmd(turned, fixed, encoder="plane")["cmmd@6/plane"]
    assert found == pytest.approx(expected, rel=1e-8)


def test_cmmd_refuses_what_has_no_direction_and_single_images():
    good = normal(4)
    zero = good.clone()
    zero[2] = 0
    with pytest.raises(UserError, match="real features of image 2 are all zero"):
        cmmd(good, zero, encoder="x")
    for pair in ((good[:1], good), (good, good[:1])):
        with pytest.raises(UserError, match="at least 2 images on each side, got 1"):
            cmmd(*pair, encoder="x")
