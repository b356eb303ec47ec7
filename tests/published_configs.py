"""The entries of published models' config.json that concern their rotation."""
# fmt: off

# The factors of Phi-3-mini-128k rise like these, from about 1 to 3 and to 64, one number a pair.
PHI3_SHORT = [round(1 + 2 * (i / 47) ** 2, 2) for i in range(48)]
PHI3_LONG = [round(1.07 * (64 / 1.07) ** (i / 47), 2) for i in range(48)]
PHI3 = {"type": "longrope", "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}

ORIGINAL = "original_max_position_embeddings"
BETAS = {"beta_fast": 32, "beta_slow": 1}
MSCALES = {"mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA31 = {"rope_type": "llama3", "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
           ORIGINAL: 8192}
DEEPSEEK_YARN = {"type": "yarn", "factor": 40, ORIGINAL: 4096, **BETAS, **MSCALES}
GPT_OSS_YARN = {"rope_type": "yarn", "factor": 32.0, ORIGINAL: 4096, "truncate": False,
                "beta_fast": 32.0, "beta_slow": 1.0}
HUNYUAN_ALPHA = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, **BETAS, **MSCALES}


def config_json(model_type, hidden_size, num_attention_heads, max_position_embeddings, **others):
    config = {"model_type": model_type, "hidden_size": hidden_size, "num_hidden_layers": 6}
    config["num_attention_heads"] = config["num_key_value_heads"] = num_attention_heads
    return {**config, "max_position_embeddings": max_position_embeddings, **others}


LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
GEMMA3 = config_json("gemma3_text", 2560, 8, 131072, head_dim=256, rope_theta=1e6,
                     rope_local_base_freq=1e4, rope_scaling={"factor": 8.0, "rope_type": "linear"})
GEMMA4 = config_json("gemma4_text", 2304, 8, 131072, head_dim=256, global_head_dim=512,
                     rope_parameters={"sliding_attention": SLIDING, "full_attention": FULL},
                     layer_types=LAYERS)
NESTED_YARN = config_json("gemma3_text", 2560, 8, 131072, head_dim=256, layer_types=LAYERS,
                          rope_parameters={"sliding_attention": SLIDING,
                                           "full_attention": {**GPT_OSS_YARN, "rope_theta": 1e6}})

# name: the relevant entries of the published config.json, layer type
PUBLISHED = {
    "Llama-2-7b: no rope_theta": (config_json("llama", 4096, 32, 4096), None),
    "Llama-3.1-8B":
        (config_json("llama", 4096, 32, 131072, rope_theta=5e5, rope_scaling=LLAMA31), None),
    "Llama-3.2-1B":
        (config_json("llama", 2048, 32, 131072, head_dim=64, rope_theta=5e5,
                     rope_scaling={**LLAMA31, "factor": 32.0}), None),
    "Mistral-7B-v0.3": (config_json("mistral", 4096, 32, 32768, rope_theta=1e6), None),
    "Qwen2.5-7B with YaRN":
        (config_json("qwen2", 3584, 28, 32768, rope_theta=1e6,
                     rope_scaling={"type": "yarn", "factor": 4.0, ORIGINAL: 32768}), None),
    "Phi-3-mini-128k":
        (config_json("phi3", 3072, 32, 131072, rope_theta=1e4, rope_scaling=PHI3,
                     original_max_position_embeddings=4096), None),
    "DeepSeek-V3: a part of the head of its own":
        (config_json("deepseek_v3", 7168, 128, 163840, qk_rope_head_dim=64, qk_nope_head_dim=128,
                     rope_theta=10000, rope_scaling=DEEPSEEK_YARN), None),
    "Gemma-3-4b, full": (GEMMA3, "full_attention"),
    "Gemma-3-4b, sliding: another base": (GEMMA3, "sliding_attention"),
    "Gemma 4, full: heads of 512": (GEMMA4, "full_attention"),
    "Gemma 4, sliding": (GEMMA4, "sliding_attention"),
    "YaRN by layer type: truncate is not read there": (NESTED_YARN, "full_attention"),
    "GPT-NeoX-20B: a quarter of the head":
        (config_json("gpt_neox", 6144, 64, 2048, rotary_pct=0.25, rotary_emb_base=10000), None),
    "gpt-oss-20b: not truncated":
        (config_json("gpt_oss", 2880, 64, 131072, head_dim=64, rope_theta=150000,
                     rope_scaling=GPT_OSS_YARN), None),
    "SmolLM2-135M": (config_json("llama", 576, 9, 8192, rope_theta=100000), None),
    "Hunyuan-7B: dynamic with alpha":
        (config_json("hunyuan_v1_dense", 4096, 32, 32768, head_dim=128, rope_theta=1e4,
                     rope_scaling=HUNYUAN_ALPHA), None),
    "GLM-4-9B: half a head, unsaid":
        (config_json("glm", 4096, 32, 131072, head_dim=128, rope_theta=1e4), None),
    "a dynamic Llama: its own original length is not read":
        (config_json("llama", 4096, 32, 4096,
                     rope_scaling={"type": "dynamic", "factor": 2.0, ORIGINAL: 1024}), None),
    "YaRN for a context shorter than the original":
        (config_json("llama", 4096, 32, 4096,
                     rope_scaling={"type": "yarn", "factor": None, ORIGINAL: 8192}), None),
    "a scaling without a type is the default":
        (config_json("llama", 4096, 32, 4096, rope_scaling={"factor": 4.0}), None),
}
