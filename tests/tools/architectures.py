"""Tiny random models of many transformers architectures, and an input for each.

A model is named by its class in transformers. Sizes are small and uneven where a model allows it;
the weights are random, the same for the same name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from helpers import gaussian
from torch import Tensor, nn

VOCABULARY = 96

Inputs = Callable[[], dict[str, Tensor]]


def tokens(length: int = 8) -> Tensor:
    """Token ids [2, length], none of them special."""
    return torch.arange(2 * length).reshape(2, length) * 7 % (VOCABULARY - 8) + 4


def text() -> dict[str, Tensor]:
    return {"input_ids": tokens()}


def text_pair() -> dict[str, Tensor]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(5)}


def image(size: int = 16) -> dict[str, Tensor]:
    return {"pixel_values": gaussian(2, 3, size, size)}


def large_image() -> dict[str, Tensor]:
    return image(32)


def image_and_text() -> dict[str, Tensor]:
    return image() | {"input_ids": tokens()}


def image_in_text(image_token: int, count: int, size: int = 16) -> Inputs:
    """Text that holds `count` image tokens per row, and the image that they stand for."""

    def inputs() -> dict[str, Tensor]:
        ids = torch.cat([torch.full((2, count), image_token), tokens()], dim=1)
        return image(size) | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    return inputs


def patches_in_text(image_token: int) -> dict[str, Tensor]:
    """Qwen2-VL's form of an image: 4 x 4 patches of 2 x 4 x 4 pixels, merged by 2 x 2."""
    start = torch.full((2, 1), image_token - 1)
    ids = torch.cat([start, torch.full((2, 4), image_token), tokens()], dim=1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == image_token).int(),
        "pixel_values": gaussian(2 * 16, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    }


def qwen_patches() -> dict[str, Tensor]:
    return patches_in_text(90)


def several_images() -> dict[str, Tensor]:
    """Idefics' form: [batch, images, channels, height, width]."""
    ids = torch.cat([torch.full((2, 4), 90), tokens()], dim=1)
    return {"input_ids": ids, "pixel_values": gaussian(2, 1, 3, 16, 16)}


def waveform() -> dict[str, Tensor]:
    return {"input_values": gaussian(2, 800)}


def spectrogram() -> dict[str, Tensor]:
    return {"input_features": gaussian(2, 8, 32), "decoder_input_ids": tokens(5)}


def frames() -> dict[str, Tensor]:
    return {"input_features": gaussian(2, 32, 8), "decoder_input_ids": tokens(5)}


def fbank() -> dict[str, Tensor]:
    return {"input_values": gaussian(2, 24, 16)}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of transformers.

    Attributes:
        kind: "decoder", "encoder", "encoder-decoder", "classifier", "mixture of experts", "state
            space", "vision", "audio" or "vision and language".
        model_type: transformers' name of the config.
        options: what the config says.
        inputs: makes the arguments of a forward.
    """

    kind: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Inputs = text


# The sizes, under the names that most configs, GPT-2's, BERT's and T5's have for them.
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FULL = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": VOCABULARY}
_GPT2 = _IDS | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 40}
_BERT = {k: v for k, v in _FULL.items() if k not in ("bos_token_id", "eos_token_id")}
_T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "vocab_size": VOCABULARY,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
_BART = _IDS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
_FEW_EXPERTS = _EXPERTS | {
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "decoder_sparse_step": 1,
}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_MAMBA = {k: _FULL[k] for k in ("hidden_size", "num_hidden_layers", "vocab_size")}
_MAMBA |= {"state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_VIT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_WAV2VEC2 = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "conv_dim": (16, 16),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_CLIP_TEXT = _BERT | {"hidden_size": 32, "projection_dim": 16, "bos_token_id": 1, "eos_token_id": 2}
_CLIP = {
    "text_config": _CLIP_TEXT,
    "vision_config": _VIT | {"projection_dim": 16},
    "projection_dim": 16,
}


def _decoders() -> dict[str, Architecture]:
    def decoder(model_type: str, **options: Any) -> Architecture:
        return Architecture("decoder", model_type, options)

    no_head_dim = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
    return {
        "LlamaForCausalLM": decoder("llama", **_LLAMA, tie_word_embeddings=True),
        "MistralForCausalLM": decoder("mistral", **_LLAMA),
        "Qwen2ForCausalLM": decoder("qwen2", **no_head_dim),
        "Qwen3ForCausalLM": decoder("qwen3", **_LLAMA),
        "GemmaForCausalLM": decoder("gemma", **_LLAMA),
        "Gemma2ForCausalLM": decoder("gemma2", **_LLAMA),
        "Gemma3ForCausalLM": decoder("gemma3_text", **_LLAMA),
        "PhiForCausalLM": decoder("phi", **no_head_dim),
        "Phi3ForCausalLM": decoder("phi3", **no_head_dim),
        "GPT2LMHeadModel": decoder("gpt2", **_GPT2),
        "GPTNeoForCausalLM": decoder(
            "gpt_neo",
            **_IDS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            intermediate_size=40,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
            max_position_embeddings=64,
        ),
        "GPTNeoXForCausalLM": decoder("gpt_neox", **_FULL),
        "GPTJForCausalLM": decoder("gptj", **_GPT2, rotary_dim=4),
        "CodeGenForCausalLM": decoder("codegen", **_GPT2, rotary_dim=4),
        "GPTBigCodeForCausalLM": decoder("gpt_bigcode", **_GPT2),
        "OPTForCausalLM": decoder("opt", **_FULL, ffn_dim=40, word_embed_proj_dim=16),
        "BloomForCausalLM": decoder("bloom", **_IDS, hidden_size=32, n_layer=2, n_head=4),
        "FalconForCausalLM": decoder("falcon", **_FULL),
        "MptForCausalLM": decoder("mpt", **_IDS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64),
        "Starcoder2ForCausalLM": decoder("starcoder2", **no_head_dim),
        "StableLmForCausalLM": decoder("stablelm", **no_head_dim),
        "CohereForCausalLM": decoder("cohere", **no_head_dim),
        "Cohere2ForCausalLM": decoder("cohere2", **_LLAMA),
        "GraniteForCausalLM": decoder("granite", **no_head_dim),
        "OlmoForCausalLM": decoder("olmo", **no_head_dim),
        "Olmo2ForCausalLM": decoder("olmo2", **no_head_dim),
        "PersimmonForCausalLM": decoder("persimmon", **_FULL),
        "NemotronForCausalLM": decoder("nemotron", **_LLAMA),
        "HeliumForCausalLM": decoder("helium", **_LLAMA),
        "GlmForCausalLM": decoder("glm", **_LLAMA),
        "Glm4ForCausalLM": decoder("glm4", **_LLAMA),
        "SmolLM3ForCausalLM": decoder("smollm3", **no_head_dim),
        "Ernie4_5ForCausalLM": decoder("ernie4_5", **_LLAMA),
        "ArceeForCausalLM": decoder("arcee", **_LLAMA),
        "Exaone4ForCausalLM": decoder("exaone4", **no_head_dim),
        "BitNetForCausalLM": decoder("bitnet", **no_head_dim),
        "Gemma3nForCausalLM": decoder(
            "gemma3n_text",
            **_LLAMA | {"num_hidden_layers": 4, "intermediate_size": [40] * 4},
            num_kv_shared_layers=2,
            layer_types=["sliding_attention", "full_attention"] * 2,
            laurel_rank=4,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=VOCABULARY,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        "BioGptForCausalLM": decoder("biogpt", **_FULL),
        "XGLMForCausalLM": decoder(
            "xglm", **_IDS, d_model=32, num_layers=2, attention_heads=4, ffn_dim=40
        ),
    }


def _experts() -> dict[str, Architecture]:
    def experts(model_type: str, **options: Any) -> Architecture:
        return Architecture("mixture of experts", model_type, options)

    no_head_dim = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
    return {
        "MixtralForCausalLM": experts("mixtral", **_LLAMA | _EXPERTS),
        "Qwen2MoeForCausalLM": experts("qwen2_moe", **no_head_dim | _FEW_EXPERTS),
        "Qwen3MoeForCausalLM": experts("qwen3_moe", **_LLAMA | _FEW_EXPERTS),
        "OlmoeForCausalLM": experts("olmoe", **no_head_dim | _EXPERTS),
        "GraniteMoeForCausalLM": experts("granitemoe", **no_head_dim | _EXPERTS),
        "PhimoeForCausalLM": experts("phimoe", **no_head_dim | _EXPERTS),
        "GptOssForCausalLM": experts("gpt_oss", **_LLAMA | _EXPERTS),
        "DeepseekV3ForCausalLM": experts("deepseek_v3", **_FULL | _DEEPSEEK),
        "Qwen3NextForCausalLM": experts(
            "qwen3_next",
            **_LLAMA | _FEW_EXPERTS,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        "Llama4ForCausalLM": experts(
            "llama4_text",
            **_LLAMA | _EXPERTS,
            intermediate_size_mlp=40,
            interleave_moe_layer_step=1,
            attention_chunk_size=32,
        ),
        "JetMoeForCausalLM": experts(
            "jetmoe", **_LLAMA | _EXPERTS | {"kv_channels": 8, "num_key_value_heads": 4}
        ),
        "Glm4MoeForCausalLM": experts(
            "glm4_moe",
            **_LLAMA,
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            first_k_dense_replace=1,
        ),
        "SwitchTransformersForConditionalGeneration": Architecture(
            "mixture of experts",
            "switch_transformers",
            _T5
            | {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
            text_pair,
        ),
    }


def _state_space() -> dict[str, Architecture]:
    def state_space(model_type: str, **options: Any) -> Architecture:
        return Architecture("state space", model_type, options)

    hybrid = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2}
    return {
        "MambaForCausalLM": state_space("mamba", **_MAMBA),
        "Mamba2ForCausalLM": state_space(
            "mamba2", **_MAMBA, num_heads=8, head_dim=8, n_groups=2, chunk_size=4
        ),
        "FalconMambaForCausalLM": state_space("falcon_mamba", **_MAMBA),
        "JambaForCausalLM": state_space(
            "jamba",
            **_LLAMA | _EXPERTS | hybrid,
            use_mamba_kernels=False,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
        ),
        "BambaForCausalLM": state_space(
            "bamba",
            **_LLAMA | hybrid,
            attn_layer_indices=[1],
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
        ),
        "GraniteMoeHybridForCausalLM": state_space(
            "granitemoehybrid",
            **{k: v for k, v in _LLAMA.items() if k != "head_dim"} | _EXPERTS | hybrid,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
            layer_types=["mamba", "attention"],
            shared_intermediate_size=24,
        ),
        "NemotronHForCausalLM": state_space(
            "nemotron_h",
            **_LLAMA | {"num_hidden_layers": 3},
            layers_block_type=["mamba", "attention", "mlp"],
            mamba_num_heads=8,
            mamba_head_dim=8,
            n_groups=2,
            ssm_state_size=8,
            chunk_size=4,
        ),
        "Zamba2ForCausalLM": state_space(
            "zamba2",
            **_FULL | {"num_hidden_layers": 4, "num_key_value_heads": 4},
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            hybrid_layer_ids=[1, 3],
            num_mem_blocks=1,
            mamba_d_state=8,
            mamba_expand=2,
            n_mamba_heads=8,
            mamba_ngroups=1,
            chunk_size=4,
        ),
        "RwkvForCausalLM": state_space(
            "rwkv", **_IDS, hidden_size=32, num_hidden_layers=2, use_cache=False, rescale_every=1
        ),
        "RecurrentGemmaForCausalLM": state_space(
            "recurrent_gemma",
            **_LLAMA | {"num_hidden_layers": 3},
            lru_width=32,
            attention_window_size=16,
        ),
        "Lfm2ForCausalLM": state_space(
            "lfm2", **_LLAMA, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
        ),
        "FalconH1ForCausalLM": state_space(
            "falcon_h1",
            **_LLAMA | hybrid,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_n_groups=2,
            mamba_d_ssm=64,
        ),
    }


def _encoders() -> dict[str, Architecture]:
    def encoder(model_type: str, **options: Any) -> Architecture:
        return Architecture("encoder", model_type, options)

    return {
        "BertForMaskedLM": encoder("bert", **_BERT),
        "BertForPreTraining": encoder("bert", **_BERT),
        "RobertaForMaskedLM": encoder("roberta", **_FULL),
        "ElectraForPreTraining": encoder("electra", **_BERT, embedding_size=16),
        "DistilBertForMaskedLM": encoder(
            "distilbert", vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=40
        ),
        "AlbertForMaskedLM": encoder("albert", **_FULL, embedding_size=16),
        "DebertaV2ForMaskedLM": encoder("deberta-v2", **_BERT),
        "DebertaForMaskedLM": encoder("deberta", **_BERT),
        "ConvBertForMaskedLM": encoder("convbert", **_BERT, embedding_size=16),
        "LongformerForMaskedLM": encoder("longformer", **_FULL, attention_window=4),
        "FunnelForMaskedLM": encoder(
            "funnel",
            vocab_size=VOCABULARY,
            block_sizes=[1, 1],
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=40,
            num_decoder_layers=1,
        ),
        "MPNetForMaskedLM": encoder("mpnet", **_FULL),
        "ModernBertForMaskedLM": encoder("modernbert", **_FULL, cls_token_id=1, sep_token_id=2),
        "RoFormerForMaskedLM": encoder("roformer", **_BERT),
        "XLNetLMHeadModel": encoder(
            "xlnet", vocab_size=VOCABULARY, d_model=32, n_layer=2, n_head=4, d_inner=40
        ),
    }


def _classifiers() -> dict[str, Architecture]:
    def classifier(model_type: str, **options: Any) -> Architecture:
        return Architecture("classifier", model_type, options)

    distilbert = {"vocab_size": VOCABULARY, "dim": 32, "n_layers": 2, "n_heads": 4}
    return {
        "BertForSequenceClassification": classifier("bert", **_BERT, num_labels=2),
        "RobertaForSequenceClassification": classifier("roberta", **_FULL, num_labels=3),
        "DistilBertForTokenClassification": classifier("distilbert", **distilbert, hidden_dim=40),
        "LlamaForSequenceClassification": classifier("llama", **_LLAMA, num_labels=2),
        "Qwen2ForTokenClassification": classifier("qwen2", **_LLAMA, num_labels=3),
        "GPT2ForSequenceClassification": classifier("gpt2", **_GPT2, num_labels=2),
        "BertForQuestionAnswering": classifier("bert", **_BERT),
        "T5ForTokenClassification": classifier("t5", **_T5, num_labels=2),
    }


def _encoder_decoders() -> dict[str, Architecture]:
    def both(model_type: str, **options: Any) -> Architecture:
        return Architecture("encoder-decoder", model_type, options, text_pair)

    return {
        "T5ForConditionalGeneration": both("t5", **_T5),
        "MT5ForConditionalGeneration": both("mt5", **_T5),
        "UMT5ForConditionalGeneration": both("umt5", **_T5),
        "LongT5ForConditionalGeneration": both("longt5", **_T5),
        "BartForConditionalGeneration": both("bart", **_BART),
        "MBartForConditionalGeneration": both("mbart", **_BART),
        "PegasusForConditionalGeneration": both("pegasus", **_BART),
        "MarianMTModel": both("marian", **_BART, decoder_vocab_size=VOCABULARY),
        "M2M100ForConditionalGeneration": both("m2m_100", **_BART),
        "BlenderbotForConditionalGeneration": both("blenderbot", **_BART),
        "LEDForConditionalGeneration": both(
            "led",
            **_BART,
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
        "ProphetNetForConditionalGeneration": both(
            "prophetnet",
            **_IDS,
            hidden_size=32,
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
            encoder_ffn_dim=40,
            decoder_ffn_dim=40,
            max_position_embeddings=64,
        ),
    }


def _vision() -> dict[str, Architecture]:
    def vision(model_type: str, inputs: Inputs = image, **options: Any) -> Architecture:
        return Architecture("vision", model_type, options, inputs)

    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1]}
    return {
        "ViTForImageClassification": vision("vit", **_VIT, num_labels=2),
        "DeiTForImageClassification": vision("deit", **_VIT, num_labels=2),
        "BeitForImageClassification": vision("beit", **_VIT, num_labels=2),
        "Dinov2ForImageClassification": vision("dinov2", **_VIT, num_labels=2),
        "SwinForImageClassification": vision(
            "swin", large_image, **swin, num_heads=[2, 4], window_size=4, num_labels=2
        ),
        "Swinv2ForImageClassification": vision(
            "swinv2", large_image, **swin, num_heads=[2, 4], window_size=4, num_labels=2
        ),
        "ConvNextForImageClassification": vision(
            "convnext",
            large_image,
            hidden_sizes=[16, 24],
            depths=[1, 1],
            num_stages=2,
            layer_scale_init_value=1.0,
        ),
        "SegformerForImageClassification": vision(
            "segformer",
            large_image,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
        ),
        "SiglipVisionModel": vision("siglip_vision_model", **_VIT),
    }


def _audio() -> dict[str, Architecture]:
    def audio(model_type: str, inputs: Inputs, **options: Any) -> Architecture:
        return Architecture("audio", model_type, options, inputs)

    return {
        "WhisperForConditionalGeneration": audio(
            "whisper",
            spectrogram,
            **_BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        ),
        "Wav2Vec2ForCTC": audio("wav2vec2", waveform, **_WAV2VEC2),
        "HubertForSequenceClassification": audio("hubert", waveform, **_WAV2VEC2, num_labels=2),
        "WavLMForCTC": audio("wavlm", waveform, **_WAV2VEC2),
        "ASTForAudioClassification": audio(
            "audio-spectrogram-transformer",
            fbank,
            **{k: v for k, v in _VIT.items() if k not in ("image_size", "patch_size")},
            patch_size=8,
            max_length=24,
            num_mel_bins=16,
            frequency_stride=8,
            time_stride=8,
        ),
        "Speech2TextForConditionalGeneration": audio(
            "speech_to_text",
            frames,
            **_BART
            | {"input_feat_per_channel": 8, "conv_channels": 16, "max_target_positions": 64},
        ),
    }


def _vision_and_language() -> dict[str, Architecture]:
    def multimodal(model_type: str, inputs: Inputs, **options: Any) -> Architecture:
        return Architecture("vision and language", model_type, options, inputs)

    llama = {"model_type": "llama", **_LLAMA}
    clip_vision = {"model_type": "clip_vision_model", **_VIT}
    siglip_vision = {"model_type": "siglip_vision_model", **_VIT}
    idefics_vision = {**_VIT, "patch_size": 4}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    qwen = {
        "text_config": _LLAMA | {"rope_parameters": rope},
        "image_token_id": 90,
        "vision_start_token_id": 89,
        "vision_end_token_id": 91,
        "video_token_id": 92,
    }
    return {
        "CLIPModel": multimodal("clip", image_and_text, **_CLIP),
        "SiglipModel": multimodal(
            "siglip", image_and_text, text_config=_CLIP_TEXT, vision_config=_VIT
        ),
        "BlipForImageTextRetrieval": multimodal("blip", image_and_text, **_CLIP),
        "LlavaForConditionalGeneration": multimodal(
            "llava",
            image_in_text(90, 4),
            text_config=llama,
            vision_config=clip_vision,
            image_token_index=90,
            vision_feature_layer=-1,
        ),
        "PaliGemmaForConditionalGeneration": multimodal(
            "paligemma",
            image_in_text(90, 4),
            text_config={"model_type": "gemma", **_LLAMA},
            vision_config=siglip_vision,
            image_token_index=90,
            projection_dim=32,
        ),
        "Gemma3ForConditionalGeneration": multimodal(
            "gemma3",
            image_in_text(90, 4),
            text_config=_LLAMA,
            vision_config=_VIT,
            mm_tokens_per_image=4,
            image_token_id=90,
        ),
        "Qwen2VLForConditionalGeneration": multimodal(
            "qwen2_vl",
            qwen_patches,
            **qwen,
            vision_config={
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "mlp_ratio": 2,
                "patch_size": 4,
                "temporal_patch_size": 2,
            },
        ),
        "Qwen2_5_VLForConditionalGeneration": multimodal(
            "qwen2_5_vl",
            qwen_patches,
            **qwen,
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "num_heads": 4,
                "intermediate_size": 40,
                "patch_size": 4,
                "temporal_patch_size": 2,
                "window_size": 16,
                "fullatt_block_indexes": [1],
            },
        ),
        "SmolVLMForConditionalGeneration": multimodal(
            "smolvlm",
            several_images,
            text_config=llama,
            vision_config=idefics_vision,
            image_token_id=90,
            scale_factor=2,
        ),
    }


ARCHITECTURES: dict[str, Architecture] = {
    **_decoders(),
    **_experts(),
    **_state_space(),
    **_encoders(),
    **_classifiers(),
    **_encoder_decoders(),
    **_vision(),
    **_audio(),
    **_vision_and_language(),
}


def tiny_model(name: str) -> tuple[Any, Callable[[nn.Module], Tensor]]:
    """A random model of that class in eval mode, and what calls it: model -> its output."""
    import transformers

    found = ARCHITECTURES[name]
    config = transformers.AutoConfig.for_model(found.model_type, **found.options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, name)(config).eval()
    return model, lambda model: output_of(model(**found.inputs()))


def output_of(outputs: Any) -> Tensor:
    """The logits of a forward, or what an architecture has in their place."""
    named = (
        "logits",
        "prediction_logits",
        "itm_score",
        "logits_per_image",
        "start_logits",
        "pooler_output",
    )
    found = next(outputs[key] for key in named if outputs.get(key) is not None)
    if isinstance(end := outputs.get("end_logits"), Tensor):
        found = torch.cat([found, end])
    return found  # type: ignore[no-any-return]
