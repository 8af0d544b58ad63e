"""GPT-NeoX (Black et al., arXiv:2204.06745) and Pythia."""

from .family import Family, RotaryKeys

FAMILY = Family(
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
