"""Trainings by Axolotl's command on the CPU, each pair in a process of its own: test_axolotl.py."""

import json
import os
from pathlib import Path

import torch
import transformers
from axolotl.cli.train import do_cli
from axolotl.integrations.base import BasePlugin
from axolotl.train import train as imported_before_the_fork  # noqa: F401


def write_model(folder: Path) -> None:
    """A Llama with random weights, a tokenizer of words, and texts of different lengths."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: at for at, word in enumerate(("<unk>", "<s>", "</s>", *map(str, range(61))))}
    words = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    texts = [" ".join(str(i * j % 61) for j in range(8 + i % 13)) for i in range(1, 33)]
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))


def write_config(folder: Path, out: str, plugins: tuple[str, ...] = (), **more: object) -> Path:
    """The YAML file of a training; YAML reads JSON too."""
    config = {
        "base_model": str(folder),
        "datasets": [
            {"path": str(folder / "texts.jsonl"), "ds_type": "json", "type": "completion"}
        ],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / out),
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "attn_implementation": "eager",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "use_cpu": True,
        "seed": 1,
        "dataset_num_proc": 1,
        "save_strategy": "no",
        "plugins": ["axolotl_training.Recorder", *plugins],
        **more,
    }
    path = folder / f"{out}.yaml"
    path.write_text(json.dumps(config))
    return path


class Recorder(BasePlugin):
    """A plugin that keeps the trainer, and counts the calls of rope_ext's operators."""

    trainer = None
    calls = 0

    def post_trainer_create(self, cfg, trainer):
        def counted(*args, **kwargs):
            with torch.profiler.profile() as profile:
                loss = step(*args, **kwargs)
            events = profile.key_averages()
            Recorder.calls += sum(e.count for e in events if e.key.startswith("rope::"))
            return loss

        step, trainer.training_step = trainer.training_step, counted
        Recorder.trainer, Recorder.calls = trainer, 0


def train(config: Path) -> tuple[list[dict], int]:
    """What the trainer logs of each step, and the calls of rope_ext's operators."""
    torch.manual_seed(0)  # for the weights of adapters: only afterwards Axolotl seeds
    do_cli(str(config))
    return [log for log in Recorder.trainer.state.log_history if "loss" in log], Recorder.calls


def train_without_and_with(plugin: str, folder: Path, more: dict) -> tuple:
    """Both trainings, and what they wrote. The plugin stays registered in the process."""
    os.environ.update(HF_HUB_OFFLINE="1", AXOLOTL_DO_NOT_TRACK="1")
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    write_model(folder)
    own = train(write_config(folder, "own", **more))
    ours = train(write_config(folder, "ours", (plugin,), **more))
    return own, ours, (folder / "output").read_text()
