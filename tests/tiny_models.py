"""Tiny, randomly initialised transformers for tests, with weights large enough that every transform shows."""

import torch
import transformers as tf

VOCAB = 101
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "qwen2": lambda: tf.Qwen2Config(**_SMALL),
    "qwen3": lambda: tf.Qwen3Config(**_SMALL, head_dim=8),
    "gpt2": lambda: tf.GPT2Config(**_GPT2, **_ENDS),
    "gemma2": lambda: tf.Gemma2Config(**_SMALL, head_dim=8, final_logit_softcapping=3.0, sliding_window=64),
    "cohere": lambda: tf.CohereConfig(**_SMALL, logit_scale=0.0625),
    "granite": lambda: tf.GraniteConfig(**_SMALL, logits_scaling=8.0),
    "phi": lambda: tf.PhiConfig(**_SMALL),
}


def tiny(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 6.0, **changes):
    """A model of this architecture, its logits spread like those of a trained one, in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = tf.AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(spread / head.weight.std() / config.hidden_size**0.5)
        if head.bias is not None:
            head.bias.normal_()
    return model.to(dtype).eval()
