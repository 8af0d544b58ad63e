"""What a block is made of: norms, rotary positions, attention, MLP. Shapes: b rows, T tokens, C width, H heads of D."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .spec import ModelSpec, hf_config

_gelu_tanh = partial(F.gelu, approximate="tanh")
ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    # Three spellings of one formula; torch's fused kernel differs from them in rounding alone, and is much faster.
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": F.silu,
    "swish": F.silu,
    "relu": F.relu,
}


def make_norm(spec: ModelSpec) -> nn.Module:
    norm = nn.RMSNorm if spec.norm == "rms" else nn.LayerNorm
    return norm(spec.width, eps=spec.norm_eps)


class Documents(NamedTuple):
    """What keeps the documents of packed rows apart; made once a micro-batch, for all blocks of a stage.

    `mask` [b, 1, T, T] is added to the scores: 0 where a token sees one of its own document that is not later, −∞
    elsewhere. (A mask of booleans would be turned into this one, and kept, by every block.) `cos` and `sin`
    [b, T, 1, turning pairs] are of positions that begin at 0 in each document.
    """

    mask: Tensor
    cos: Tensor
    sin: Tensor


class Rotary:
    """Tables of cos and sin for positions 0…T−1, made once for all blocks of a process. Nothing here is trained."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.rope = dict(spec.rope)
        self._tables: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def tables(self, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [T, 1, turning pairs], to be broadcast over heads."""
        # Dynamic NTK stretches its frequencies with T beyond the trained length; all others share one long table.
        stretched = tokens if self.rope["rope_type"] == "dynamic" and tokens > self.spec.max_positions else None
        key = (device, dtype, stretched)
        if key not in self._tables or len(self._tables[key][0]) < tokens:
            # Made in an evaluation (inference mode), the tables must still serve the training step after it.
            with torch.inference_mode(False), torch.no_grad():
                inverse, scaling = self._frequencies(tokens)
                angles = torch.outer(torch.arange(tokens, dtype=torch.float32), inverse)[:, None, :]
                cos, sin = (angles.cos() * scaling).to(device, dtype), (angles.sin() * scaling).to(device, dtype)
                self._tables[key] = (cos, sin)
        cos, sin = self._tables[key]
        return cos[:tokens], sin[:tokens]

    def documents(self, positions: Tensor, dtype: torch.dtype) -> Documents:
        """`positions` [b, T] int64: of each token in its document, as far as it lies in this row."""
        tokens, device = positions.shape[1], positions.device
        cos, sin = self.tables(tokens, device, dtype)
        here = torch.arange(tokens, device=device)
        first = here - positions  # where each token's document begins
        seen = (here <= here[:, None]) & (here >= first[:, :, None])
        mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
        return Documents(mask[:, None], cos[positions], sin[positions])

    def _frequencies(self, tokens: int) -> tuple[Tensor, float]:
        """Inverse frequencies [turning pairs] and the factor on cos and sin."""
        if self.rope["rope_type"] == "default":
            dims = self.spec.rotary_dim
            exponents = torch.arange(0, dims, 2, dtype=torch.float32) / max(dims, 1)
            return 1.0 / (self.rope["rope_theta"] ** exponents), 1.0
        from transformers import AutoConfig  # late: a second and a half that most models do not need
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.for_model(**hf_config(self.spec, torch.float32))
        return ROPE_INIT_FUNCTIONS[self.rope["rope_type"]](config, torch.device("cpu"), seq_len=tokens)


def _turn(x: Tensor, out: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> None:
    """Write x [..., T, heads, D] into out with its first dimensions turned by the tables' angles (or back)."""
    turning = 2 * cos.shape[-1]
    out[..., turning:] = x[..., turning:]
    x, out = x[..., :turning], out[..., :turning]
    if interleaved:
        a, b, out_a, out_b = x[..., ::2], x[..., 1::2], out[..., ::2], out[..., 1::2]
    else:
        (a, b), (out_a, out_b) = x.chunk(2, -1), out.chunk(2, -1)
    sign = -1 if back else 1
    torch.mul(a, cos, out=out_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out_b).addcmul_(a, sin, value=sign)


class _Rotate(torch.autograd.Function):
    """Rotary positions on x [b, T, H, D]. The backward of a rotation is the rotation back: nothing of x is kept.

    Written out because the textbook form (x·cos + rotate_half(x)·sin, then cat) makes six passes over q and k each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty_like(x)
        _turn(x, out, cos, sin, interleaved, back=False)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        out = torch.empty_like(grad)
        _turn(grad, out, cos, sin, ctx.interleaved, back=True)
        return out, None, None, None


class _SplitRotate(torch.autograd.Function):
    """qkv [b, T, H, 3, D] → turned q, turned k, v, each [b, T, H, D]; one gradient buffer for the three."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        q, k, v = qkv.unbind(3)
        out_q, out_k = torch.empty_like(q), torch.empty_like(k)
        _turn(q, out_q, cos, sin, interleaved, back=False)
        _turn(k, out_k, cos, sin, interleaved, back=False)
        return out_q, out_k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        cos, sin = ctx.saved_tensors
        grad_q, grad_k, grad_v = grads
        b, t, h, d = grad_q.shape
        out = grad_q.new_empty(b, t, h, 3, d)
        _turn(grad_q, out[:, :, :, 0], cos, sin, ctx.interleaved, back=True)
        _turn(grad_k, out[:, :, :, 1], cos, sin, ctx.interleaved, back=True)
        out[:, :, :, 2] = grad_v
        return out, None, None, None


class Attention(nn.Module):
    """Causal self-attention, [b, T, C] → [b, T, C], with q, k, v in three matrices or (GPT-NeoX) in one.

    Within the whole row, or within each of its `documents`.
    """

    def __init__(self, spec: ModelSpec, rotary: Rotary) -> None:
        super().__init__()
        heads, kv, bias = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim, spec.attn_bias
        self.fused = "attn.qkv" in spec.facts.modules
        if self.fused:
            self.qkv = nn.Linear(spec.width, 3 * heads, bias)
        else:
            self.q = nn.Linear(spec.width, heads, bias)
            self.k = nn.Linear(spec.width, kv, bias)
            self.v = nn.Linear(spec.width, kv, bias)
        self.out = nn.Linear(heads, spec.width, bias)
        self.rotary = rotary
        self.interleaved = spec.rotary_interleaved
        self.head_dim = spec.head_dim
        self.queries_per_kv = spec.heads // spec.kv_heads
        self.dropout = spec.attn_dropout

    def forward(self, x: Tensor, documents: Documents | None = None) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self._turned(x, documents))
        grouped = self.queries_per_kv > 1
        if grouped and q.is_cuda and (q.dtype == torch.float32 or documents is not None):
            # CUDA's kernel for fp32 and for masks knows no grouped heads; sdpa would write out the T × T weights.
            k, v = k.repeat_interleave(self.queries_per_kv, 1), v.repeat_interleave(self.queries_per_kv, 1)
            grouped = False
        dropout = self.dropout if self.training else 0.0
        mask = documents.mask if documents is not None else None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, enable_gqa=grouped
        )
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def _turned(self, x: Tensor, documents: Documents | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [b, T, H, D] and k [b, T, KV, D] with their positions, and v like k."""
        b, t, _ = x.shape
        cos, sin = documents[1:] if documents is not None else self.rotary.tables(t, x.device, x.dtype)
        if self.fused:
            qkv = self.qkv(x).view(b, t, -1, 3, self.head_dim)
            q, k, v = _SplitRotate.apply(qkv, cos, sin, self.interleaved)  # type: ignore[no-untyped-call] # untyped in torch
        else:
            q, k, v = (linear(x).view(b, t, -1, self.head_dim) for linear in (self.q, self.k, self.v))
            q = _Rotate.apply(q, cos, sin, self.interleaved)  # type: ignore[no-untyped-call] # untyped in torch
            k = _Rotate.apply(k, cos, sin, self.interleaved)  # type: ignore[no-untyped-call] # untyped in torch
        return q, k, v


class Mlp(nn.Module):
    """[b, T, C] → [b, T, C], gated where the family is."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.gate = nn.Linear(spec.width, spec.mlp_width, spec.mlp_bias) if "mlp.gate" in spec.facts.modules else None
        self.up = nn.Linear(spec.width, spec.mlp_width, spec.mlp_bias)
        self.down = nn.Linear(spec.mlp_width, spec.width, spec.mlp_bias)
        self.activation = ACTIVATION_FUNCTIONS[spec.activation]

    def forward(self, x: Tensor) -> Tensor:
        wide = self.activation(self.up(x)) if self.gate is None else self.activation(self.gate(x)) * self.up(x)
        y: Tensor = self.down(wide)
        return y
