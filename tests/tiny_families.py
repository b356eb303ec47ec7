"""Settings beyond small sizes that families of transformers need to be built and run tiny.

A family without a row here is run by its language model with SIZES. A family with rows is run by
these alone; `Case(family)` is its language model.
"""
# fmt: off

import torch
from tiny_inputs import (
    ROWS,
    SPECIAL,
    atoms,
    draw,
    images,
    memory,
    patches,
    shaped,
    song,
    speech,
    tokens,
    unpadded,
)
from tiny_models import Case, families

AXIS = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = {**AXIS, "mrope_section": [2, 3, 3]}  # pairs of a head for time, height and width
SINGLE = {"num_key_value_heads": 4}  # each head of queries has its own keys
PREDICTOR = {"pred_hidden_size": 64, "pred_num_attention_heads": 4, "pred_num_hidden_layers": 2}
MEMORY = {
    "memory_attention_hidden_size": 64, "memory_attention_feed_forward_hidden_size": 48,
    "memory_encoder_output_channels": 64, "memory_attention_num_layers": 2,
    "memory_attention_rope_feat_sizes": [4, 4],
}
WIDE = {"num_attention_heads": 2, "head_dim": 32}  # for the pairs of three coordinates
ROTARY = {"position_embeddings_type": "rotary"}
DEEPSTACK = {"deepstack_visual_indexes": [0]}


def text(**config) -> dict:
    return {"text_config": config}


def cases(families: str, **options) -> list[Case]:
    """Families with the same settings."""
    return [Case(family, **options) for family in families.split()]


LANGUAGE = [
    # The default configuration lacks a size that the model needs.
    *cases("hunyuan_v1_dense hunyuan_v1_moe ministral nemotron",
           config={"head_dim": 16, "num_key_value_heads": 2}),
    Case("deepseek_v2", config={"num_experts_per_tok": 2}),
    Case("deepseek_ocr2", "DeepseekOcr2TextModel",  # the whole model needs an image
         {"num_experts_per_tok": 2, "mlp_layer_types": ["dense", "sparse"]}),
    Case("diffusion_gemma", "DiffusionGemmaEncoderTextModel",
         {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}),
    Case("dots1", config={"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}),
    Case("esm", config={"vocab_size": 128, "position_embedding_type": "rotary"}),
    Case("chameleon", config={"vocabulary_map": {"<image>": SPECIAL}}),
    Case("dbrx", config={"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}}),
    Case("qwen4_exp", config={
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64,
        "indexer_compress_ratio": 2, "rope_parameters": MROPE}),
    # Sizes that depend on each other.
    Case("bailing_hybrid", config={"n_group": 2, "num_experts_per_tok": 1, "topk_group": 1}),
    *cases("codegen gptj", config={"rotary_dim": 8}),
    Case("mistral4", config={"head_dim": 32}),
    Case("esmc", config=SINGLE),
    Case("dory", config={"n_input_layers": 1, "n_recurrent_layers": 0, "n_output_layers": 1}),
    Case("gemma3n", config={"num_kv_shared_layers": 0}),
    Case("molmo2", config={"adapter_config": {"vision_feature_layer": [-1]}}),
    Case("step3p7", config=text(sliding_window=8)),
    # Attention layers among layers of another kind.
    Case("bamba", config={"attn_layer_indices": [1]}),
    Case("lfm2_moe", config={"layer_types": ["conv", "full_attention"]}),
    Case("recurrent_gemma", config={"num_hidden_layers": 3}),
    # Rotation is an option.
    Case("granitemoehybrid", config={"layer_types": ["linear_attention", "full_attention"],
                                     "position_embedding_type": "rope"}),
    Case("zamba2", config={"layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True}),
    Case("roformer", config={"is_decoder": True, "rotary_value": True}),
    # Sections for time, height and width that fit a head of 16 channels.
    Case("hunyuan_vl",
         config=text(head_dim=16, rope_parameters={**AXIS, "mrope_section": [2] * 4})),
    Case("cohere_compass", config={
        "rope_parameters": {"full_attention": MROPE, "sliding_attention": MROPE}}),
    *cases("cosmos3_edge glm4v glm4v_moe glm_image glm_ocr hy_v4_vl",
           config=text(rope_parameters={**MROPE, "partial_rotary_factor": 1.0})),
    *cases("paddleocr_vl qwen2_5_vl qwen2_vl", config=text(rope_parameters=MROPE)),
    Case("ernie4_5_vl_moe", config=text(
        rope_parameters={**AXIS, "mrope_section": [3, 3, 2]}, moe_intermediate_size=[48, 48])),
    # generate() needs a sound after the text, or the hidden states of another model.
    *cases("csm qwen3_omni_moe", generates=False),
    *cases("gradium_phonon_tts pocket_tts", config={"flow_head_config": {"condition_dim": 64}},
           generates=False),
    Case("qwen2_5_omni", config=text(rope_parameters=MROPE), generates=False),
    # In float64 a row of scores is masked by the least float64 and softmax is in float32, so a
    # token of padding becomes nan.
    *cases("gemma2 granite_swa granitemoe_swa t5gemma vaultgemma", inputs=unpadded),
    # Only the language model: other parts are hard to make small.
    Case("granite4_vision", "Granite4VisionTextModel"),
    Case("higgs_audio_v2", "HiggsAudioV2ForConditionalGeneration"),
    Case("muse_spark", "MuseSparkTextModel"),
    # The interleaved rotation is an option, on by default; this case turns it off.
    *cases("axk1 deepseek_v3 glm4_moe_lite youtu", config={"rope_interleave": False},
           variant="rope_interleave=False"),
    Case("mistral4", config={"rope_interleave": False, "head_dim": 32},
         variant="rope_interleave=False"),
    # Unchanged; these families have another row.
    *cases("axk1 deepseek_v3 dots3_note gemma4 glm4_moe_lite llama4 minimax_m3_vl muse_glimmer "
           "qwen3_5 qwen3_5_moe qwen3_vl qwen3_vl_moe youtu"),
]

# Models whose inputs are not, or not only, tokens.
OTHERS = [
    Case("blt", "BltGlobalTransformer", {}, draw(inputs_embeds=(10, 64))),
    Case("clvp", "ClvpEncoder", {"num_attention_heads": 2},  # 32 channels of a head rotate or more
         lambda _: {"input_ids": torch.randint(SPECIAL, (ROWS, 9))}),
    Case("dia", "DiaModel", {"decoder_config": {"cross_hidden_size": 64}}, lambda model:
         tokens(model) | {"decoder_input_ids": torch.randint(SPECIAL, (ROWS, 10, 9))}),
    Case("idefics", inputs=lambda model: tokens(model) | {
        "image_encoder_embeddings": torch.randn(ROWS, 1, 4, 64),
        "image_attention_mask": torch.ones(ROWS, 10, 1)}),
    Case("esmfold2", "EsmFold2AtomDecoder", {
        "esmc_config": SINGLE, "atom_encoder": {**WIDE, "output_dim": 384},
        "structure_head": {"diffusion_module": {"atom_encoder": WIDE}}}, atoms, float64=False),
    Case("kyutai_speech_to_text", "KyutaiSpeechToTextModel", {}, draw(inputs_embeds=(10, 64))),
    Case("muse_glimmer_assistant", "MuseGlimmerAssistantModel", {},
         draw(noise_embeds=(4, 64), context_hidden_states=(10, 5 * 64))),
    Case("timesfm2_5", "TimesFm2_5Model", {}, draw(past_values=(64,))),
    Case("voxtral_realtime", "VoxtralRealtimeTextModel", {},
         lambda model: tokens(model) | {"t_cond": torch.randn(ROWS, 1, 64)}),
]

VISION = [
    Case("cohere_compass", "CohereCompassVisionModel", DEEPSTACK, patches),
    Case("dinov3_vit", "DINOv3ViTModel", {}, images),
    Case("dots3_note", "Dots3NoteVisionModel",
         {"adapter_in_dim": 64, "pyramid_num_routed": [-1, 4]}, patches),
    Case("edgetam_video", "EdgeTamVideoMemoryAttention",
         {**MEMORY, "memory_attention_mlp_hidden_size": 48,
          "memory_attention_rope_k_sizes": [4, 4]},
         lambda model: memory(model) | {"num_spatial_memory_tokens": 2}),
    Case("efficientloftr", "EfficientLoFTRModel",
         {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 8},
         draw(pixel_values=(2, 3, 64, 64))),
    Case("ernie4_5_vl_moe", "Ernie4_5_VLMoeVisionTransformerPretrainedModel", {}, patches),
    Case("exaone4_5", "Exaone4_5_VisionModel", {}, patches),
    Case("gemma4", "Gemma4VisionModel", {}, lambda model: {
        "pixel_values": torch.randn(ROWS, 16, 3 * model.config.patch_size**2),
        "pixel_position_ids": torch.cartesian_prod(*[torch.arange(4)] * 2).expand(ROWS, 16, 2)}),
    Case("glm4v", "Glm4vVisionModel", {}, patches),
    Case("glm4v_moe", "Glm4vMoeVisionModel", {}, patches),
    Case("glm5_next", "Glm5NextVisionModel", {}, patches),
    Case("glm_ocr", "GlmOcrVisionModel", {}, patches),
    Case("inkling2", "Inkling2VisionModel", {"spatial_merge_size": 1}, shaped(-1, 8, 8, 3)),
    Case("kimi_k25", "Kimi_K25VisionModel", {}, shaped(-1, 3, 8, 8)),
    Case("lfm3_vl", "Lfm3VlVisionModel", {}, patches),
    Case("lightglue", "LightGlueForKeypointMatching", {}, draw(pixel_values=(2, 3, 64, 64))),
    Case("llama4", "Llama4VisionModel",
         {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64}, images),
    Case("minimax_m3_vl", "MiniMaxM3VLVisionModel", {}, patches),
    Case("mlcd", "MLCDVisionModel", {}, images),
    Case("muse_glimmer", "MuseGlimmerVisionModel", {}, patches),
    Case("muse_spark", "MuseSparkVisionModel", {}, patches),
    Case("paddleocr_vl", "PaddleOCRVisionModel", {}, shaped(1, -1, 3, 8, 8)),
    Case("pixtral", "PixtralVisionModel", {}, images),
    Case("qwen2_5_omni", "Qwen2_5OmniVisionEncoder", {}, patches),
    Case("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", {}, patches),
    Case("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", {}, patches),
    Case("qwen3_5", "Qwen3_5VisionModel", {}, patches),
    Case("qwen3_5_moe", "Qwen3_5MoeVisionModel", {}, patches),
    Case("qwen3_omni_moe", "Qwen3OmniMoeVisionEncoder", DEEPSTACK, patches),
    Case("qwen3_vl", "Qwen3VLVisionModel", DEEPSTACK, patches),
    Case("qwen3_vl_moe", "Qwen3VLMoeVisionModel", DEEPSTACK, patches),
    Case("qwen4_exp", "Qwen4ExpVisionModel", DEEPSTACK, patches),
    Case("sam2_video", "Sam2VideoMemoryAttention", MEMORY, memory),
    Case("sam3", "Sam3ViTModel", {}, images),
    Case("sam3_tracker_video", "Sam3TrackerVideoMemoryAttention", MEMORY, memory),
    Case("sapiens2", "Sapiens2Model", {}, images),
    Case("step3p7", "Step3p7VisionModel", {}, images),
    Case("video_llama_3", "VideoLlama3VisionModel", {},
         lambda model: patches(model) | {"merge_sizes": torch.ones(2).long()}),
    Case("vjepa2", "VJEPA2Model", PREDICTOR, draw(pixel_values_videos=(4, 3, 32, 32))),
]

AUDIO = [
    Case("dots3_note", "Dots3NoteAudioModel",
         {"adapter_input_size": 64, "conv_output_size": 480, "downsample_hidden_size": 30},
         lambda _: {"input_features": torch.randn(ROWS, 128, 64),
                    "chunk_sample_lengths": torch.full((ROWS,), 64 * 160)}),
    Case("glmasr", "GlmAsrEncoder", {}, draw(input_features=(16, 20))),
    Case("lasr", "LasrEncoder", {}, draw(input_features=(24, 16))),
    Case("mimi", "MimiTransformerModel", {}, draw(hidden_states=(10, 64))),
    Case("moonshine", inputs=speech),
    Case("moonshine_streaming", config=SINGLE, inputs=speech),
    Case("nemotron3_5_transcribe", "Nemotron3_5TranscribeAsrAudioModel", {},
         draw(input_features=(24, 16))),
    Case("nemotron3_diarization", "Nemotron3DiarizationAudioModel", {},
         draw(input_features=(24, 16))),
    Case("musicflamingo", config={"audio_config": {"max_source_positions": 8}}, inputs=song),
    Case("neucodec", "NeuCodecDecoder", SINGLE, draw(hidden_states=(12, 128))),
    Case("pe_audio", "PeAudioEncoder", {}, draw(input_values=(1, 6000))),
    Case("pocket_tts_audio_tokenizer", "PocketTTSAudioTokenizerModel", {"upsample_groups": 32},
         draw(input_values=(1, 4000))),
    Case("seamless_m4t", "SeamlessM4TSpeechEncoder", ROTARY, draw(input_features=(24, 160))),
    Case("wav2vec2_bert", "Wav2Vec2BertModel", {**ROTARY, "feature_projection_input_dim": 16},
         draw(input_features=(24, 16))),
    Case("wav2vec2_conformer", "Wav2Vec2ConformerModel", ROTARY, draw(input_values=(2000,))),
    Case("xcodec2", "Xcodec2Decoder", SINGLE, draw(hidden_states=(12, 128))),
]

NOT_RUN = {  # families
    **dict.fromkeys(("jamba", "nemotron_asr_streaming", "nemotron_h", "parakeet"),
                    "its file defines a rotation that no layer calls"),
    "eomt_dinov3": "needs the package scipy",
    **dict.fromkeys(("pe_audio_video", "pe_video"), "needs the packages timm and Pillow"),
}
# Functions that no model of the family calls: its language model is that of exaone4.
NOT_REACHED = {"exaone4_5": {"apply_rotary_pos_emb"}}

LISTED = [*LANGUAGE, *OTHERS, *VISION, *AUDIO]
CASES = [
    case
    for family in families()
    if family not in NOT_RUN
    for case in [case for case in LISTED if case.family == family] or [Case(family)]
]
