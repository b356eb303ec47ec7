"""What a config.json leaves unsaid, by model_type: defaults of transformers' config classes."""

# rope_theta where it is not 10,000
BASE = {
    "apertus": 12e6,
    "apertus1p5_text": 12e6,
    "bitnet": 5e5,
    "blt": 5e5,
    "cohere": 5e5,
    "csm": 5e5,
    "cwm": 1e6,
    "dots3_note_text": 8e7,
    "emu3_text_model": 1e6,
    "ernie4_5": 5e5,
    "ernie4_5_moe": 5e5,
    "ernie4_5_vl_moe_text": 5e5,
    "evolla": 5e5,
    "exaone": 5e5,
    "flex_olmo": 5e5,
    "fuyu": 25e3,
    "gemma4_vision": 100.0,
    "gpt_oss": 15e4,
    "gte": 16e4,
    "helium": 1e5,
    "hy_v3": 11158840.0,
    "jina_embeddings_v3": 2e4,
    "lfm2": 1e6,
    "lfm2_moe": 1e6,
    "lfm3": 1e6,
    "lfm3_vl_vision": 1e6,
    "llama4_text": 5e5,
    "longcat_flash": 1e7,
    "minimax": 1e6,
    "minimax_m2": 5e6,
    "minimax_m3_vl_text": 5e6,
    "mixtral": 1e6,
    "mllama_text_model": 5e5,
    "musicflamingo": 1200.0,
    "nomic_bert": 1000.0,
    "olmo3": 5e5,
    "openai_privacy_filter": 15e4,
    "paddleocr_vl_text": 5e5,
    "pe_audio_encoder": 2e4,
    "pe_audio_video_encoder": 2e4,
    "pe_video_encoder": 2e4,
    "phimoe": 1e6,
    "qwen2_5_omni_text": 1e6,
    "qwen2_5_omni_talker": 1e6,
    "qwen2_5_vl_text": 1e6,
    "qwen2_vl_text": 1e6,
    "qwen3_omni_moe_text": 1e6,
    "qwen3_vl_text": 5e5,
    "qwen3_vl_moe_text": 5e5,
    "sarvam_moe": 8e6,
    "smollm3": 2e6,
    "solar_open": 1e6,
}

# partial_rotary_factor where it is not 1
PARTIAL = {
    "bamba": 0.5,
    "fuyu": 0.5,
    "glm": 0.5,
    "glm4": 0.5,
    "glm4_moe": 0.5,
    "glm4v_moe_text": 0.5,
    "gpt_neox": 0.25,
    "moonshine": 0.9,
    "musicflamingo": 0.2,
    "nemotron": 0.5,
    "persimmon": 0.5,
    "phi": 0.5,
    "qwen3_5_text": 0.25,
    "qwen3_5_moe_text": 0.25,
    "qwen3_next": 0.25,
    "recurrent_gemma": 0.5,
    "stablelm": 0.25,
}

# In their older configs, without rope_parameters, two kinds of layers have bases of their own:
# the key of each, what it is if not there, and whether rope_scaling is for these layers.
_GEMMA = {
    "full_attention": ("rope_theta", 1e6, True),
    "sliding_attention": ("rope_local_base_freq", 1e4, False),
}
_MODERNBERT = {
    "full_attention": ("global_rope_theta", 16e4, True),
    "sliding_attention": ("local_rope_theta", 1e4, True),
}
_OLMO3 = {
    "full_attention": ("rope_theta", 5e5, True),
    "sliding_attention": ("rope_theta", 5e5, False),
}
TWO_BASES = {
    "gemma3_text": _GEMMA,
    "gemma3n_text": _GEMMA,
    "modernbert": _MODERNBERT,
    "modernbert-decoder": _MODERNBERT,
    "olmo3": _OLMO3,
    "t5gemma2_decoder": _GEMMA,
    "t5gemma2_text": _GEMMA,
}

# Families whose frequencies are other than their rope_parameters say.
OTHER_FORMS = {
    "dinov3_vit": "turns by normalised coordinates",
    "efficientloftr": "rotates more channels than a head has",
    "eomt_dinov3": "turns by normalised coordinates",
    "ernie4_5_vl_moe_text": "orders its frequencies by mrope_section",
}

# Pairs are neighbouring channels. DeepSeek-V3's family also orders the rotated channels by halves,
# q and k alike, which leaves the scores as they are.
INTERLEAVED = {
    "axk1",
    "blt",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "ernie4_5",
    "ernie4_5_moe",
    "glm",
    "glm4",
    "glm4_moe_lite",
    "glm4v_text",
    "glm_moe_dsa",
    "glm_ocr_text",
    "gptj",
    "helium",
    "llama4_text",
    "longcat_flash",
    "mistral4",
    "moonshine",
    "moonshine_streaming",
    "openai_privacy_filter",
    "youtu",
}
