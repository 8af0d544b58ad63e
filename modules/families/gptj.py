"""GPT-J (Wang & Komatsuzaki 2021)."""

from .family import Family, RotaryKeys

FAMILY = Family(
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
