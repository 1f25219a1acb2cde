"""The zoo's transformers that hear, or that join images or sounds to text."""

from typing import Any

import torch

from tests.zoo.images import EFFICIENT, FOUR, WINDOWS
from tests.zoo.specimen import (
    AUDIO,
    IMAGE,
    Inputs,
    any_picture,
    boxes,
    decoder_text,
    filled,
    fixed,
    floats,
    picture,
    row,
    same,
    text,
)

CONVOLUTIONS = {
    "conv_dim": [16, 16, 16],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
"""The feature extractor of wav2vec 2.0 and its kin: 20 samples a frame."""


def samples() -> Inputs:
    """40 samples for each token that was asked for."""
    return floats("input_values", lambda length: 40 * length)


def one_channel() -> Inputs:
    """64 samples for each token that was asked for, in a channel of its own."""
    return floats("input_values", 1, lambda length: 64 * length)


def frames(each: int) -> Inputs:
    """So many frames of 16 features for each token that was asked for."""
    return floats("input_features", lambda length: each * length, 16)


def seen(count: int = 16) -> Inputs:
    """An image, and a text that begins with its places."""
    return text((IMAGE,) * count) | picture()


def marked(name: str, count: int, dtype: torch.dtype = torch.bool) -> Inputs:
    """One for the first tokens of each row, zero for those that follow."""

    def make(batch: int, length: int) -> dict[str, Any]:
        return {name: (torch.arange(count + length) < count).to(dtype).repeat(batch, 1)}

    return Inputs(make)


def listed_patches() -> Inputs:
    """An image a row, cut into 4 x 4 patches of 8 pixels that stand in one list, as Qwen takes them."""

    def make(batch: int, length: int) -> dict[str, Any]:
        pixels = floats("pixel_values", 16, 3 * 2 * 8 * 8).make(batch, length)["pixel_values"]
        return {"pixel_values": pixels.flatten(0, 1), "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}

    return Inputs(make, True)


def placed_patches() -> Inputs:
    """4 x 4 patches of 8 pixels, each behind its row and column, as Pix2Struct takes them."""

    def make(batch: int, length: int) -> dict[str, Any]:
        place = torch.cartesian_prod(torch.arange(1.0, 5.0), torch.arange(1.0, 5.0)).expand(batch, -1, -1)
        pixels = floats("flattened_patches", 16, 3 * 8 * 8).make(batch, length)["flattened_patches"]
        return {"flattened_patches": torch.cat([place, pixels], -1)}

    return Inputs(make, True)


HEARING = [
    row(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        floats("input_values", 32, 16),
        max_length=32,
        frequency_stride=4,
        time_stride=4,
    ),
    row("data2vec-audio", "Data2VecAudioForCTC", **CONVOLUTIONS),
    row(
        "clap",
        "ClapModel",
        text() | floats("input_features", 1, 64, 16),
        audio_config={
            "spec_size": 64,
            "window_size": 4,
            "num_attention_heads": [2, 2, 4],
            "depths": [1, 1, 1],
            "patch_embeds_hidden_size": 8,
            "patch_size": 4,
            "num_hidden_layers": 3,
            "hidden_size": 32,
        },
    ),
    row(
        "dac",
        "DacModel",
        one_channel(),
        encoder_hidden_size=4,
        decoder_hidden_size=32,
        downsampling_ratios=[2, 4],
        n_codebooks=3,
        codebook_size=32,
        codebook_dim=4,
    ),
    row(
        "encodec",
        "EncodecModel",
        one_channel(),
        num_filters=4,
        upsampling_ratios=[4, 2],
        codebook_size=32,
        num_lstm_layers=1,
    ),
    row("hubert", "HubertForCTC", **CONVOLUTIONS),
    row(
        "mimi",
        "MimiModel",
        one_channel(),
        upsample_groups=32,
        num_filters=8,
        upsampling_ratios=[4, 2],
        codebook_size=32,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        num_key_value_heads=4,
    ),
    row(
        "moonshine",
        "MoonshineForConditionalGeneration",
        floats("input_values", lambda length: 400 * length) | decoder_text(),
    ),
    row("parakeet_ctc", "ParakeetForCTC", frames(8)),
    row(
        "seamless_m4t_speech",
        "SeamlessM4TForSpeechToText",
        frames(8) | decoder_text(),
        feature_projection_input_dim=16,
        speech_encoder_layers=2,
        speech_encoder_attention_heads=4,
        speech_encoder_intermediate_size=64,
    ),
    row("sew", "SEWForCTC", **CONVOLUTIONS),
    row("sew-d", "SEWDForCTC", **CONVOLUTIONS),
    row(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        frames(4) | decoder_text(),
        input_feat_per_channel=16,
        conv_channels=32,
    ),
    row("speecht5", "SpeechT5ForSpeechToText", samples() | decoder_text(), **CONVOLUTIONS),
    row("unispeech", "UniSpeechForCTC", **CONVOLUTIONS, num_ctc_classes=100),
    row("unispeech-sat", "UniSpeechSatForCTC", **CONVOLUTIONS, num_ctc_classes=100),
    row(
        "univnet",
        "UnivNetModel",
        floats("input_features", same, 16) | floats("noise_sequence", same, 8),
        model_in_channels=8,
        model_hidden_channels=8,
        kernel_predictor_hidden_channels=8,
    ),
    row(
        "vits",
        "VitsModel",
        text(),
        flow_size=32,
        spectrogram_bins=33,
        upsample_initial_channel=32,
        duration_predictor_filter_channels=16,
        posterior_encoder_num_wavenet_layers=2,
        prior_encoder_num_flows=2,
        noise_scale=0.0,
        noise_scale_duration=0.0,
    ),
    row("wav2vec2", "Wav2Vec2ForCTC", **CONVOLUTIONS),
    row("wav2vec2-bert", "Wav2Vec2BertForCTC", frames(2), feature_projection_input_dim=16),
    row("wav2vec2-conformer", "Wav2Vec2ConformerForCTC", **CONVOLUTIONS),
    row("wavlm", "WavLMForCTC", **CONVOLUTIONS),
    row("whisper", "WhisperForConditionalGeneration", floats("input_features", 16, 128) | decoder_text()),
]


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
CROPS = text((IMAGE,) * 36) | floats("pixel_values", 2, 3, 32, 32) | filled("image_sizes", 32, 2)
PATCHES = text((IMAGE,) * 4) | listed_patches() | marked("mm_token_type_ids", 4, torch.long)
MULTIMODAL = [
    row("align", "AlignModel", text() | any_picture(), projection_dim=80, vision_config=EFFICIENT),
    row("altclip", "AltCLIPModel", text() | picture()),
    row("aria", "AriaForConditionalGeneration", seen(4), projector_patch_to_query_dict={16: 4}),
    row("aya_vision", "AyaVisionForConditionalGeneration", seen(4)),
    row("blip", "BlipForConditionalGeneration", text() | picture()),
    row(
        "blip-2",
        "Blip2ForConditionalGeneration",
        seen(4),
        num_query_tokens=4,
        qformer_config={"encoder_hidden_size": 32},
    ),
    row(
        "bridgetower",
        "BridgeTowerModel",
        text() | picture(),
        hidden_size=64,
        text_config={"hidden_size": 64},
        vision_config={"hidden_size": 64},
    ),
    row("chinese_clip", "ChineseCLIPModel", text() | picture()),
    row("clip", "CLIPModel", text() | picture()),
    row(
        "clipseg",
        "CLIPSegForImageSegmentation",
        text() | picture(),
        extract_layers=[0, 1, 2],
        reduce_dim=16,
        decoder_intermediate_size=32,
    ),
    row("cohere2_vision", "Cohere2VisionForConditionalGeneration", seen(4), alignment_intermediate_size=64),
    row("flava", "FlavaModel", text() | picture()),
    row(
        "florence2",
        "Florence2ForConditionalGeneration",
        seen(2) | decoder_text(),
        vision_config={
            "patch_size": [7, 3, 3, 3],
            "depths": [1, 1, 1, 1],
            "embed_dim": [8, 16, 24, 32],
            "num_heads": [1, 2, 2, 4],
            "num_groups": [1, 2, 2, 4],
            "window_size": 4,
            "projection_dim": 32,
        },
    ),
    row("fuyu", "FuyuForCausalLM", text((IMAGE,) * 4) | floats("image_patches", 4, 192)),
    row("gemma3", "Gemma3ForConditionalGeneration", seen(4), mm_tokens_per_image=4),
    row("git", "GitForCausalLM", text() | picture()),
    row(
        "grounding-dino",
        "GroundingDinoForObjectDetection",
        fixed(text(mask=False)) | picture(64),
        max_text_len=16,
        backbone_config={
            "model_type": "swin",
            **WINDOWS,
            "depths": [1, 1, 1, 1],
            "num_heads": [2, 2, 4, 4],
            "out_features": FOUR[1:],
        },
        text_config={"model_type": "bert"},
        num_queries=6,
    ),
    row("groupvit", "GroupViTModel", text() | picture()),
    row(
        "idefics2",
        "Idefics2ForConditionalGeneration",
        text((IMAGE,) * 8) | floats("pixel_values", 1, 3, 32, 32),
        perceiver_config={
            "resampler_n_latents": 8,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "resampler_depth": 2,
        },
    ),
    row(
        "idefics3",
        "Idefics3ForConditionalGeneration",
        text((IMAGE,) * 4) | floats("pixel_values", 1, 3, 32, 32),
        scale_factor=2,
    ),
    row(
        "instructblip",
        "InstructBlipForConditionalGeneration",
        seen(4) | text(name="qformer_input_ids"),
        num_query_tokens=4,
        qformer_config={"encoder_hidden_size": 32},
    ),
    row("internvl", "InternVLForConditionalGeneration", seen(4)),
    row(
        "kosmos-2",
        "Kosmos2ForConditionalGeneration",
        text((IMAGE,) * 4) | picture() | marked("image_embeds_position_mask", 4),
        latent_query_num=4,
        text_config={"embed_dim": 32, "layers": 3, "attention_heads": 4},
    ),
    row(
        "layoutlmv3",
        "LayoutLMv3Model",
        text() | picture() | boxes(),
        input_size=32,
        coordinate_size=6,
        shape_size=4,
        max_2d_position_embeddings=64,
    ),
    row("llava", "LlavaForConditionalGeneration", seen()),
    row("llava_next", "LlavaNextForConditionalGeneration", CROPS, image_grid_pinpoints=[[32, 32]]),
    row("llava_onevision", "LlavaOnevisionForConditionalGeneration", CROPS, image_grid_pinpoints=[[32, 32]]),
    row(
        "lxmert",
        "LxmertModel",
        text() | floats("visual_feats", 5, 16) | floats("visual_pos", 5, 4),
        visual_feat_dim=16,
        l_layers=3,
        x_layers=2,
        r_layers=2,
    ),
    row("metaclip_2", "MetaClip2Model", text() | picture()),
    row(
        "mgp-str",
        "MgpstrForSceneTextRecognition",
        picture(),
        image_size=[32, 32],
        num_character_labels=10,
        num_bpe_labels=20,
        num_wordpiece_labels=20,
        max_token_length=8,
    ),
    row("mistral3", "Mistral3ForConditionalGeneration", seen(4) | filled("image_sizes", 32, 2)),
    row(
        "mllama",
        "MllamaForConditionalGeneration",
        text()
        | floats("pixel_values", 1, 4, 3, 32, 32)
        | filled("aspect_ratio_ids", 1, 1)
        | filled("aspect_ratio_mask", 1, 1, 4)
        | filled("cross_attention_mask", 1, same, 1, 4),
        text_config={"cross_attention_layers": [1]},
        vision_config={
            "attention_heads": 4,
            "num_global_layers": 1,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
    ),
    row(
        "ovis2",
        "Ovis2ForConditionalGeneration",
        seen(16),
        visual_indicator_token_ids=[10, 11, 12, 13, 14],
        vision_config={"num_attention_heads": 4},
    ),
    row("owlv2", "Owlv2Model", text() | picture()),
    row("owlvit", "OwlViTModel", text() | picture()),
    row("paligemma", "PaliGemmaForConditionalGeneration", seen(), projection_dim=32),
    row(
        "pix2struct",
        "Pix2StructForConditionalGeneration",
        placed_patches() | decoder_text(),
        vision_config={"patch_embed_hidden_size": 192},
    ),
    row(
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        PATCHES,
        vision_config={"hidden_size": 32},
        text_config={"rope_parameters": MROPE},
    ),
    row(
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        PATCHES,
        vision_config={"out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        text_config={"rope_parameters": MROPE},
    ),
    row(
        "qwen2_audio",
        "Qwen2AudioForConditionalGeneration",
        text((AUDIO,) * 32) | floats("input_features", 16, 128) | filled("feature_attention_mask", 1, 128),
    ),
    row("siglip", "SiglipModel", text() | picture()),
    row(
        "siglip2",
        "Siglip2Model",
        text(mask=False)
        | floats("pixel_values", 16, 192)
        | filled("pixel_attention_mask", 1, 16)
        | filled("spatial_shapes", 4, 2),
        vision_config={"num_patches": 16},
    ),
    row(
        "smolvlm",
        "SmolVLMForConditionalGeneration",
        text((IMAGE,) * 4) | floats("pixel_values", 1, 3, 32, 32),
        scale_factor=2,
    ),
    row(
        "speech-encoder-decoder",
        "SpeechEncoderDecoderModel",
        samples() | decoder_text(),
        encoder={"model_type": "wav2vec2", **CONVOLUTIONS},
        decoder={"model_type": "bert", "is_decoder": True, "add_cross_attention": True},
    ),
    row(
        "trocr",
        "VisionEncoderDecoderModel",
        picture() | decoder_text(),
        encoder={"model_type": "deit"},
        decoder={"model_type": "trocr", "is_decoder": True, "add_cross_attention": True},
    ),
    row("udop", "UdopForConditionalGeneration", text() | picture() | boxes() | decoder_text()),
    # It shuffles the patches of an image by chance: there is one.
    row("vilt", "ViltForQuestionAnswering", text() | picture(), patch_size=32),
    row("vipllava", "VipLlavaForConditionalGeneration", seen(), vision_feature_layer=[-1, -2]),
    row(
        "vision-text-dual-encoder",
        "VisionTextDualEncoderModel",
        text() | picture(),
        text_config={"model_type": "bert"},
        vision_config={"model_type": "vit"},
    ),
    row("visual_bert", "VisualBertForPreTraining", text() | floats("visual_embeds", 5, 16), visual_embedding_dim=16),
    row("voxtral", "VoxtralForConditionalGeneration", text((AUDIO,) * 32) | floats("input_features", 16, 128)),
    row(
        "xclip",
        "XCLIPModel",
        text() | floats("pixel_values", 4, 3, 32, 32),
        prompt_num_attention_heads=4,
        vision_config={
            "num_frames": 4,
            "mit_hidden_size": 16,
            "mit_intermediate_size": 32,
            "mit_num_attention_heads": 4,
        },
    ),
]

TABLES = (
    ("audio", samples(), HEARING),
    ("multimodal", text(), MULTIMODAL),
)
LEFT_OUT = {
    "gemma3n": "its vision tower is a model of timm",
    "edgetam": "its vision tower is a model of timm",
    "layoutlmv2": "needs detectron2",
    "tvp": "its code takes a batch of one only",
}
"""Well-known ones that are not in any table."""
