"""Files that comments and documents name exist, here or in the projects that are named."""

import re
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
SUFFIXES = ("py", "cpp", "h", "inl", "cu", "cuh", "cmake", "json", "js", "css", "html")
REFERENCE = re.compile(
    rf"(?<![\w/.*{{}}<>$-])(?:\.\./)*((?:[\w.-]+/)*[\w-]+\.(?:{'|'.join(SUFFIXES)}))(?![\w(/])"
)
# Files of users, generated files, and files of other projects
ELSEWHERE = {
    "config.json", "path/to/config.json", "rope.html", "probe.cu", "Python.h",
    "rope_ext-config.cmake", "rope_ext-config-version.cmake",
    "flash_attn/layers/rotary.py", "flash_attn/ops/triton/rotary.py",  # flash-attention
    "fusedQKNormRopeKernel.cu",  # TensorRT-LLM
    "integrations/hub_kernels.py", "layer/layer.py",  # transformers and kernels
    "layers.py", "metadata.json",  # of a folder for kernels
    "config/override.py", "models/common/rope.py",  # torchtitan
    "integrations/base.py", "loaders/model.py",  # Axolotl
    "litgpt/model.py", "timm/layers/pos_embed_sincos.py",
    "megatron/core/fusions/fused_mla_yarn_rope_apply.py",
    "megatron/core/models/common/embeddings/rope_utils.py",
    "llama.cpp", "ggml/src/ggml-cpu/ops.cpp",
    "llama/model.py", "models/llama3/model.py",  # Meta's
    "modeling_hunyuan_v1_dense.py", "modeling_rope_utils.py",  # transformers
    "onnx.ai/onnx/operators/onnx__RotaryEmbedding.html",
    "torchtune/modules/position_embeddings.py",
    "transformer_engine/pytorch/attention/rope.py",
}  # fmt: skip
# Pages on moving from another project contain names of its files.
DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
READ = [
    *(file for room in ("csrc", "rope_ext") for file in (REPOSITORY / room).rglob("*.*")),
    *(file for file in DOCUMENTS if file.name != "CHANGELOG.md"),
    *(REPOSITORY / name for name in ("setup.py", "CMakeLists.txt")),
]


def test_files_that_are_named_exist():
    files = [f.relative_to(REPOSITORY) for f in REPOSITORY.rglob("*.*") if f.suffix[1:] in SUFFIXES]
    parts = [f.parts for f in files if not f.parts[0].startswith("build")]
    existing = {"/".join(p[i:]) for p in parts for i in range(len(p))}
    read = [f for f in READ if f.suffix[1:] in (*SUFFIXES, "md", "txt")]
    named = {(f, m[1]) for f in read for m in REFERENCE.finditer(f.read_text(encoding="utf-8"))}
    assert len(named) > 200
    missing = [(str(f.relative_to(REPOSITORY)), name) for f, name in named if name not in existing]
    assert sorted(x for x in missing if x[1] not in ELSEWHERE) == []
    assert {name for _, name in missing} >= ELSEWHERE
