"""Inputs of tiny models, by what a model takes: tokens, images, sound, features."""

import inspect

import torch
from torch import nn

SPECIAL = 64  # tokens from this one on mark images, ends of text and so on
ROWS, TOKENS, PADDING = 2, 10, 3  # of a batch; the last row begins with PADDING tokens of padding


def tokens(model: nn.Module) -> dict[str, torch.Tensor]:
    """Token ids with left padding, and positions of each row if forward takes them."""
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[-1, :PADDING] = 0
    shift = torch.arange(ROWS)[:, None] * 5
    known = {}
    for side in ("", "decoder_"):
        known |= {
            f"{side}input_ids": torch.randint(3, SPECIAL, (ROWS, TOKENS), generator=generator),
            f"{side}attention_mask": mask,
            f"{side}position_ids": (mask.cumsum(-1) - 1).clamp(min=0) + shift,
        }
    return {name: value for name, value in known.items() if name in accepted}


def unpadded(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.ones_like(x) if "mask" in n else x for n, x in tokens(model).items()}


def patches(model: nn.Module) -> dict[str, torch.Tensor]:
    """Two images as a list of patches, and their numbers of patches in time, height and width."""
    grid = torch.tensor([[1, 4, 4], [1, 4, 8]])
    config = model.config
    depth = getattr(config, "temporal_patch_size", getattr(config, "patch_temporal", 1))
    pixels = torch.randn(int(grid.prod(-1).sum()), 3 * depth * config.patch_size**2)
    names = inspect.signature(model.forward).parameters
    return {next(iter(names)): pixels, next(name for name in names if "grid" in name): grid}


def images(model: nn.Module) -> dict[str, torch.Tensor]:
    size = model.config.image_size
    return {"pixel_values": torch.randn(ROWS, 3, size, size)}


def draw(**shapes):
    """Random inputs of these shapes after the first dimension."""
    return lambda model: {name: torch.randn(ROWS, *shape) for name, shape in shapes.items()}


def shaped(*shape):
    """Patches of this shape."""

    def inputs(model):
        pixels, grid = patches(model).items()
        return {pixels[0]: pixels[1].reshape(shape), grid[0]: grid[1]}

    return inputs


def speech(model):
    """Samples for the encoder and tokens for the decoder."""
    return tokens(model) | draw(input_values=(2000,))(model)


def song(model):
    """Four tokens of text, then as many as the encoder makes from 16 frames of sound."""
    ids = torch.tensor([[3, 4, 5, 6] + [model.config.audio_token_id] * 4])
    mask = torch.ones(1, 16).long()
    return {"input_ids": ids, "input_features": torch.randn(1, 16, 16), "input_features_mask": mask}


def memory(model):
    """An image of 4 x 4 positions that attends to two such images in memory."""
    image, past = torch.randn(16, ROWS, 64), torch.randn(32, ROWS, 64)
    return {
        "current_vision_features": image,
        "memory": past,
        "current_vision_position_embeddings": torch.randn_like(image),
        "memory_posision_embeddings": torch.randn_like(past),
    }


def atoms(model):
    """Atoms of three residues."""
    attention = model.layers[0].self_attn
    angles = torch.randn(ROWS, 12, attention.head_dim // 2).repeat(1, 1, 2)
    width = attention.q_proj.in_features
    return {
        "token_hidden_states": torch.randn(ROWS, 3, model.token_to_atom_linear.in_features),
        "hidden_states": torch.randn(ROWS, 12, width),
        "atom_conditioning": torch.randn(ROWS, 12, width),
        "attention_mask": None,
        "position_embeddings": (angles.cos(), angles.sin()),
        "atom_to_token": torch.arange(3).repeat_interleave(4).expand(ROWS, 12),
    }
