"""The reference is compared with the paper's formula written row by row, and its gradients with finite differences."""

import math

import pytest
import torch

from empcause.ops.philox import dropout_keep_mask, philox4x32
from empcause.ops.reference import biased_attention_reference


def test_equals_the_paper_row_by_row():
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 1, 5, 3, dtype=torch.float64) for _ in range(3))
    cause, strength = torch.rand(1, 5, dtype=torch.float64), 0.75
    output, logsumexp = biased_attention_reference(query, key, value, cause, strength=strength)
    for i in range(5):
        x = [float(query[0, 0, i] @ key[0, 0, j]) / math.sqrt(3) for j in range(i + 1)]
        p = [math.exp(a) / sum(map(math.exp, x)) for a in x]
        biased = [a * (1 + strength * float(cause[0, j])) for j, a in enumerate(p)]
        b = [a / sum(biased) for a in biased]
        row = sum(b[j] * value[0, 0, j] for j in range(i + 1))
        torch.testing.assert_close(output[0, 0, i], row)
        total = sum(math.exp(a) * (1 + strength * float(cause[0, j])) for j, a in enumerate(x))
        assert float(logsumexp[0, 0, i]) == pytest.approx(math.log(total))


def test_without_cause_it_is_torchs_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 7, 8), torch.randn(2, 2, 7, 8)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(biased_attention_reference(query, key, value)[0], expected)


def test_removed_key():
    """cause = -1 / strength gives weight 0: the key has no effect at all, yet its cause has a gradient."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, 2, 12, 8) for _ in range(3))
    strength = 0.3
    cause = torch.zeros(1, 12)
    cause[0, 4] = -1 / strength
    keep = torch.arange(12) != 4
    expected = biased_attention_reference(query, key, value, key_mask=keep[None])[0]
    poisoned_key, poisoned_value = key.clone(), value.clone()
    poisoned_key[:, :, 4], poisoned_value[:, :, 4] = float("nan"), float("nan")
    removed = biased_attention_reference(query, poisoned_key, poisoned_value, cause, strength=strength)[0]
    torch.testing.assert_close(removed, expected, rtol=0, atol=1e-6)

    def loss(c):
        return biased_attention_reference(query.double(), key.double(), value.double(), c, strength=strength)[0].sum()

    step = torch.zeros(1, 12, dtype=torch.float64)
    step[0, 4] = 1e-6
    numeric = float((loss(cause.double() + 2 * step) - loss(cause.double())) / 2e-6)
    leaf = cause.clone().requires_grad_(True)
    output = biased_attention_reference(query, key, value, leaf, strength=strength)[0]
    grad = torch.autograd.grad(output.sum(), leaf)[0]
    assert float(grad[0, 4]) == pytest.approx(numeric, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("causal", [True, False])
def test_gradcheck(causal, dropout_p):
    torch.manual_seed(1)
    query = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    key, value = (torch.randn(2, 1, 5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    cause = torch.rand(2, 2, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])

    def call(*tensors):
        return biased_attention_reference(
            *tensors, strength=0.6, key_mask=mask, causal=causal, dropout_p=dropout_p, seed=4
        )[0]

    assert torch.autograd.gradcheck(call, (query, key, value, cause))


def test_philox_known_answers():
    """The test vectors are those of the Random123 distribution."""

    def run(counter, key):
        words = philox4x32(tuple(torch.tensor([word]) for word in counter), key)
        return [int(word) for word in words]

    assert run((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = 0xFFFFFFFF
    assert run((ones,) * 4, (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert run((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09,
        0x94FDCCEB,
        0x5001E420,
        0x24126EA1,
    ]


def test_dropout_rate_and_seed():
    keep = dropout_keep_mask(7, 0.3, 2, 3, 64, 100)
    assert keep.shape == (2, 3, 64, 100)
    assert float(keep.float().mean()) == pytest.approx(0.7, abs=0.01)
    assert torch.equal(keep, dropout_keep_mask(torch.tensor(7), 0.3, 2, 3, 64, 100))
    assert not torch.equal(keep, dropout_keep_mask(8, 0.3, 2, 3, 64, 100))
    assert torch.equal(keep[:1, :, :9, :17], dropout_keep_mask(7, 0.3, 1, 3, 9, 17)), "bits depend on place alone"
