"""A tiny config of each model family, and how its linear layers divide into attention, MLP and the rest."""

import copy
from dataclasses import dataclass
from typing import Any

import transformers

_LLAMA = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
_GPT = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ALIKE = {key: _LLAMA[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
_MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}

_LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 4,
}

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")
_FUSED = ("gate_up_proj", "down_proj")
_DENSE = ("dense_h_to_4h", "dense_4h_to_h")
_LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@dataclass(frozen=True)
class Family:
    """A config, and the last parts of the paths that each word chooses; `rest` is what all-linear has besides."""

    made: Any
    attention: tuple[str, ...] = _QKVO
    mlp: tuple[str, ...] = _GATED
    rest: tuple[str, ...] = ()

    @property
    def config(self) -> Any:
        """The config, for a test's own: saving a model writes its number format into it."""
        return copy.deepcopy(self.made)


def _of(name: str, *options: dict[str, Any], **more: Any) -> Any:
    values = {key: value for given in options or (_LLAMA,) for key, value in given.items()}
    return getattr(transformers, f"{name}Config")(**values, **more)


def _gemma3() -> Any:
    text = {**_LLAMA, "head_dim": 4, "layer_types": ["full_attention"] * 2}
    vision = {**_ALIKE, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    del vision["vocab_size"]
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


FAMILIES = {
    "llama": Family(_of("Llama")),
    "mistral": Family(_of("Mistral")),
    "mixtral": Family(_of("Mixtral", num_local_experts=4), mlp=_FUSED),
    "qwen2": Family(_of("Qwen2")),
    "qwen3": Family(_of("Qwen3", head_dim=4)),
    "qwen2-moe": Family(
        _of("Qwen2Moe", _LLAMA, _EXPERTS, num_experts=4, shared_expert_intermediate_size=12),
        mlp=("gate_up_proj", *_GATED),
    ),
    "qwen3-moe": Family(_of("Qwen3Moe", _LLAMA, _EXPERTS, num_experts=4, head_dim=4), mlp=_FUSED),
    "qwen3-next": Family(
        _of(
            "Qwen3Next",
            _LLAMA,
            _EXPERTS,
            _LINEAR_ATTENTION,
            num_experts=4,
            head_dim=4,
            shared_expert_intermediate_size=12,
            layer_types=["linear_attention", "full_attention"],
        ),
        attention=(*_QKVO, "in_proj_qkvz", "in_proj_ba", "out_proj"),
        mlp=("gate_up_proj", *_GATED),
    ),
    "qwen3.5": Family(
        _of("Qwen3_5Text", head_dim=4, layer_types=["linear_attention", "full_attention"], **_LINEAR_ATTENTION),
        attention=(*_QKVO, "in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"),
    ),
    "gemma2": Family(_of("Gemma2", head_dim=4)),
    "gemma3-text": Family(_of("Gemma3Text", head_dim=4, layer_types=["full_attention"] * 2)),
    "gemma3": Family(_gemma3()),
    "gemma4-text": Family(
        _of(
            "Gemma4Text",
            head_dim=4,
            global_head_dim=8,
            layer_types=["sliding_attention", "full_attention"],
            vocab_size_per_layer_input=64,
            hidden_size_per_layer_input=8,
        ),
        rest=("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection"),
    ),
    "phi3": Family(_of("Phi3"), ("qkv_proj", "o_proj"), _FUSED),
    "phi": Family(_of("Phi"), ("q_proj", "k_proj", "v_proj", "dense"), ("fc1", "fc2")),
    "gpt2": Family(_of("GPT2", _GPT), ("c_attn", "c_proj"), ("c_fc", "c_proj")),
    "gpt-bigcode": Family(_of("GPTBigCode", _GPT), ("c_attn", "c_proj"), ("c_fc", "c_proj")),
    "gpt-j": Family(_of("GPTJ", _GPT, rotary_dim=2), ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc_in", "fc_out")),
    "gpt-neox": Family(_of("GPTNeoX", _ALIKE, intermediate_size=24), ("query_key_value", "dense"), _DENSE),
    "falcon": Family(_of("Falcon", _ALIKE, new_decoder_architecture=False), ("query_key_value", "dense"), _DENSE),
    "bloom": Family(_of("Bloom", _ALIKE), ("query_key_value", "dense"), _DENSE),
    "opt": Family(
        _of("OPT", _ALIKE, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64),
        ("q_proj", "k_proj", "v_proj", "out_proj"),
        ("fc1", "fc2"),
    ),
    "stablelm": Family(_of("StableLm")),
    "cohere": Family(_of("Cohere")),
    "olmo2": Family(_of("Olmo2")),
    "granite": Family(_of("Granite")),
    "granite-moe": Family(_of("GraniteMoe", num_local_experts=4, num_experts_per_tok=2), mlp=_FUSED),
    "smollm3": Family(_of("SmolLM3")),
    "gpt-oss": Family(_of("GptOss", head_dim=4, num_local_experts=4, num_experts_per_tok=2), mlp=_FUSED),
    "llama4": Family(
        _of("Llama4Text", head_dim=4, num_local_experts=4, num_experts_per_tok=1, intermediate_size_mlp=24),
        mlp=("gate_up_proj", *_GATED),
    ),
    "deepseek-v3": Family(
        _of(
            "DeepseekV3",
            {**_LLAMA, "num_key_value_heads": 4},
            _EXPERTS,
            _MLA,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            first_k_dense_replace=1,
        ),
        _LATENT,
        ("gate_up_proj", *_GATED),
    ),
    "jetmoe": Family(
        _of(
            "JetMoe",
            _ALIKE,
            num_key_value_heads=2,
            kv_channels=4,
            intermediate_size=24,
            num_local_experts=4,
            num_experts_per_tok=2,
        ),
        ("kv_proj", "input_linear", "output_linear"),
        ("input_linear", "output_linear"),
    ),
    "mamba": Family(_of("Mamba", _ALIKE, state_size=4), (), (), rest=("in_proj",)),
    "jamba": Family(
        _of(
            "Jamba",
            _LLAMA,
            num_experts=4,
            num_experts_per_tok=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            mamba_d_state=4,
            use_mamba_kernels=False,
        ),
        mlp=("gate_up_proj", *_GATED),
        rest=("in_proj", "x_proj", "out_proj"),
    ),
    "falcon-h1": Family(
        _of("FalconH1", _LLAMA, head_dim=4, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
        rest=("in_proj",),
    ),
}
