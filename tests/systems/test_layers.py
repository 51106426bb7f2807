"""Layers and losses of the word-level systems."""

import pytest
import torch
from torch import nn

from empcause.systems.layers import Attention, sinusoids, smoothed_cross_entropy, smoothing_entropy


def test_sinusoids():
    found = sinusoids(7, 300)
    assert found.shape == (7, 300)
    assert found.dtype == torch.float32
    for position, place in ((0, 0), (3, 0), (5, 40), (6, 149)):
        angle = torch.tensor(position * 10 ** (-4 * place / 149), dtype=torch.float64)
        assert found[position, place].item() == pytest.approx(angle.sin().item(), abs=1e-7)
        assert found[position, 150 + place].item() == pytest.approx(angle.cos().item(), abs=1e-7)


class TestAttention:
    def test_one_head_by_hand(self):
        """Keys and values (1, 0), (0, 1), (1, 1), query (1, 2), scaled by 2^-1/2."""
        attention = Attention(2, 2, 1)
        for layer in (attention.query, attention.key, attention.value, attention.output):
            nn.init.eye_(layer.weight)
        memory, query = torch.tensor([[[1.0, 0], [0, 1], [1, 1]]]), torch.tensor([[[1.0, 2]]])
        with torch.no_grad():
            found, logits = attention(query, memory), attention.logits(query, memory)
        torch.testing.assert_close(
            logits.softmax(-1), torch.tensor([[[[0.140029, 0.283995, 0.575975]]]]), atol=1e-6, rtol=0
        )
        torch.testing.assert_close(found, torch.tensor([[[0.716005, 0.859971]]]), atol=1e-6, rtol=0)

    def test_against_torch(self):
        torch.manual_seed(0)
        attention, peer = Attention(8, 8, 2), nn.MultiheadAttention(8, 2, bias=False, batch_first=True)
        names = ("query", "key", "value")
        with torch.no_grad():
            peer.in_proj_weight.copy_(torch.cat([getattr(attention, name).weight for name in names]))
            peer.out_proj.weight.copy_(attention.output.weight)
            states, memory = torch.randn(3, 4, 8), torch.randn(3, 5, 8)
            mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]).bool()
            expected, weights = peer(states, memory, memory, key_padding_mask=~mask, average_attn_weights=False)
            logits = attention.logits(states, memory).masked_fill(~mask[:, None, None], -torch.inf)
            torch.testing.assert_close(attention(states, memory, mask), expected)
            torch.testing.assert_close(logits.softmax(-1), weights)

    def test_causal(self):
        torch.manual_seed(0)
        attention, states = Attention(8, 4, 2), torch.randn(1, 5, 8)
        changed = states.clone()
        changed[:, 3:] += 1
        with torch.no_grad():
            before, after = (attention(each, causal=True) for each in (states, changed))
        torch.testing.assert_close(before[:, :3], after[:, :3])
        assert not torch.allclose(before[:, 3:], after[:, 3:])

    def test_dropout_in_training_alone(self):
        torch.manual_seed(0)
        attention, states = Attention(8, 4, 2, dropout=0.5), torch.randn(1, 5, 8)
        assert not torch.equal(attention(states), attention(states))
        attention.eval()
        assert torch.equal(attention(states), attention(states))


class TestSmoothing:
    LOGITS = torch.tensor([[0.0, 0, 0, 1, 0, 0]])

    def test_by_hand(self):
        """Six words, padding 1, target 3."""
        log_probs = self.LOGITS.log_softmax(-1)
        (loss,) = smoothed_cross_entropy(log_probs, torch.tensor([3]), 1, 6)
        assert loss.item() == pytest.approx(1.143592, abs=1e-6)
        assert loss.exp().item() == pytest.approx(3.138019, abs=1e-6)
        assert loss.item() - smoothing_entropy(6) == pytest.approx(0.679879, abs=1e-6)
        (plain,) = smoothed_cross_entropy(log_probs, torch.tensor([3]), 1, 6, smoothing=0)
        assert plain.item() == pytest.approx(1.043592, abs=1e-6)
        assert smoothing_entropy(6, 0) == 0

    @pytest.mark.parametrize("target", [3, 7])
    def test_the_target_is_a_distribution(self, target):
        """Also for a token outside of the vocabulary; and only words of the vocabulary get the rest."""
        rest = torch.zeros(8)
        for place in range(8):
            log_probs = torch.zeros(1, 8)
            log_probs[0, place] = -1
            rest[place] = smoothed_cross_entropy(log_probs, torch.tensor([target]), 1, 6)[0]
        assert rest.sum().item() == pytest.approx(1)
        assert rest[target].item() == pytest.approx(0.9)
        assert rest[1] == 0
        assert rest[13 - target if target == 7 else 6] == 0
