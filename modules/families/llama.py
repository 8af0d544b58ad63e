"""Llama (Touvron et al., arXiv:2302.13971), 2 and 3 too."""

from .family import Family, RotaryKeys

FAMILY = Family(
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
