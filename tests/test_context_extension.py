"""benchmarks/context_extension.py: perplexities are right, methods equal those of transformers, and
an interrupted run continues.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("matplotlib", reason="pip install 'rope_ext[test]'")
pytest.importorskip("tqdm", reason="pip install 'rope_ext[test]'")
pytest.importorskip("transformers", reason="pip install 'rope_ext[test]'")

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import context_extension
import extension_methods
import extension_reading
import extension_training
import transformers
from support import small_llama

from rope_ext.demo import models

TRAINED, LENGTH = 64, 200
# float32: the same sums in other orders
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


TOKENS = torch.randint(0, 96, (1, LENGTH), generator=torch.Generator().manual_seed(1))


def plain_nll(model):
    with torch.no_grad():
        logits = model(TOKENS, use_cache=False).logits[0, :-1]
    return cross_entropy(logits, TOKENS[0, 1:], reduction="none").double()


def test_reading_in_chunks_is_reading_at_once(monkeypatch):
    model = small_llama(2)
    expected = plain_nll(model)
    for chunk, logits in ((1024, 256), (33, 50), (199, 7)):
        monkeypatch.setattr(extension_reading, "CHUNK", chunk)
        monkeypatch.setattr(extension_reading, "LOGITS", logits)
        read = []
        reading = extension_reading.read(model, TOKENS, read.append)
        torch.testing.assert_close(reading.nll, expected, **CLOSE)
        assert sum(read) == LENGTH
        assert reading.seconds > 0


FACTOR = {"factor": LENGTH / TRAINED}
SCALINGS = {
    "none": {"rope_type": "default"},
    "linear": {"rope_type": "linear", **FACTOR},
    "YaRN": {"rope_type": "yarn", **FACTOR, "original_max_position_embeddings": TRAINED},
    "dynamic NTK": {"rope_type": "dynamic", **FACTOR},
}


@pytest.mark.parametrize("method", SCALINGS)
def test_a_method_is_that_of_transformers(method):
    model = small_llama(2)
    with extension_methods.extended(model, method, TRAINED, LENGTH):
        got = extension_reading.read(model, TOKENS, lambda count: None).nll
    config = copy.deepcopy(model.config)
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {"rope_theta": theta, **SCALINGS[method]}
    own = transformers.LlamaForCausalLM(config).eval()
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(got, plain_nll(own), **CLOSE)
    # outside of the block the model is unchanged; every method but none gives other results
    assert (method == "none") == torch.allclose(got, plain_nll(model), **CLOSE)


def test_methods_change_nothing_within_the_context_of_the_training():
    for name, method in extension_methods.METHODS.items():
        inv_freq, attention_scaling = method(64, 1e4, TRAINED, TRAINED)
        expected = extension_methods.none(64, 1e4, TRAINED, TRAINED)[0]
        torch.testing.assert_close(inv_freq, expected, rtol=1e-6, atol=0, msg=name)
        assert attention_scaling == 1, name


@pytest.mark.slow
def test_training_makes_the_text_less_surprising_and_is_seeded():
    text = torch.frombuffer(bytearray(b"the same words again, " * 200), dtype=torch.uint8)
    models = [extension_training.new_model(seed=3) for _ in range(2)]
    before = extension_training.read_windows(models[0], text).mean()
    for model in models:
        extension_training.train(model, text, 64, 12, 2e-3, 3, lambda count: None)
    first, second = (extension_training.read_windows(model, text) for model in models)
    assert torch.equal(first, second)
    assert first.mean() < 0.9 * before


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extension_training, "READ_WINDOWS", 1)
    monkeypatch.setitem(models.SMOLLM2_SHAPE, "max_position_embeddings", TRAINED)
    text = tmp_path / "text"
    text.write_text("Words that are read. " * 600)
    run = ["context_extension", f"--out={tmp_path}", f"--text={text}", "--random-layers=1"]
    run += ["--quick", "--lengths", str(TRAINED), str(LENGTH), "--steps=2", "--extending-steps=1"]
    monkeypatch.setattr(sys, "argv", run)
    lengths = []

    def read(model, tokens, tick):
        lengths.append(tokens.shape[1])
        if len(lengths) == 2:
            raise KeyboardInterrupt
        return extension_reading.read(model, tokens, tick)

    monkeypatch.setattr(context_extension, "read", read)
    with pytest.raises(KeyboardInterrupt):
        context_extension.main()
    rows = context_extension.Results(tmp_path, context_extension.READING).rows
    assert [(row["length"], row["method"]) for row in rows] == [(str(TRAINED), "none")]
    context_extension.main()
    methods = context_extension.QUICK_METHODS
    assert lengths[2:] == [LENGTH] * len(methods)  # finished results are not read again
    report = (tmp_path / "context_extension.md").read_text()
    assert report.strip() in capsys.readouterr().out
    assert all(report.count(f"| {method} |") >= 2 for method in methods)
    context_extension.main()
    assert len(lengths) == 2 + len(methods)


def test_the_pages_have_the_figures_of_the_results():
    root = Path(__file__).parents[1]
    results = (root / "benchmarks" / "results" / "context_extension.md").read_text().splitlines()
    guide = (root / "docs" / "guide.md").read_text().splitlines()
    names = tuple(extension_methods.METHODS)
    rows = [line for line in guide if line.startswith("| 32,768 |")]
    rows += [line for line in guide if line.startswith(tuple(f"| {name} | " for name in names))]
    assert len(rows) == 2 * len(names)
    assert set(rows) <= set(results)
    cells = {cell.strip() for line in results for cell in line.split("|")}
    page = (root / "docs" / "performance.md").read_text().partition("## Longer contexts")[2]
    rows = [line.split("|")[1:-1] for line in page.splitlines() if line.startswith("| ")]
    of_methods = [row for row in rows[: len(names) + 1] if row[0].strip() in names]
    assert len(of_methods) == len(names)
    assert {cell.strip() for row in of_methods for cell in row} <= cells
