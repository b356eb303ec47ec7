"""Tiny models of diffusers that rotate, with random weights, and arguments for one forward pass.

A row is a class, its config and the arguments of its forward. An empty dict
of arguments stands for a model that is refused, and so is not run.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

BATCH, TEXT, HEADS, HEAD_DIM, WIDTH = 2, 5, 2, 16, 32
AXES = (4, 4, 8)  # channels of a head for time, height and width


class Model(NamedTuple):
    name: str  # the class
    config: dict[str, Any]
    arguments: Callable[[], dict[str, Any]]
    variant: str = ""
    differentiable: bool = True  # on the CPU
    bfloat16: bool = True  # its own code runs in bfloat16 on the CPU
    not_run: str = ""  # why it is patched, but not run
    # Of outputs and gradients in float32, times the largest: some 16 roundings.
    tolerance: float = 16 * torch.finfo(torch.float32).eps

    def build(self) -> torch.nn.Module:
        import diffusers

        torch.manual_seed(0)
        model = getattr(diffusers, self.name)(**self.config)
        for parameter in model.parameters():  # some begin as 0, so that a block would do nothing
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.2)
        return model


def numbers(*shape: int) -> Tensor:
    """Irregular, the same each time."""
    index = torch.arange(math.prod(shape), dtype=torch.float64) + len(shape)
    return torch.sin(index * index / math.sqrt(2)).view(shape).float()


def times(value: float = 0.5, batch: int = BATCH) -> Tensor:
    return torch.full((batch,), value)


def grid(*sizes: int) -> Tensor:
    """Positions of a grid [tokens, axes], in float32."""
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in sizes), indexing="ij")
    return torch.stack(axes, -1).flatten(0, -2)


def mask(tokens: int = TEXT, batch: int = BATCH) -> Tensor:
    """All tokens of the first text, all but the last of the others."""
    kept = torch.ones(batch, tokens, dtype=torch.bool)
    kept[1:, -1] = False
    return kept


def angles(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, dim], each angle for two neighbours."""
    inv_freq = 100.0 ** -(torch.arange(0, dim, 2) / dim)
    angle = torch.outer(torch.arange(tokens), inv_freq).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


# ------------------------------------------------------------------------------ images like Flux

FLUX = dict(
    in_channels=4,
    num_layers=1,
    num_single_layers=1,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=WIDTH,
    axes_dims_rope=AXES,
)


def flux(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: (
        dict(
            hidden_states=numbers(BATCH, 12, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, WIDTH),
            timestep=times(),
            img_ids=grid(1, 3, 4),
            txt_ids=torch.zeros(TEXT, 3),
        )
        | more
    )


def flux2(**more: Any) -> Callable[[], dict[str, Any]]:
    return flux(img_ids=grid(1, 3, 4, 1), txt_ids=grid(1, 1, 1, TEXT), **more)


def qwen_image() -> dict[str, Any]:
    return dict(
        hidden_states=numbers(BATCH, 12, 16),
        encoder_hidden_states=numbers(BATCH, TEXT, WIDTH),
        encoder_hidden_states_mask=mask(),
        timestep=times(),
        img_shapes=[[(1, 3, 4)]] * BATCH,
    )


QWEN_IMAGE = dict(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    joint_attention_dim=WIDTH,
    axes_dims_rope=AXES,
)

# ---------------------------------------------------------------------------------- videos like Wan

WAN = dict(
    num_attention_heads=HEADS,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=32,
    ffn_dim=32,
    num_layers=2,
    rope_max_seq_len=32,
)


def wan(channels: int = 4, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: (
        dict(
            hidden_states=numbers(BATCH, channels, 2, 6, 8),
            timestep=torch.tensor([3, 700]),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
        )
        | more
    )


# ------------------------------------------------------------------------------ videos like Hunyuan

HUNYUAN = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    num_layers=1,
    num_single_layers=1,
    num_refiner_layers=1,
    text_embed_dim=16,
    rope_axes_dim=AXES,
)


def hunyuan(**more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: (
        dict(
            hidden_states=numbers(BATCH, 4, 2, 6, 8),
            timestep=torch.tensor([3, 700]),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            encoder_attention_mask=mask(),
        )
        | more
    )


COGVIDEOX = dict(
    num_attention_heads=HEADS,
    attention_head_dim=HEAD_DIM,
    in_channels=4,
    out_channels=4,
    time_embed_dim=8,
    text_embed_dim=16,
    num_layers=2,
    sample_width=8,
    sample_height=6,
    sample_frames=5,
    max_text_seq_length=TEXT,
    use_rotary_positional_embeddings=True,
)


def cogvideox() -> dict[str, Any]:
    return dict(
        hidden_states=numbers(BATCH, 2, 4, 6, 8),
        encoder_hidden_states=numbers(BATCH, TEXT, 16),
        timestep=torch.tensor([3, 700]),
        image_rotary_emb=angles(24, HEAD_DIM),
    )


def ltx() -> dict[str, Any]:
    return dict(
        hidden_states=numbers(BATCH, 24, 4),
        encoder_hidden_states=numbers(BATCH, TEXT, 16),
        timestep=torch.tensor([3, 700]),
        encoder_attention_mask=mask().long(),
        num_frames=2,
        height=3,
        width=4,
    )


LTX2 = dict(
    in_channels=4,
    out_channels=4,
    num_attention_heads=HEADS,
    attention_head_dim=12,
    cross_attention_dim=24,
    audio_in_channels=4,
    audio_out_channels=4,
    audio_num_attention_heads=HEADS,
    audio_attention_head_dim=8,
    audio_cross_attention_dim=16,
    num_layers=2,
    caption_channels=16,
)


def ltx2() -> dict[str, Any]:
    return dict(
        hidden_states=numbers(BATCH, 24, 4),
        audio_hidden_states=numbers(BATCH, 7, 4),
        encoder_hidden_states=numbers(BATCH, TEXT, 16),
        audio_encoder_hidden_states=numbers(BATCH, TEXT, 16),
        timestep=torch.tensor([3, 700]),
        encoder_attention_mask=mask().long(),
        audio_encoder_attention_mask=mask().long(),
        num_frames=2,
        height=3,
        width=4,
        audio_num_frames=7,
    )


def image(channels: int = 4, **more: Any) -> Callable[[], dict[str, Any]]:
    return lambda: (
        dict(
            hidden_states=numbers(BATCH, channels, 6, 8),
            timestep=torch.tensor([3, 700]),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
        )
        | more
    )


SIZES = dict(
    original_size=torch.tensor([[48.0, 64.0]] * BATCH),
    target_size=torch.tensor([[48.0, 64.0]] * BATCH),
    crop_coords=torch.zeros(BATCH, 2),
)
STABLE_AUDIO = dict(
    sample_size=9,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=HEAD_DIM,
    num_attention_heads=HEADS,
    num_key_value_attention_heads=1,
    cross_attention_dim=16,
    time_proj_dim=8,
    global_states_input_dim=8,
    cross_attention_input_dim=16,
)


def hunyuan_dit() -> dict[str, Any]:
    return dict(
        hidden_states=numbers(BATCH, 4, 6, 8),
        timestep=times(500.0),
        encoder_hidden_states=numbers(BATCH, TEXT, 16),
        text_embedding_mask=mask(),
        encoder_hidden_states_t5=numbers(BATCH, TEXT, 16),
        text_embedding_mask_t5=mask(),
        image_meta_size=numbers(BATCH, 6) * 100,
        style=torch.zeros(BATCH, dtype=torch.long),
        image_rotary_emb=angles(12, HEAD_DIM),
    )


def lumina_freqs() -> Tensor:
    """Complex [3, 4, pairs] for the image's grid."""
    cos, sin = angles(12, HEAD_DIM)
    return torch.complex(cos[:, ::2], sin[:, ::2]).view(3, 4, HEAD_DIM // 2)


def allegro_freqs() -> Any:
    """Tables of time, height and width, and the positions [1, tokens] of each."""
    tables = tuple(tuple(torch.cat([t[:, ::2]] * 2, -1) for t in angles(n, 4)) for n in (2, 3, 4))
    return tables, tuple(grid(2, 3, 4).long().T[:, None])


def z_image() -> dict[str, Any]:
    return dict(
        x=[numbers(4, 1, 6, 8), numbers(4, 1, 4, 4)],
        t=times(),
        cap_feats=[numbers(TEXT, 16), numbers(TEXT - 1, 16)],
    )


MODELS = (
    Model(
        "FluxTransformer2DModel",
        dict(FLUX, pooled_projection_dim=8),
        flux(pooled_projections=numbers(BATCH, 8)),
    ),
    Model(
        "FluxControlNetModel",
        dict(FLUX, pooled_projection_dim=8),
        flux(pooled_projections=numbers(BATCH, 8), controlnet_cond=numbers(BATCH, 12, 4)),
    ),
    Model(
        "Flux2Transformer2DModel",
        dict(FLUX, axes_dims_rope=(4, 4, 4, 4), timestep_guidance_channels=8),
        flux2(guidance=times()),
    ),
    Model(
        "Flux3Transformer2DModel",
        dict(FLUX, cond_in_channels=4, axes_dims_rope=(4, 4, 4, 4), timestep_channels=8),
        flux2(),
    ),
    Model(
        "ChromaTransformer2DModel",
        dict(FLUX, approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1),
        flux(),
    ),
    Model("BriaTransformer2DModel", FLUX, flux()),
    Model(
        "BriaFiboTransformer2DModel",
        dict(FLUX, text_encoder_dim=16),
        flux(text_encoder_layers=[numbers(BATCH, TEXT, 16)] * 2),
    ),
    Model("LongCatImageTransformer2DModel", dict(FLUX, pooled_projection_dim=8), flux()),
    Model("OvisImageTransformer2DModel", dict(FLUX, out_channels=4), flux()),
    Model("QwenImageTransformer2DModel", QWEN_IMAGE, qwen_image),
    Model(
        "QwenImageControlNetModel",
        QWEN_IMAGE,
        lambda: dict(qwen_image(), controlnet_cond=numbers(BATCH, 12, 16)),
    ),
    Model("WanTransformer3DModel", WAN, wan()),
    Model(
        "WanVACETransformer3DModel",
        dict(WAN, vace_layers=[0], vace_in_channels=6),
        wan(control_hidden_states=numbers(BATCH, 6, 2, 6, 8)),
    ),
    Model("ChronoEditTransformer3DModel", WAN, wan()),
    Model("SkyReelsV2Transformer3DModel", WAN, wan()),
    Model(
        "HunyuanVideoTransformer3DModel",
        dict(HUNYUAN, pooled_projection_dim=8),
        hunyuan(pooled_projections=numbers(BATCH, 8), guidance=times(6000)),
    ),
    Model(
        "HunyuanImageTransformer2DModel",
        dict(HUNYUAN, patch_size=(1, 1), rope_axes_dim=(8, 8)),
        lambda: dict(hunyuan()(), hidden_states=numbers(BATCH, 4, 3, 4), timestep=times(500.0)),
    ),
    Model("CogVideoXTransformer3DModel", COGVIDEOX, cogvideox),
    Model("ConsisIDTransformer3DModel", COGVIDEOX, cogvideox),
    Model(
        "CogView4Transformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(8, 8),
        ),
        image(**SIZES),
    ),
    Model(
        "LTXVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            cross_attention_dim=WIDTH,
            num_layers=2,
            caption_channels=16,
        ),
        ltx,
    ),
    Model("LTX2VideoTransformer3DModel", LTX2, ltx2, "interleaved"),
    Model("LTX2VideoTransformer3DModel", dict(LTX2, rope_type="split"), ltx2, "split"),
    Model(
        "MochiTransformer3DModel",
        dict(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            pooled_projection_dim=8,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=TEXT,
        ),
        hunyuan(),
    ),
    Model(
        "StableAudioDiTModel",
        STABLE_AUDIO,
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 9),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            global_hidden_states=numbers(BATCH, 1, 8),
            rotary_embedding=angles(10, 8),
        ),
    ),
    Model(
        "Lumina2Transformer2DModel",
        dict(
            in_channels=4,
            hidden_size=48,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            axes_dim_rope=(8, 8, 8),
            axes_lens=(16, 16, 16),
            cap_feat_dim=16,
            multiple_of=8,
        ),
        image(encoder_attention_mask=mask()),
    ),
    Model(
        "HunyuanVideo15Transformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=6,
            rope_axes_dim=AXES,
        ),
        hunyuan(
            timestep=times(500.0),
            encoder_hidden_states_2=numbers(BATCH, 3, 8),
            encoder_attention_mask_2=mask(3),
            image_embeds=numbers(BATCH, 4, 6),
        ),
    ),
    Model(
        "HunyuanVideoFramepackTransformer3DModel",
        dict(
            HUNYUAN,
            pooled_projection_dim=8,
            has_image_proj=True,
            image_proj_dim=6,
            has_clean_x_embedder=True,
        ),
        hunyuan(
            pooled_projections=numbers(BATCH, 8),
            guidance=times(6000),
            image_embeds=numbers(BATCH, 3, 6),
            indices_latents=torch.tensor([1, 3]),
            latents_clean=numbers(BATCH, 4, 1, 6, 8),
            indices_latents_clean=torch.tensor([0]),
            latents_history_2x=numbers(BATCH, 4, 2, 6, 8),
            indices_latents_history_2x=torch.tensor([4, 5]),
            latents_history_4x=numbers(BATCH, 4, 4, 8, 8),
            indices_latents_history_4x=torch.tensor([6, 7, 8, 9]),
        ),
    ),
    Model(
        "MotifVideoTransformer3DModel",
        {k: v for k, v in HUNYUAN.items() if k != "num_refiner_layers"},
        hunyuan(),
    ),
    Model(
        "WanAnimateTransformer3DModel",
        dict(
            WAN,
            in_channels=12,
            latent_channels=4,
            image_dim=6,
            motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
            motion_encoder_size=16,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        lambda: dict(
            wan(12)(),
            hidden_states=numbers(BATCH, 12, 2, 6, 8),
            encoder_hidden_states_image=numbers(BATCH, 3, 6),
            pose_hidden_states=numbers(BATCH, 4, 1, 6, 8),
            face_pixel_values=numbers(BATCH, 3, 5, 16, 16),
        ),
    ),
    Model(
        "AnyFlowTransformer3DModel",
        WAN,
        lambda: dict(
            wan()(),
            hidden_states=numbers(BATCH, 2, 4, 6, 8),
            timestep=times(700.0)[:, None].expand(-1, 2),
            r_timestep=times(300.0)[:, None].expand(-1, 2),
        ),
    ),
    Model(
        "HeliosTransformer3DModel",
        {**{k: v for k, v in WAN.items() if k != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        wan(),
    ),
    Model(
        "SanaVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=HEADS,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=16,
            sample_size=8,
            rope_max_seq_len=32,
        ),
        wan(encoder_attention_mask=mask()),
    ),
    Model(
        "HunyuanDiT2DModel",
        dict(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=WIDTH,
            num_layers=2,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        hunyuan_dit,
    ),
    Model(
        "HunyuanDiT2DControlNetModel",
        dict(
            conditioning_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            patch_size=2,
            sample_size=8,
            hidden_size=WIDTH,
            transformer_num_layers=4,
            cross_attention_dim=16,
            cross_attention_dim_t5=16,
            pooled_projection_dim=8,
            text_len=TEXT,
            text_len_t5=TEXT,
        ),
        lambda: dict(hunyuan_dit(), controlnet_cond=numbers(BATCH, 4, 6, 8)),
    ),
    Model(
        "LuminaNextDiT2DModel",
        dict(
            sample_size=8,
            in_channels=4,
            hidden_size=WIDTH,
            num_layers=2,
            num_attention_heads=HEADS,
            num_kv_heads=1,
            multiple_of=8,
            cross_attention_dim=16,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 6, 8),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            encoder_mask=mask(),
            image_rotary_emb=lumina_freqs(),
            cross_attention_kwargs={},
        ),
    ),
    Model(
        "AllegroTransformer3DModel",
        dict(
            num_attention_heads=HEADS,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_height=6,
            sample_width=8,
            sample_frames=2,
            caption_channels=16,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 2, 6, 8),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            timestep=torch.tensor([3, 700]),
            attention_mask=torch.ones(BATCH, 2, 6, 8),
            encoder_attention_mask=mask()[:, None].float(),
            image_rotary_emb=allegro_freqs(),
        ),
    ),
    Model(
        "CosmosTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            num_layers=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
            extra_pos_embed_type=None,
            concat_padding_mask=False,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 2, 6, 8),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
        ),
    ),
    Model(
        "EasyAnimateTransformer3DModel",
        dict(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            sample_width=8,
            sample_height=6,
            num_layers=2,
            mmdit_layers=1,
            time_embed_dim=8,
            text_embed_dim=16,
        ),
        wan(),
    ),
    Model(
        "OmniGenTransformer2DModel",
        dict(
            in_channels=4,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            intermediate_size=32,
            num_layers=2,
            pad_token_id=0,
            vocab_size=50,
            max_position_embeddings=64,
            original_max_position_embeddings=64,
            rope_scaling={"long_factor": [1] * 8, "short_factor": [1] * 8},
            pos_embed_max_size=8,
            time_step_dim=8,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 6, 8),
            timestep=times(),
            input_ids=torch.arange(BATCH * TEXT).view(BATCH, TEXT),
            input_img_latents=[],
            input_image_sizes={},
            attention_mask=torch.ones(BATCH, 18, 18),
            position_ids=torch.arange(18).expand(BATCH, -1),
        ),
    ),
    Model(
        "AceStepTransformer1DModel",
        dict(
            hidden_size=WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            head_dim=HEAD_DIM,
            in_channels=12,
            audio_acoustic_hidden_dim=4,
            sliding_window=4,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 10, 4),
            timestep=times(),
            timestep_r=times(0.2),
            encoder_hidden_states=numbers(BATCH, TEXT, WIDTH),
            context_latents=numbers(BATCH, 10, 8),
        ),
    ),
    Model(
        "BriaFibo2Transformer2DModel",
        dict(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=HEADS,
            cap_feat_dim=16,
            injection_layer_ids=(0,),
            perceiver_num_layers=1,
            min_num_gist_tokens=2,
            max_num_gist_tokens=4,
            gist_step=1,
            gist_min_text_len=2,
            gist_max_text_len=8,
            axes_dims=AXES,
            axes_lens=(32, 16, 16),
        ),
        image(
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, 2, TEXT, 16),
            encoder_attention_mask=mask(),
        ),
    ),
    Model(
        "ErnieImageTransformer2DModel",
        dict(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_layers=2,
            ffn_hidden_size=32,
            in_channels=4,
            out_channels=4,
            text_in_dim=16,
            rope_axes_dim=AXES,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 3, 4),
            timestep=torch.tensor([3, 700]),
            text_bth=numbers(BATCH, TEXT, 16),
            text_lens=torch.tensor([5, 4]),
        ),
    ),
    Model(
        "GlmImageTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            text_embed_dim=16,
            time_embed_dim=8,
            condition_dim=4,
            prior_vq_quantizer_codebook_size=20,
        ),
        lambda: dict(
            image()(),
            prior_token_id=torch.arange(12).expand(BATCH, -1),
            prior_token_drop=torch.zeros(BATCH, 12, dtype=torch.bool),
            target_size=SIZES["target_size"],
            crop_coords=SIZES["crop_coords"],
        ),
    ),
    Model(
        "HiDreamImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            caption_channels=[16, 16],
            text_emb_dim=8,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=AXES,
            max_resolution=(8, 8),
            llama_layers=[0, 1],
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 6, 8),
            timesteps=torch.tensor([3, 700]),
            encoder_hidden_states_t5=numbers(BATCH, TEXT, 16),
            encoder_hidden_states_llama3=numbers(2, BATCH, TEXT, 16),
            pooled_embeds=numbers(BATCH, 8),
        ),
    ),
    Model(
        "JoyImageEditTransformer3DModel",
        dict(
            in_channels=4,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            text_dim=16,
            num_layers=2,
            rope_dim_list=list(AXES),
        ),
        wan(),
    ),
    Model(
        "JoyImageEditPlusTransformer3DModel",
        dict(
            in_channels=4,
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            text_dim=16,
            num_layers=2,
            rope_dim_list=list(AXES),
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 16, 4, 1, 2, 2),
            timestep=torch.tensor([3, 700]),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            encoder_hidden_states_mask=mask().long(),
            shape_list=[[(1, 3, 4)], [(1, 2, 4), (1, 2, 4)]],
        ),
    ),
    Model(
        "Kandinsky5Transformer3DModel",
        dict(
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=WIDTH,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=AXES,
        ),
        lambda: dict(
            hidden_states=numbers(1, 2, 6, 8, 4),
            encoder_hidden_states=numbers(1, TEXT, 16),
            timestep=times(500.0, 1),
            pooled_projections=numbers(1, 8),
            visual_rope_pos=[torch.arange(2), torch.arange(3), torch.arange(4)],
            text_rope_pos=torch.arange(TEXT),
        ),
        bfloat16=False,
        tolerance=torch.finfo(torch.bfloat16).eps,  # its own rotation rounds to bfloat16
    ),
    Model(
        "Kandinsky6Transformer3DModel",
        dict(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=WIDTH,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=AXES,
            in_audio_dim=4,
            out_audio_dim=4,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 2, 6, 8, 9),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            timestep=times(500.0),
            pooled_projections=numbers(BATCH, 8),
            audio_hidden_states=numbers(BATCH, 6, 4),
        ),
    ),
    Model(
        "Kandinsky6SRTransformer3DModel",
        dict(
            in_visual_dim=4,
            out_visual_dim=4,
            time_dim=16,
            model_dim=WIDTH,
            ff_dim=32,
            num_visual_blocks=2,
            axes_dims=AXES,
        ),
        lambda: dict(hidden_states=numbers(1, 2, 16, 8, 9), timestep=times(500.0, 1)),
        differentiable=False,
    ),
    Model(
        "Krea2Transformer2DModel",
        dict(
            in_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            intermediate_size=32,
            timestep_embed_dim=8,
            text_hidden_dim=16,
            num_text_layers=2,
            text_num_attention_heads=1,
            text_num_key_value_heads=1,
            text_intermediate_size=16,
            num_layerwise_text_blocks=1,
            num_refiner_text_blocks=1,
            axes_dims_rope=AXES,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 12, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, 2, 16),
            timestep=times(),
            position_ids=torch.cat([torch.zeros(TEXT, 3), grid(1, 3, 4)]),
            encoder_attention_mask=mask(),
        ),
    ),
    Model(
        "LongCatAudioDiTTransformer",
        dict(dit_dim=WIDTH, dit_depth=2, dit_heads=HEADS, dit_text_dim=16, latent_dim=4),
        lambda: dict(
            hidden_states=numbers(BATCH, 9, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            encoder_attention_mask=mask(),
            timestep=times(),
            attention_mask=mask(9),
            latent_cond=numbers(BATCH, 9, 4),
        ),
    ),
    Model(
        "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            hidden_size=WIDTH,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=32,
            in_channels=4,
            audio_in_channels=4,
            text_dim=16,
            freq_dim=8,
            time_embed_hidden_dim=16,
            time_embed_dim=16,
            rope_freq_dim=2,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 12, 16),
            audio_hidden_states=numbers(BATCH, 3, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            timestep=torch.tensor([0.5]),
            timestep_indices=torch.zeros(20, dtype=torch.long),
            token_tags=torch.tensor([1] * TEXT + [0] * 12 + [2] * 3),
            position_ids=torch.cat([grid(TEXT, 1, 1), grid(1, 3, 4), grid(3, 1, 1)]),
            video_indices=torch.arange(5, 17),
            audio_indices=torch.arange(17, 20),
            text_indices=torch.arange(5),
        ),
    ),
    Model(
        "MiniMaxMusic3Transformer1DModel",
        dict(
            in_channels=4,
            condition_dim=8,
            num_layers=2,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            ff_inner_dim=32,
            rotary_dim=8,
            fourier_embedding_dim=8,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 9),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, 9, 8),
        ),
    ),
    Model(
        "NucleusMoEImageTransformer2DModel",
        dict(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            joint_attention_dim=16,
            axes_dims_rope=AXES,
            moe_enabled=False,
            capacity_factors=[8.0] * 2,
        ),
        lambda: dict(qwen_image(), encoder_hidden_states=numbers(BATCH, TEXT, 16)),
    ),
    Model(
        "PRXTransformer2DModel",
        dict(
            in_channels=4,
            context_in_dim=16,
            hidden_size=WIDTH,
            num_heads=HEADS,
            depth=2,
            axes_dim=[8, 8],
        ),
        image(timestep=times()),
    ),
    Model(
        "QwenImage21Transformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            context_in_dim=16,
            axes_dims_rope=AXES,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 12, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            timestep=times(),
            img_shapes=[[(1, 3, 4)]] * BATCH,
            img_mask=torch.tensor([[False] * TEXT + [True] * 3] * BATCH),
        ),
    ),
    Model(
        "StableAudio3DiTModel",
        dict(
            io_channels=4,
            embed_dim=64,
            depth=2,
            num_heads=2,
            cond_token_dim=16,
            global_cond_dim=16,
            local_add_cond_dim=3,
            timestep_features_dim=8,
            num_memory_tokens=2,
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 4, 9),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            global_hidden_states=numbers(BATCH, 16),
            local_add_cond=numbers(BATCH, 3, 9),
        ),
    ),
    Model(
        "ZImageTransformer2DModel",
        dict(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
            cap_feat_dim=16,
            axes_dims=list(AXES),
            axes_lens=[64, 16, 16],
        ),
        z_image,
    ),
    Model(
        "AnimaTextConditioner",
        dict(
            source_dim=16,
            target_dim=16,
            model_dim=32,
            num_layers=2,
            num_attention_heads=HEADS,
            target_vocab_size=20,
            min_sequence_length=8,
        ),
        lambda: dict(
            source_hidden_states=numbers(BATCH, TEXT, 16),
            target_input_ids=torch.arange(6).expand(BATCH, -1),
        ),
    ),
    Model(
        "AutoencoderSAME",
        dict(
            audio_channels=1,
            patch_size=4,
            encoder_channels=32,
            encoder_c_mults=(2,),
            encoder_strides=(2,),
            encoder_transformer_depths=(2,),
            latent_dim=4,
            dim_heads=32,
        ),
        lambda: dict(sample=numbers(BATCH, 1, 64)),
    ),
    Model(
        "SanaWMTransformer3DModel",
        dict(
            in_channels=4,
            num_layers=2,
            hidden_size=48,
            num_attention_heads=2,
            softmax_every_n=2,
            linear_head_dim=24,
            caption_channels=16,
            image_size=64,
            chunk_plucker_post_attn_blocks=2,
        ),
        lambda: dict(
            hidden_states=numbers(1, 4, 2, 4, 4),
            timestep=torch.full((1, 1, 2), 500.0),
            encoder_hidden_states=numbers(1, 1, TEXT, 16),
            encoder_attention_mask=torch.ones(1, TEXT),
        ),
    ),
    Model(
        "Ideogram4Transformer2DModel",
        dict(
            in_channels=4,
            num_layers=2,
            attention_head_dim=HEAD_DIM,
            num_attention_heads=HEADS,
            intermediate_size=32,
            adaln_dim=8,
            llm_features_dim=16,
            mrope_section=(4, 2, 2),
        ),
        lambda: dict(
            hidden_states=numbers(BATCH, 17, 4),
            timestep=times(),
            encoder_hidden_states=numbers(BATCH, 17, 16),
            position_ids=torch.cat([grid(TEXT, 1, 1), grid(1, 3, 4)]).long().expand(BATCH, -1, -1),
            segment_ids=torch.zeros(BATCH, 17, dtype=torch.long),
            indicator=torch.tensor([[3] * TEXT + [2] * 12] * BATCH),
        ),
    ),
    Model(
        "AnyFlowFARTransformer3DModel",
        dict(WAN, attention_head_dim=16, chunk_partition=(1, 1), full_chunk_limit=3),
        dict,
        not_run="FlexAttention does not compile for the CPU",
    ),
    Model(
        "SanaWMLTX2RefinerTransformer3DModel",
        LTX2,
        lambda: dict(
            hidden_states=numbers(BATCH, 24, 4),
            encoder_hidden_states=numbers(BATCH, TEXT, 16),
            timestep=torch.tensor([3, 700]),
            video_rotary_emb=tuple(t.expand(BATCH, -1, -1) for t in angles(24, 24)),
        ),
    ),
    Model(
        "Cosmos3OmniTransformer",
        dict(
            head_dim=HEAD_DIM,
            hidden_size=WIDTH,
            intermediate_size=32,
            latent_channel=4,
            num_attention_heads=HEADS,
            num_hidden_layers=1,
            num_key_value_heads=1,
            patch_latent_dim=16,
            vocab_size=50,
            rope_axes_dim=(2, 3, 3),
        ),
        dict,
    ),
    Model(
        "WanAnimate2Transformer3DModel",
        dict(
            text_len=TEXT,
            in_dim=4,
            dim=24,
            ffn_dim=32,
            freq_dim=8,
            text_dim=16,
            out_dim=4,
            num_heads=HEADS,
            num_layers=1,
            use_img_emb=False,
        ),
        dict,
    ),
    Model(
        "LTX2VideoDiffusionDecoderModel",
        dict(
            latent_channels=4,
            decoder_head_dim=8,
            decoder_stage_channels=(64, 32, 16, 16, 8),
            decoder_stage_depths=(1, 1, 1, 1, 1),
            decoder_t_emb_dim=8,
        ),
        dict,
    ),
    Model(
        "AutoencoderKLMiniMaxH3",
        dict(
            latent_channels=4,
            block_out_channels=(8,) * 6,
            layers_per_block=1,
            norm_num_groups=2,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
            decoder_attention_head_dim=16,
            latents_mean=(0.0,) * 4,
            latents_std=(1.0,) * 4,
        ),
        dict,
    ),
    Model(
        "CosmosControlNetModel",
        dict(
            n_controlnet_blocks=1,
            in_channels=6,
            latent_channels=6,
            model_channels=WIDTH,
            num_attention_heads=HEADS,
            attention_head_dim=HEAD_DIM,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 16, 16),
        ),
        dict,
        not_run="it needs torchvision",
    ),
    Model(
        "ZImageControlNetModel",
        dict(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=4,
            dim=32,
            n_refiner_layers=1,
            n_heads=HEADS,
            n_kv_heads=HEADS,
        ),
        dict,
        not_run="it takes layers of a transformer",
    ),
)
