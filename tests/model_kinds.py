"""Small random models of PyTorch, of every architecture that can be built, and their inputs."""

import numpy as np
import torch
import transformers

LENGTH = 6


def _transformer(rng):
    heads = int(rng.choice([2, 3, 4]))
    return {
        "hidden_size": heads * int(rng.choice([4, 8])),
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "intermediate_size": int(rng.choice([20, 24])),
    }


def _vision(rng):
    found = _transformer(rng) | {"image_size": 8, "patch_size": 4}
    return found | {"num_channels": int(rng.choice([1, 3]))}


def vit(rng):
    labels = {"num_labels": int(rng.integers(2, 6)), "qkv_bias": bool(rng.integers(2))}
    act = str(rng.choice(["gelu", "gelu_new", "relu"]))
    return _vision(rng) | labels | {"hidden_act": act, "layer_norm_eps": 1e-6}


def text(rng):
    return _transformer(rng) | {"vocab_size": int(rng.integers(30, 50)), "num_labels": 3}


def bert(rng):
    return text(rng) | {"max_position_embeddings": 16, "tie_word_embeddings": bool(rng.integers(2))}


def clip_text(rng):
    ends = {"eos_token_id": int(rng.choice([2, 7])), "bos_token_id": 1, "pad_token_id": 0}
    return text(rng) | ends | {"max_position_embeddings": 16}


def clip(rng):
    return {
        "vision_config": _vision(rng) | {"num_channels": 3},
        "text_config": clip_text(rng),
        "projection_dim": 12,
    }


def gpt2(rng):
    heads = int(rng.choice([2, 3]))
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return ids | {
        "n_embd": heads * 8,
        "n_head": heads,
        "n_layer": 2,
        "n_inner": [None, 20][rng.integers(2)],
        "n_positions": 16,
        "vocab_size": 40,
        "scale_attn_by_inverse_layer_idx": bool(rng.integers(2)),
        "tie_word_embeddings": bool(rng.integers(2)),
    }


def decoder(rng):
    groups = int(rng.choice([1, 2]))
    heads = groups * int(rng.choice([1, 2]))
    size = int(rng.choice([4, 8]))
    return text(rng) | {
        "hidden_size": heads * 8,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": size,
        "tie_word_embeddings": bool(rng.integers(2)),
        "pad_token_id": 0,
    }


def llama(rng):
    ropes = [
        {"rope_type": "default", "rope_theta": 100.0},
        {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0},
        {
            "rope_type": "llama3",
            "rope_theta": 1000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ]
    biases = {"attention_bias": bool(rng.integers(2)), "mlp_bias": bool(rng.integers(2))}
    return decoder(rng) | biases | {"rope_parameters": ropes[rng.integers(3)]}


def mistral(rng):
    return decoder(rng) | {"sliding_window": [None, 3][rng.integers(2)]}


def qwen2(rng):
    slides = {"use_sliding_window": bool(rng.integers(2)), "sliding_window": 3}
    found = decoder(rng) | slides | {"max_window_layers": 1}
    return found | {"head_dim": found["hidden_size"] // found["num_attention_heads"]}


def t5(rng):
    heads = int(rng.choice([2, 3]))
    return {
        "d_model": 16,
        "d_kv": int(rng.choice([4, 8])),
        "num_heads": heads,
        "d_ff": 20,
        "num_layers": 2,
        "num_decoder_layers": int(rng.choice([1, 2])),
        "vocab_size": 40,
        "feed_forward_proj": str(rng.choice(["relu", "gated-gelu", "gated-silu"])),
        "tie_word_embeddings": bool(rng.integers(2)),
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 10,
    }


KINDS = {
    "ViTModel": vit,
    "ViTForImageClassification": vit,
    "CLIPModel": clip,
    "CLIPVisionModel": _vision,
    "CLIPTextModel": clip_text,
    "CLIPVisionModelWithProjection": _vision,
    "CLIPTextModelWithProjection": clip_text,
    "BertModel": bert,
    "BertForMaskedLM": bert,
    "BertForSequenceClassification": bert,
    "BertForTokenClassification": bert,
    "RobertaModel": bert,
    "RobertaForMaskedLM": bert,
    "RobertaForSequenceClassification": bert,
    "GPT2Model": gpt2,
    "GPT2LMHeadModel": gpt2,
    "GPT2ForSequenceClassification": gpt2,
    "LlamaModel": llama,
    "LlamaForCausalLM": llama,
    "LlamaForSequenceClassification": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "T5EncoderModel": t5,
    "T5ForConditionalGeneration": t5,
}


def make(kind, seed):
    """A model with every parameter moved, and its configuration as config.json would hold it."""
    rng = np.random.default_rng([seed, *kind.encode()])
    made = getattr(transformers, kind)
    torch.manual_seed(seed)
    model = made(made.config_class(**KINDS[kind](rng)))
    if kind == "T5ForConditionalGeneration" and not model.config.scale_decoder_outputs:
        # transformers ties even T5 1.1 until a file brings its head.
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval(), {**model.config.to_dict(), "architectures": [kind]}


def inputs(kind, config):
    """Two texts, one of them padded, and two images."""
    rng = np.random.default_rng(0)
    vision = config.get("vision_config", config)
    shape = (2, 8, 8, vision.get("num_channels", 3))
    images = {"pixel_values": rng.normal(size=shape).astype(np.float32)}
    ids = rng.integers(8, 30, (2, LENGTH))
    ids[:, -2], ids[1, -1] = 7, 0  # the end, padding
    if "bert" in kind.lower():
        ids[1, -1] = config["pad_token_id"]
    texts = {"input_ids": ids, "attention_mask": (ids != ids[1, -1]).astype(int)}
    if kind == "T5ForConditionalGeneration":
        texts["decoder_input_ids"] = ids[:, :4]
    if kind.startswith(("ViT", "CLIPVision")):
        return images
    return texts | images if kind == "CLIPModel" else texts
