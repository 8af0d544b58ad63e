"""GPT-J, GPT-NeoX and Llama as rows of facts. A further family is a further row.

A row says how the family's `config.json` spells what a model is, and how its checkpoint spells our module names.
What is left out of a row says something too: a block without `norm2` feeds one norm to both of its branches, one
with `attn.qkv` keeps its three projections in a single matrix (per head: q, k, v), one with `mlp.gate` is gated.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class RotaryKeys:
    """Where a config without `rope_parameters` keeps its rotary facts. None: the family has no such key."""

    theta: str | None = "rope_theta"
    fraction: str | None = None  # the share of a head that turns
    default_fraction: float = 1.0
    dims: str | None = None  # the same as a number of dimensions
    interleaved: bool = False  # pairs are neighbours (GPT-J) and not half a head apart


@dataclass(frozen=True)
class Family:
    name: str
    model_type: str  # in config.json
    architecture: str  # the class that loads it
    keys: Mapping[str, tuple[str, Any]]  # our field → (key in config.json, value when absent or null)
    fixed: Mapping[str, Any]  # our fields that no key of this family changes
    rotary: RotaryKeys
    modules: Mapping[str, str]  # our module → HF's, {} is the layer's number
    buffers: tuple[str, ...]  # endings of tensor names that old checkpoints hold and no one needs

    @property
    def base_prefix(self) -> str:
        """What a checkpoint saved from the bare model, without its head, lacks: "transformer.", "gpt_neox.", …"""
        return self.modules["tokens"].partition(".")[0] + "."


GPTJ = Family(
    name="gptj",
    model_type="gptj",
    architecture="GPTJForCausalLM",
    keys={
        "layers": ("n_layer", 28),
        "width": ("n_embd", 4096),
        "heads": ("n_head", 16),
        "mlp_width": ("n_inner", None),
        "vocab": ("vocab_size", 50400),
        "max_positions": ("n_positions", 2048),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": ("activation_function", "gelu_new"),
        "init_std": ("initializer_range", 0.02),
        "tied": ("tie_word_embeddings", False),
        "embed_dropout": ("embd_pdrop", 0.0),
        "attn_dropout": ("attn_pdrop", 0.0),
        "residual_dropout": ("resid_pdrop", 0.0),
    },
    fixed={"norm": "layer", "parallel": True, "attn_bias": False, "mlp_bias": True, "head_bias": True},
    rotary=RotaryKeys(theta=None, dims="rotary_dim", interleaved=True),
    modules={
        "tokens": "transformer.wte",
        "norm1": "transformer.h.{}.ln_1",
        "attn.q": "transformer.h.{}.attn.q_proj",
        "attn.k": "transformer.h.{}.attn.k_proj",
        "attn.v": "transformer.h.{}.attn.v_proj",
        "attn.out": "transformer.h.{}.attn.out_proj",
        "mlp.up": "transformer.h.{}.mlp.fc_in",
        "mlp.down": "transformer.h.{}.mlp.fc_out",
        "norm": "transformer.ln_f",
        "out": "lm_head",
    },
    buffers=(".attn.bias", ".attn.masked_bias", ".attn.embed_positions"),
)

GPTNEOX = Family(
    name="gptneox",
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    keys={
        "layers": ("num_hidden_layers", 44),
        "width": ("hidden_size", 6144),
        "heads": ("num_attention_heads", 64),
        "mlp_width": ("intermediate_size", 24576),
        "vocab": ("vocab_size", 50432),
        "max_positions": ("max_position_embeddings", 2048),
        "norm_eps": ("layer_norm_eps", 1e-5),
        "activation": ("hidden_act", "gelu"),
        "parallel": ("use_parallel_residual", True),
        "attn_bias": ("attention_bias", True),
        "init_std": ("initializer_range", 0.02),
        "tied": ("tie_word_embeddings", False),
        "embed_dropout": ("hidden_dropout", 0.0),
        "attn_dropout": ("attention_dropout", 0.0),
        "residual_dropout": ("hidden_dropout", 0.0),
    },
    fixed={"norm": "layer", "mlp_bias": True, "head_bias": False},
    rotary=RotaryKeys(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    modules={
        "tokens": "gpt_neox.embed_in",
        "norm1": "gpt_neox.layers.{}.input_layernorm",
        "norm2": "gpt_neox.layers.{}.post_attention_layernorm",
        "attn.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "attn.out": "gpt_neox.layers.{}.attention.dense",
        "mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "norm": "gpt_neox.final_layer_norm",
        "out": "embed_out",  # on disk; transformers 5 calls it lm_head in memory
    },
    buffers=(".attention.bias", ".attention.masked_bias", ".rotary_emb.inv_freq"),
)

LLAMA = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    keys={
        "layers": ("num_hidden_layers", 32),
        "width": ("hidden_size", 4096),
        "heads": ("num_attention_heads", 32),
        "kv_heads": ("num_key_value_heads", None),
        "head_dim": ("head_dim", None),
        "mlp_width": ("intermediate_size", 11008),
        "vocab": ("vocab_size", 32000),
        "max_positions": ("max_position_embeddings", 2048),
        "norm_eps": ("rms_norm_eps", 1e-6),
        "activation": ("hidden_act", "silu"),
        "attn_bias": ("attention_bias", False),
        "mlp_bias": ("mlp_bias", False),
        "init_std": ("initializer_range", 0.02),
        "tied": ("tie_word_embeddings", False),
        "attn_dropout": ("attention_dropout", 0.0),
        "pad_token": ("pad_token_id", None),
    },
    fixed={"norm": "rms", "parallel": False, "head_bias": False},
    rotary=RotaryKeys(fraction="partial_rotary_factor"),
    modules={
        "tokens": "model.embed_tokens",
        "norm1": "model.layers.{}.input_layernorm",
        "norm2": "model.layers.{}.post_attention_layernorm",
        "attn.q": "model.layers.{}.self_attn.q_proj",
        "attn.k": "model.layers.{}.self_attn.k_proj",
        "attn.v": "model.layers.{}.self_attn.v_proj",
        "attn.out": "model.layers.{}.self_attn.o_proj",
        "mlp.gate": "model.layers.{}.mlp.gate_proj",
        "mlp.up": "model.layers.{}.mlp.up_proj",
        "mlp.down": "model.layers.{}.mlp.down_proj",
        "norm": "model.norm",
        "out": "lm_head",
    },
    buffers=(".rotary_emb.inv_freq",),
)

FAMILIES = {family.name: family for family in (GPTJ, GPTNEOX, LLAMA)}
