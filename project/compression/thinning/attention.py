"""Attention with fewer heads, or of tokens with fewer features, than ``torch.nn.MultiheadAttention`` can have.

Attention is all you need, Vaswani et al. 2017 (arXiv:1706.03762), section 3.2.2. Torch's layer asserts that the heads
are as wide together as the tokens. After thinning they are not. The parameters and their names stay the same.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class ThinAttention(nn.MultiheadAttention):
    """Multi-head attention whose heads are not as wide together as the tokens.

    It computes ``softmax(q k^T / sqrt(head_dim)) v`` for each head. Thinning changes the class of a
    ``nn.MultiheadAttention`` to this one (:class:`project.compression.thinning.thin.Thin`), and nobody else makes one.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the tokens; arguments and results are those of ``torch.nn.MultiheadAttention``.

        Args:
            query, key, value: tokens ``[N, L, C]``, or ``[L, N, C]`` without ``batch_first``.
            key_padding_mask: mask of the keys that do not count, ``[N, L]``.
            need_weights: whether the weights are returned.
            attn_mask: mask of the keys that do not count for each query, or numbers that are added to the scores,
                ``[L, L]`` or ``[N * heads, L, L]``.
            average_attn_weights: whether the returned weights are the mean over the heads.
            is_causal: ignored; ``attn_mask`` says the same.
        """
        if not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        weights: Any = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases: Any = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(tokens, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )  # each [N, heads, L, head_dim]
        if not need_weights and key_padding_mask is None:
            mask = attn_mask
            if mask is not None:
                mask = mask if mask.dim() == 2 else mask.unflatten(0, (-1, self.num_heads))
                mask = ~mask if mask.dtype is torch.bool else mask.to(q.dtype)
            dropout = self.dropout if self.training else 0.0
            attended = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
            output = self.out_proj(attended.transpose(1, 2).flatten(2))
            return (output if self.batch_first else output.transpose(0, 1)), None
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if attn_mask is not None:
            attn_mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, self.num_heads))
            scores = scores + _added(attn_mask, scores)
        if key_padding_mask is not None:
            scores = scores + _added(key_padding_mask[:, None, None], scores)
        shares = functional.dropout(scores.softmax(-1), self.dropout, self.training)
        output = self.out_proj((shares @ v).transpose(1, 2).flatten(2))
        if not self.batch_first:
            output = output.transpose(0, 1)
        if not need_weights:
            return output, None
        return output, shares.mean(1) if average_attn_weights else shares


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as numbers that are added to the scores: minus infinity where a key does not count."""
    if mask.dtype is torch.bool:
        return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)
    return mask.to(scores.dtype)
