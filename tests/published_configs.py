"""The entries of published models' config.json that concern their rotation."""

# The factors of Phi-3-mini-128k rise like these, from about 1 to 3 and to 64, one number a pair.
PHI3_SHORT = [round(1 + 2 * (i / 47) ** 2, 2) for i in range(48)]
PHI3_LONG = [round(1.07 * (64 / 1.07) ** (i / 47), 2) for i in range(48)]

LLAMA31 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
DEEPSEEK_YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "type": "yarn",
}
GPT_OSS_YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "truncate": False,
}
HUNYUAN_ALPHA = {
    "alpha": 1000.0,
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "type": "dynamic",
}


def config_json(model_type, hidden_size, num_attention_heads, max_position_embeddings, **others):
    return {
        "model_type": model_type,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_attention_heads,
        "max_position_embeddings": max_position_embeddings,
        "num_hidden_layers": 6,
        **others,
    }


GEMMA3 = config_json(
    "gemma3_text",
    2560,
    8,
    131072,
    head_dim=256,
    rope_theta=1000000.0,
    rope_local_base_freq=10000.0,
    rope_scaling={"factor": 8.0, "rope_type": "linear"},
)
GEMMA4 = config_json(
    "gemma4_text",
    2304,
    8,
    131072,
    head_dim=256,
    global_head_dim=512,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1_000_000.0,
        },
    },
)
NESTED_YARN = config_json(
    "gemma3_text",
    2560,
    8,
    131072,
    head_dim=256,
    layer_types=["sliding_attention"] * 5 + ["full_attention"],
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {**GPT_OSS_YARN, "rope_theta": 1_000_000.0},
    },
)

# name: the relevant entries of the published config.json, layer type, class of transformers
PUBLISHED = {
    "Llama-2-7b: no rope_theta": (config_json("llama", 4096, 32, 4096), None),
    "Llama-3.1-8B": (
        config_json("llama", 4096, 32, 131072, rope_theta=500000.0, rope_scaling=LLAMA31),
        None,
    ),
    "Llama-3.2-1B": (
        config_json(
            "llama",
            2048,
            32,
            131072,
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling={**LLAMA31, "factor": 32.0},
        ),
        None,
    ),
    "Mistral-7B-v0.3": (config_json("mistral", 4096, 32, 32768, rope_theta=1000000.0), None),
    "Qwen2.5-7B with YaRN": (
        config_json(
            "qwen2",
            3584,
            28,
            32768,
            rope_theta=1000000.0,
            rope_scaling={
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "type": "yarn",
            },
        ),
        None,
    ),
    "Phi-3-mini-128k": (
        config_json(
            "phi3",
            3072,
            32,
            131072,
            original_max_position_embeddings=4096,
            rope_theta=10000.0,
            rope_scaling={"long_factor": PHI3_LONG, "short_factor": PHI3_SHORT, "type": "longrope"},
        ),
        None,
    ),
    "DeepSeek-V3: a part of the head of its own": (
        config_json(
            "deepseek_v3",
            7168,
            128,
            163840,
            qk_rope_head_dim=64,
            qk_nope_head_dim=128,
            rope_theta=10000,
            rope_scaling=DEEPSEEK_YARN,
        ),
        None,
    ),
    "Gemma-3-4b, full": (GEMMA3, "full_attention"),
    "Gemma-3-4b, sliding: another base": (GEMMA3, "sliding_attention"),
    "Gemma 4, full: heads of 512": (GEMMA4, "full_attention"),
    "Gemma 4, sliding": (GEMMA4, "sliding_attention"),
    "YaRN by layer type: truncate is not read there": (NESTED_YARN, "full_attention"),
    "GPT-NeoX-20B: a quarter of the head": (
        config_json("gpt_neox", 6144, 64, 2048, rotary_pct=0.25, rotary_emb_base=10000),
        None,
    ),
    "gpt-oss-20b: not truncated": (
        config_json(
            "gpt_oss",
            2880,
            64,
            131072,
            head_dim=64,
            rope_theta=150000,
            rope_scaling=GPT_OSS_YARN,
        ),
        None,
    ),
    "SmolLM2-135M": (config_json("llama", 576, 9, 8192, rope_theta=100000), None),
    "Hunyuan-7B: dynamic with alpha": (
        config_json(
            "hunyuan_v1_dense",
            4096,
            32,
            32768,
            head_dim=128,
            rope_theta=10000.0,
            rope_scaling=HUNYUAN_ALPHA,
        ),
        None,
    ),
    "GLM-4-9B: half a head, unsaid": (
        config_json("glm", 4096, 32, 131072, head_dim=128, rope_theta=10000.0),
        None,
    ),
    "a dynamic Llama": (
        config_json("llama", 4096, 32, 4096, rope_scaling={"type": "dynamic", "factor": 2.0}),
        None,
    ),
}
