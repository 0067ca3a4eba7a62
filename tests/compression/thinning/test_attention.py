"""Attention that can lose heads computes what torch's attention does."""

from copy import deepcopy
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from project.compression.thinning.attention import ThinAttention

N, LENGTH, WIDTH, HEADS = 3, 5, 12, 3
LAST = torch.zeros(N, LENGTH, dtype=torch.bool)
LAST[1, -2:] = LAST[2, -1] = True


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def later() -> Tensor:
    """Which keys come after each query."""
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)


MASKS = {
    "no mask": None,
    "causal": later(),
    "numbers": numbers(LENGTH, LENGTH),
    "causal for each head": later().repeat(N * HEADS, 1, 1),
    "numbers for each head": numbers(N * HEADS, LENGTH, LENGTH),
}
PADDING = {"no padding": None, "padding": LAST, "padding of numbers": numbers(N, LENGTH).masked_fill(LAST, -torch.inf)}


def pair(**options: Any) -> tuple[nn.MultiheadAttention, ThinAttention]:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if "bias" in name:
                parameter.normal_()
    thin = deepcopy(attention)
    thin.__class__ = ThinAttention
    return attention, thin


def assert_same(outputs: tuple[Tensor, Tensor | None], expected: tuple[Tensor, Tensor | None]) -> None:
    torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=1e-12)
    assert (outputs[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        torch.testing.assert_close(outputs[1], expected[1], rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("mask", MASKS)
def test_with_all_heads_it_is_torchs(mask: str, padding: str) -> None:
    for batch_first, bias, need_weights, average in product((True, False), repeat=4):
        attention, thin = pair(batch_first=batch_first, bias=bias)
        query, key, value = (
            tokens if batch_first else tokens.transpose(0, 1) for tokens in numbers(3, N, LENGTH, WIDTH)
        )
        options = {"need_weights": need_weights, "average_attn_weights": average}
        for tokens in ((query, query, query), (query, key, value)):
            results = [
                each(*tokens, key_padding_mask=PADDING[padding], attn_mask=MASKS[mask], **options)
                for each in (thin, attention)
            ]
            assert_same(*results)


def test_other_numbers_of_queries_than_keys() -> None:
    attention, thin = pair(batch_first=True)
    query, key = numbers(N, 7, WIDTH), numbers(N, LENGTH, WIDTH)
    assert_same(thin(query, key, key), attention(query, key, key))


def test_a_causal_mask_with_its_hint() -> None:
    attention, thin = pair(batch_first=True)
    x = numbers(N, LENGTH, WIDTH)
    for need_weights in (True, False):
        options = {"attn_mask": later(), "is_causal": True, "need_weights": need_weights}
        assert_same(thin(x, x, x, **options), attention(x, x, x, **options))


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_is_torchs_in_training_and_none_in_evaluation(need_weights: bool) -> None:
    attention, thin = pair(batch_first=True, dropout=0.5)
    x = numbers(N, LENGTH, WIDTH)
    outputs = []
    for training in (True, False):
        results = []
        for each in (thin, attention):
            torch.manual_seed(2)
            results.append(each.train(training)(x, x, x, need_weights=need_weights))
        assert_same(*results)
        outputs.append(results[0][0])
    assert not torch.allclose(*outputs)
