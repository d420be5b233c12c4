"""Any language model class of transformers, as small as its configuration allows: random weights, and logits spread
as in a trained model.

A configuration is shrunk by the names of its sizes, its sub-configurations likewise; what that leaves inconsistent is
put right by class in `CORRECTIONS`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf

VOCAB = 128
SPREAD = 6.0
# Low enough that no model is too large for a laptop, high enough for vision towers that have a fixed part.
MOST_PARAMETERS = 30_000_000
# One name or another of the sizes that configurations have, and a small value for each.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "n_embed", "dim", "model_dim", "embed_dim"), 64),
    **dict.fromkeys(("width", "out_hidden_size", "projection_dim", "output_dim", "embedding_size"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "ffn_hidden_size", "mlp_dim"), 64),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 2),
    "depth": 2,
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "num_experts_per_token", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    "rotary_dim": 8,
    "num_key_value_heads": 2,
    "encoder_attention_heads": 4,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "state_size": 8,
    "max_position_embeddings": 128,
    "image_size": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "is_decoder": True,
}
ENDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# By configuration class: what the sizes above leave inconsistent, or set at a name of the class's own.
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "BambaConfig": _MAMBA,
    "BltConfig": {"encoder_hash_byte_group_vocab": 512},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "topk_group": None, "n_group": None},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "FalconH1Config": _MAMBA | {"mamba_d_ssm": 128},
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 1]]},
    "Gemma3nTextConfig": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "GemmaConfig": {"use_bidirectional_attention": False},
    "GraniteMoeHybridConfig": _MAMBA | {"layer_types": ["mamba", "attention"]},
    "HunYuanDenseV1Config": {"head_dim": 16},
    "HunYuanMoEV1Config": {"head_dim": 16},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"]},
    "LongcatFlashConfig": {"head_dim": 16},
    "Mamba2Config": {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16},
    "MinistralConfig": {"head_dim": 16},
    "NemotronConfig": {"num_key_value_heads": 2},
    "ReformerConfig": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "XLMConfig": {"causal": True},
    "XLNetConfig": {"attn_type": "uni"},
    "XmodConfig": {"default_language": "en_XX"},
    "Zamba2Config": {"layer_types": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "ZambaConfig": {"num_hidden_layers": 3, "layer_types": ["mamba", "hybrid", "hybrid"]},
    "ZayaConfig": {"num_experts_per_tok": 1},
    "ChameleonConfig": {"vocabulary_map": {"<image>": 5, "IMGIMGA": 0, "IMGIMGB": 1}},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    "Emu3Config": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}},
    "Ernie4_5_VLMoeTextConfig": {"moe_intermediate_size": [64, 64]},
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [1, 1, 2],
            "partial_rotary_factor": 0.5,
        }
    },
    "Glm4vTextConfig": _THREE_AXES,
    "GlmOcrTextConfig": _THREE_AXES,
    "Granite4VisionConfig": {"deepstack_layer_map": []},
    "HunYuanVLTextConfig": {"head_dim": 16},
    "PaddleOCRTextConfig": _THREE_AXES,
    "Qwen2VLTextConfig": _THREE_AXES,
    "Qwen2_5OmniTextConfig": _THREE_AXES,
    "Qwen2_5_VLTextConfig": _THREE_AXES,
    "Qwen3_5MoeTextConfig": _MIXED,
    "Qwen3_5TextConfig": _MIXED,
    "Step3p7TextConfig": {"sliding_window": 16},
}


def shrunk(config_class: type, **changes: Any) -> Any:
    """A configuration of this class with small sizes, those of its sub-configurations too."""
    known = config_class()
    values = {key: value for key, value in SMALL.items() if _has(known, key)}
    if _has(known, "qk_rope_head_dim"):  # multi-head latent attention has as many key heads, and widths of its own
        values.pop("head_dim", None)
        if "num_key_value_heads" in values:
            values["num_key_value_heads"] = 4
    for key in list(values):
        if isinstance(getattr(config_class, key, None), property):
            del values[key]
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(known, name, None)
        if part is not None:
            values[name] = shrunk(type(part))
    values |= CORRECTIONS.get(config_class.__name__, {}) | changes
    return config_class(**values)


def _has(config: Any, key: str) -> bool:
    try:
        return getattr(config, key, None) is not None
    except Exception:  # some configurations refuse to give a value that differs between layers
        return False


def build(name: str, **changes: Any) -> torch.nn.Module:
    """A model of this class in evaluation mode; raises what its own code raises.

    Args:
        name: the class's name in transformers.
        **changes: of its configuration.
    """
    model_class = getattr(tf, name)
    config_class = model_class.config_class
    known = config_class()
    text = known.get_text_config() is known
    for key in ENDS if text else ():
        changes.setdefault(key, SMALL[key])
    if text:
        changes.setdefault("vocab_size", VOCAB)
    if hasattr(known, "is_decoder"):
        changes.setdefault("is_decoder", True)
    config = shrunk(config_class, **changes)
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"its configuration does not shrink ({size / 1e6:.0f}M parameters)")
    torch.manual_seed(0)
    model = model_class(config).eval()
    head = model.get_output_embeddings()
    if isinstance(getattr(head, "weight", None), torch.Tensor):
        with torch.no_grad():  # so that a softcap shows
            head.weight.mul_(SPREAD / head.weight.std() / head.weight.shape[1] ** 0.5)
            if getattr(head, "bias", None) is not None:
                head.bias.normal_()
    return model
