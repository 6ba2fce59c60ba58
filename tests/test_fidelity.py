"""How two models' logits are compared, against PyTorch and by what has to hold whatever the logits are."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from cipherlm.evaluation.fidelity import Comparison, divergences, losses, ranks, summarised


@st.composite
def pairs(draw):
    """Two models' logits and a text's next tokens."""
    positions, vocabulary = draw(st.integers(1, 6)), draw(st.integers(2, 40))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    clear = draw(st.floats(0.01, 30)) * torch.randn(positions, vocabulary, generator=random)
    other = clear + draw(st.floats(0, 5)) * torch.randn(positions, vocabulary, generator=random)
    return clear, other, torch.randint(vocabulary, (positions,), generator=random)


@given(pairs())
def test_ranks_count_what_comes_before(pair):
    _, logits, tokens = pair
    order = logits.argsort(dim=-1, descending=True)
    expected = (order == tokens[:, None]).nonzero()[:, 1]
    assert torch.equal(ranks(logits, tokens), expected)


@given(pairs())
def test_divergences_are_pytorchs(pair):
    clear, logits, _ = pair
    p, q = (torch.distributions.Categorical(logits=values.double()) for values in (clear, logits))
    expected = torch.distributions.kl_divergence(p, q)
    torch.testing.assert_close(divergences(clear, logits), expected, atol=1e-12, rtol=1e-9)


@given(pairs(), st.floats(-100, 100))
def test_divergences_are_of_distributions(pair, shift):
    clear, logits, _ = pair
    found = divergences(clear, logits)
    assert (found >= 0).all()
    assert torch.equal(divergences(clear, clear), torch.zeros(len(clear), dtype=torch.float64))
    torch.testing.assert_close(
        divergences(clear.double() + shift, logits.double()), found, atol=1e-9, rtol=1e-6
    )


@given(pairs())
def test_losses_are_pytorchs(pair):
    _, logits, tokens = pair
    expected = functional.cross_entropy(logits.double(), tokens, reduction="none")
    torch.testing.assert_close(losses(logits, tokens), expected)


@given(pairs())
def test_a_comparison_and_its_summary(pair):
    clear, logits, text = pair
    comparison = Comparison.of(clear, logits, text)
    first = logits.argmax(-1) == clear.argmax(-1)
    same = int(first.long().cumprod(0).sum())
    assert comparison.equal_tokens == same
    whole = summarised([comparison])
    assert whole.positions == len(text)
    assert whole.top[1] == pytest.approx(first.double().mean().item())
    best = logits.topk(min(5, logits.shape[1])).indices
    in_five = (best == clear.argmax(-1)[:, None]).any(-1)
    assert whole.top[5] == pytest.approx(in_five.double().mean().item())
    loss = functional.cross_entropy(logits.double(), text).item()
    assert whole.perplexity == pytest.approx(math.exp(min(loss, 700)), rel=1e-6) or loss > 700
    assert whole.worst_divergence >= whole.mean_divergence - 1e-12
    # In pieces it comes to the same.
    pieces = [comparison[:1], comparison[1:]]
    assert summarised(pieces).mean_divergence == pytest.approx(whole.mean_divergence)


def test_the_text_is_the_same_up_to_the_first_other_guess():
    clear = torch.eye(4)
    other = clear[[0, 1, 3, 3]]
    assert Comparison.of(clear, other, torch.arange(4)).equal_tokens == 2
    assert Comparison.of(clear, clear, torch.arange(4)).equal_tokens == 4


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_wrong(broken):
    clear, logits = torch.randn(2, 8), torch.randn(2, 8)
    logits[1] = broken
    comparison = Comparison.of(clear, logits, torch.tensor([1, 2]))
    assert comparison.divergences.isinf().tolist() == [False, True]
    assert comparison.losses.isinf().tolist() == [False, True]
    if math.isnan(broken):
        assert comparison.ranks[1] == 8
    assert not torch.isfinite(torch.tensor(summarised([comparison]).perplexity))
    # Nor is a clear model that fails one to agree with.
    assert divergences(logits, clear).isinf().tolist() == [False, True]


def test_excluded_tokens_add_nothing():
    clear, logits = torch.randn(1, 8), torch.randn(1, 8)
    masked = [torch.cat([values, torch.full((1, 3), -math.inf)], dim=1) for values in (clear, logits)]
    torch.testing.assert_close(divergences(*masked), divergences(clear, logits))


def test_there_has_to_be_a_position():
    with pytest.raises(ValueError, match="no position"):
        summarised([])
