"""The Gram matrix against unfolded patches, and the batched head against setting weights."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bayesdiff.checks import UserError
from bayesdiff.laplace.gram import gram, gram_diagonal
from bayesdiff.laplace.head import HeadGeometry, apply_head, head_matrix


def patches(head, features):
    """Rows phi~ of every pixel, by F.unfold, float64."""
    features = features.double()
    if isinstance(head, nn.Linear):
        rows = features.flatten(0, -2)
    else:
        k = head.kernel_size[0]
        rows = F.unfold(features, k, padding=k // 2).transpose(1, 2).flatten(0, 1)
    ones = rows.new_ones(len(rows), 1)
    return torch.cat([rows, ones], 1) if head.bias is not None else rows


def conv(width, channels=1, k=3, **options):
    return nn.Conv2d(width, channels, k, padding=k // 2, **options).double()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    k=st.sampled_from([1, 3, 5]),
    width=st.integers(1, 4),
    height=st.integers(1, 7),
    columns=st.integers(1, 7),
    batch=st.integers(1, 3),
    bias=st.booleans(),
    last=st.booleans(),
)
def test_gram_equals_unfolded_patches_for_every_shape(
    k, width, height, columns, batch, bias, last
):
    torch.manual_seed(0)
    head = conv(width, k=k, bias=bias)
    features = torch.randn(batch, width, height, columns, dtype=torch.float64) + 0.5
    if last:
        features = features.contiguous(memory_format=torch.channels_last)
    rows, before = patches(head, features), features.clone()
    result = gram(head, features)
    torch.testing.assert_close(result, rows.T @ rows, rtol=1e-12, atol=1e-11)
    assert torch.equal(result, result.T)
    diagonal = gram_diagonal(head, features)
    torch.testing.assert_close(diagonal, result.diagonal(), rtol=1e-12, atol=1e-11)
    single = gram(head, features.float())
    torch.testing.assert_close(single, result, rtol=1e-5, atol=1e-4)
    assert torch.equal(features, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_of_many_images_equals_the_sum_over_chunks(monkeypatch, dtype):
    head, features = conv(3), torch.randn(7, 3, 5, 4).to(dtype)
    exact = gram(head, features.double())
    for pixels, doubles in ((45, 2 * 7 * 6 * 3), (8, 1), (10**6, 10**6)):
        monkeypatch.setattr("bayesdiff.laplace.gram._PIXELS", pixels)
        monkeypatch.setattr("bayesdiff.laplace.gram._DOUBLES", doubles)
        bound = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(gram(head, features), exact, rtol=bound, atol=10 * bound)


@pytest.mark.parametrize("shape", [(9,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("bias", [True, False])
def test_gram_of_a_linear_head(shape, bias):
    head = nn.Linear(6, 2, bias=bias).double()
    features = torch.randn(*shape, 6, dtype=torch.float64)
    rows = patches(head, features)
    torch.testing.assert_close(gram(head, features), rows.T @ rows, rtol=1e-12, atol=1e-12)
    diagonal = gram_diagonal(head, features)
    torch.testing.assert_close(diagonal, (rows * rows).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("size", "images"), [(28, 32), (70, 3), (1, 500)])
@pytest.mark.parametrize("k", [1, 3])
def test_float32_products_are_accurate_to_1e_6_of_the_diagonal(k, size, images):
    torch.manual_seed(0)
    features, head = F.silu(torch.randn(images, 16, size, size) + 0.5), conv(16, k=k)
    exact, single = gram(head, features.double()), gram(head, features)
    assert single.dtype == torch.float64
    assert (single - exact).abs().max() < 1e-6 * exact.diagonal().max()


def test_float32_products_keep_the_smallest_eigenvalues():
    """Smooth, correlated features: the variance of no direction moves by more than 1e-3."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(16, 16)).Q
    latent = F.avg_pool2d(torch.randn(32, 16, 32, 32), 5, stride=1)
    latent = latent * torch.logspace(0, -1.7, 16)[:, None, None]
    features, head = torch.einsum("ij,bjhw->bihw", basis, latent) + 0.02, conv(16)
    exact = gram(head, features.double())
    values, vectors = torch.linalg.eigh(exact)
    assert values[-1] / values[0] > 1e6
    whitening = vectors / values.sqrt()
    error = whitening.T @ (gram(head, features) - exact) @ whitening
    assert torch.linalg.eigvalsh((error + error.T) / 2).abs().max() < 1e-3


def test_float64_products_keep_eigenvalues_over_ten_decades():
    torch.manual_seed(1)
    scales = torch.logspace(0, -5, 8, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    latent = torch.randn(8, 8, 14, 14, dtype=torch.float64) * scales[:, None, None]
    features, head = torch.einsum("ij,bjhw->bihw", basis, latent), conv(8)
    rows = patches(head, features)
    truth, fast = rows.T @ rows, gram(head, features)
    assert (fast - truth).abs().max() < 1e-13 * truth.diagonal().max()
    low, high = torch.linalg.eigvalsh(truth)[[0, -1]]
    assert high / low > 1e9
    torch.testing.assert_close(torch.linalg.eigvalsh(fast)[0], low, rtol=1e-4, atol=0)


def test_head_matrix_follows_the_patch_order():
    head = conv(3, channels=2)
    features = torch.randn(2, 3, 5, 6, dtype=torch.float64)
    product = patches(head, features) @ head_matrix(head).T
    expected = head(features).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)
    assert HeadGeometry.of(head).size == 28
    assert head_matrix(nn.Linear(4, 3, bias=False)).shape == (3, 4)


def set_weights(head, matrix):
    weight = matrix[:, :-1] if head.bias is not None else matrix
    head.weight.data = weight.reshape(head.weight.shape).to(head.weight)
    if head.bias is not None:
        head.bias.data = matrix[:, -1].to(head.bias)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_batched_draws_equal_setting_the_weights_in_a_loop(k, bias, shared):
    torch.manual_seed(0)
    head = conv(4, 2, k, bias=bias) if k else nn.Linear(4, 2, bias=bias).double()
    before = head_matrix(head)
    weights = torch.randn(5, 2, HeadGeometry.of(head).size, dtype=torch.float64)
    shape = (3, 4, 6, 5) if k else (3, 6, 4)
    features = torch.randn(1 if shared else 5, *shape, dtype=torch.float64)
    fast = apply_head(head, features, weights)
    assert torch.equal(head_matrix(head), before)
    for m, matrix in enumerate(weights):
        set_weights(head, matrix)
        expected = head(features[0 if shared else m])
        torch.testing.assert_close(fast[m], expected, rtol=1e-12, atol=1e-12)
    assert apply_head(head, features.float(), weights).dtype == torch.float32


@pytest.mark.parametrize(
    ("head", "word"),
    [
        (nn.Conv2d(2, 1, 3, padding=1, stride=2), "stride=(2, 2)"),
        (nn.Conv2d(2, 1, 3, padding=2, dilation=2), "dilation=(2, 2)"),
        (nn.Conv2d(2, 2, 3, padding=1, groups=2), "groups=2"),
        (nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular"), "circular"),
        (nn.Conv2d(2, 1, 2, padding=1), "kernel_size=(2, 2)"),
        (nn.Conv2d(2, 1, (1, 3), padding=(0, 1)), "kernel_size=(1, 3)"),
        (nn.Conv2d(2, 1, 3), "padding=(0, 0)"),
        (nn.ReLU(), "ReLU"),
        (nn.ConvTranspose2d(2, 1, 3), "ConvTranspose2d"),
    ],
)
def test_heads_that_cannot_be_treated_are_refused_in_one_line(head, word):
    for call in (head_matrix, lambda h: gram(h, torch.zeros(1, 2, 4, 4))):
        with pytest.raises(UserError) as refusal:
            call(head)
        assert word in str(refusal.value) and "\n" not in str(refusal.value)


def test_features_of_the_wrong_width_are_refused():
    with pytest.raises(UserError, match="D = 3"):
        gram(conv(3), torch.zeros(1, 4, 5, 5))
    with pytest.raises(UserError, match="do not fit"):
        apply_head(conv(3), torch.zeros(2, 1, 3, 5, 5), torch.zeros(3, 1, 28))
