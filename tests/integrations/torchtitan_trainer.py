"""torchtitan's trainer on the CPU, for test_torchtitan.py.

torchtitan takes CUDA where PyTorch finds no accelerator, asks for the memory of the device, and
sets timeouts of NCCL; and PyTorch's FlexAttention has no backward on the CPU. These parts are
replaced here, in the runs with rope_ext and in those without.
"""

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.experimental._context_parallel import _attention as context_parallel
from torch.nn.attention.flex_attention import create_block_mask, create_mask

torch._utils._get_available_device_type = lambda: "cpu"

import torchtitan.trainer  # noqa: E402
from torchtitan.components import metrics  # noqa: E402
from torchtitan.config import ConfigManager, derive, override  # noqa: E402
from torchtitan.distributed import utils as distributed  # noqa: E402
from torchtitan.models.common import attention  # noqa: E402

from rope_ext.integrations import torchtitan as integration  # noqa: E402

OURS = "rope_ext.integrations.torchtitan.rope"
MEMORY = metrics.DeviceMemStats(*[0] * len(metrics.DeviceMemStats._fields))
metrics.build_device_memory_monitor = lambda: SimpleNamespace(
    device_name="cpu", get_peak_stats=lambda: MEMORY, reset_peak_stats=lambda: None
)
distributed.set_pg_timeouts = lambda timeout, parallel_dims: None
for module in attention, context_parallel:  # not compiled: a mask would take a minute
    module._compiled_create_block_mask = create_block_mask
torchtitan.trainer.time = SimpleNamespace(perf_counter=time.perf_counter, sleep=lambda _: None)


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)  # of each step
    gradient_norms: list[float] = field(default_factory=list)
    calls: int = 0  # of the operator
    distributed_calls: int = 0  # those with DTensors


class MaskedAttention(attention.FlexAttention):
    """The attention of FlexAttention for a BlockMask, with the mask as a tensor."""

    @dataclass(kw_only=True, slots=True)
    class Config(attention.FlexAttention.Config):
        pass

    def forward(  # torchtitan shards arguments by these names
        self, q_BLNH, k_BLNH, v_BLNH, *, attention_masks, scale=None, enable_gqa=False, **_
    ):
        q, k, v = (x.transpose(1, 2) for x in (q_BLNH, k_BLNH, v_BLNH))
        shape = attention_masks.shape[0], 1, q.shape[2], k.shape[2]
        mask = create_mask(attention_masks.mask_mod, *shape, device=q.device)
        y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=enable_gqa)
        return y.transpose(1, 2)


@override(target=attention.FlexAttention.Config)
def masked_attention(config):
    return derive(config, MaskedAttention.Config)


def write_assets(folder: Path):
    """A tokenizer and a data set of documents of different lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: at for at, word in enumerate(("<eos>", "<unk>", *map(str, range(1000))))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    (folder / "tokenizer").mkdir()
    (folder / "c4_test").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    rows = (" ".join(str(i * j % 997) for j in range(20 + 7 * (i % 13))) for i in range(1, 400))
    lines = "\n".join(f'{{"text": "{row}"}}' for row in rows)
    (folder / "c4_test" / "data.json").write_text(lines)


def train(folder: Path, flags: str, overrides: tuple[str, ...]) -> Run:
    """Trains a debug model of torchtitan for 10 steps; flags begin with the name of its family."""
    model, *flags = flags.split()
    command = f"""
        --module {model} --config {model}_debugmodel --training.steps 10 --debug.seed 1
        --training.local-batch-size 2 --training.seq-len 64 --training.disable-cuda-graphs
        --hf-assets-path {folder}/tokenizer --dataloader.dataset-path {folder}/c4_test
        --dump-folder {folder}
    """
    overrides = f"{__name__}.masked_attention", *overrides
    arguments = [*command.split(), *flags, "--override.imports", *overrides]
    run = Run()

    def counted(*args, **kwargs):
        run.calls += 1
        run.distributed_calls += isinstance(args[0], DTensor)
        return rotate(*args, **kwargs)

    def log(step, loss, largest_loss, gradient_norm, **_):
        run.losses.append(loss)
        run.gradient_norms.append(gradient_norm)

    rotate, integration.apply_rotary_qk = integration.apply_rotary_qk, counted
    trainer = ConfigManager().parse_args(arguments).build()
    trainer.metrics_processor.log = log
    for module in trainer.model_parts[0].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo can't scale while it sums
    try:
        trainer.train()
    finally:
        integration.apply_rotary_qk = rotate
        trainer.close()
    return run


def train_as_rank(rank: int, ranks: int, port: int, folder: Path, flags: str, ours: bool) -> Run:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    torch.set_num_threads(1)
    return train(folder, flags, (OURS,) if ours else ())
