"""Real classes of transformers, one or more for everything that is known to happen after the last hidden state.

`python -m bench.heads_table` looks at every class; the table that it writes is docs/heads.md.
"""

import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
import transformers as tf

from entropy_fast.errors import EntropyFastWarning, InputError
from entropy_fast.heads import HeadTransform, find_head
from entropy_fast.rollouts import Rollouts
from entropy_fast.scoring import score

_spec = importlib.util.spec_from_file_location("tiny_classes", Path(__file__).parents[1] / "bench" / "tiny_classes.py")
tiny_classes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(tiny_classes)

shrunk = tiny_classes.shrunk
PLAIN = HeadTransform()

# class -> (changes of its configuration, what follows its head); None where only its own logits are right
CASES = {
    "ChameleonForConditionalGeneration": ({}, None),  # some tokens are set to the lowest float
    "Cohere2ForCausalLM": ({}, HeadTransform(scale=0.0625)),
    "Ernie4_5_MoeForCausalLM": ({"use_bias": True}, PLAIN),
    "FalconH1ForCausalLM": ({"lm_head_multiplier": 0.375}, HeadTransform(scale=0.375)),
    "GPT2LMHeadModel": ({}, PLAIN),
    "GPTJForCausalLM": ({}, PLAIN),  # with a bias
    "Gemma3ForCausalLM": ({"final_logit_softcapping": 5.0}, HeadTransform(softcap=5.0)),
    "Gemma3ForConditionalGeneration": ({}, PLAIN),
    "Gemma3nForCausalLM": ({}, HeadTransform(softcap=30.0)),
    "GraniteMoeForCausalLM": ({"logits_scaling": 8.0}, HeadTransform(scale=0.125)),
    "GraniteMoeHybridForCausalLM": ({"logits_scaling": 4.0}, HeadTransform(scale=0.25)),
    "HyperCLOVAXForCausalLM": ({"logits_scaling": 0.25}, HeadTransform(scale=0.25)),  # Granite's name, its opposite
    "Lfm2ForCausalLM": ({"layer_types": ["conv", "full_attention"]}, PLAIN),
    "Lfm2MoeForCausalLM": ({}, PLAIN),
    "LlavaForConditionalGeneration": ({}, PLAIN),
    "MambaForCausalLM": ({}, PLAIN),
    "Mamba2ForCausalLM": ({}, PLAIN),
    "MiniCPM3ForCausalLM": ({}, PLAIN),  # the hidden states are divided before the head
    "ModernBertDecoderForCausalLM": ({}, PLAIN),  # dense and norm, then the head, named `decoder`
    "NanoChatForCausalLM": ({}, HeadTransform(softcap=15.0)),
    "Olmo2ForCausalLM": ({}, PLAIN),
    "PhiForCausalLM": ({}, PLAIN),  # with a bias
    "PhimoeForCausalLM": ({"lm_head_bias": True}, PLAIN),
    "Qwen2VLForConditionalGeneration": ({}, PLAIN),
    "Qwen3_5ForCausalLM": ({}, PLAIN),
    "RecurrentGemmaForCausalLM": ({}, HeadTransform(softcap=30.0)),
    "VaultGemmaForCausalLM": ({}, HeadTransform(softcap=30.0)),
    "xLSTMForCausalLM": ({}, HeadTransform(softcap=30.0)),
}
# Whatever their weights' dtype, these compute something in float32: softmax, rotary angles, recurrence, the logits.
FLOAT32_INSIDE = {"GPTJ", "Mamba", "Mamba2", "RecurrentGemma", "VaultGemma", "xLSTM", "FalconH1"}
# and the kernel that multiplies the experts' weights knows no float64
FLOAT32 = {"Ernie4_5_Moe", "GraniteMoe", "GraniteMoeHybrid", "Lfm2Moe", "Phimoe"}


def rollouts():
    """Two prompts with three completions each."""
    g = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(3, tiny_classes.VOCAB, (n,), generator=g).tolist()

    heads = [ids(5)] * 3 + [ids(9)] * 3
    return Rollouts.from_lists(heads, [ids(n) for n in (9, 4, 1, 12, 7, 3)])


@torch.no_grad()
def from_own_logits(model, r):
    """S and R of each sequence, in float64, from the model's logits of that sequence alone."""
    S, R = [], []
    for i in range(len(r)):
        ids, start = r.tokens[i][r.attention_mask[i]], int(r.prompt_lens[i])
        logits = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1].double()
        logp = logits.log_softmax(-1)
        S.append(logp.gather(1, ids[start:, None]).sum())
        R.append(-torch.where(logp > -1e30, logp.exp() * logp, 0.0).sum())
    return torch.stack(S), torch.stack(R)


@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_the_models_own_logits(name):
    changes, transform = CASES[name]
    short = name.partition("For")[0]
    model = tiny_classes.build(name, **changes)
    if short not in FLOAT32:
        model = model.double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if transform is None else "error", EntropyFastWarning)
        head, scores = find_head(model), score(model, rollouts())
    assert head.mode == ("logits" if transform is None else "fused")
    assert transform is None or head.transform == transform
    S, R = from_own_logits(model, rollouts())
    # a few roundings in each of two layers and the head, of values as large as the log-probs
    tolerance = 16 * torch.finfo(torch.float32).eps if short in FLOAT32 | FLOAT32_INSIDE else 1e-11
    torch.testing.assert_close(scores.S, S, rtol=tolerance, atol=tolerance * 12)
    torch.testing.assert_close(scores.R, R, rtol=tolerance, atol=tolerance * 12)


def test_an_image_text_model_takes_its_softcap_from_the_text_model():
    text = shrunk(tf.Gemma2Config, use_bidirectional_attention=False, final_logit_softcapping=5.0)
    model = tiny_classes.build("PaliGemmaForConditionalGeneration", text_config=text)
    scores = score(model, rollouts())
    tolerance = 16 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(scores.S, from_own_logits(model, rollouts())[0], rtol=tolerance, atol=tolerance * 12)


def test_a_prompt_that_is_read_both_ways_is_refused_with_the_switch():
    text = shrunk(tf.GemmaConfig, use_bidirectional_attention=True)
    model = tiny_classes.build("PaliGemmaForConditionalGeneration", text_config=text)
    with pytest.raises(InputError, match="not causal.*text_config.use_bidirectional_attention=False"):
        score(model, rollouts())


def test_a_model_that_needs_an_image_is_refused():
    with pytest.raises(InputError, match="does not run on token ids alone.*pixel_values"):
        find_head(tiny_classes.build("BlipForConditionalGeneration"))
