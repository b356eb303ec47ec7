"""The devices of the tests and, on the CPU, the code paths."""

import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
import works_with
from support import CPU_CODE, cpu_without_kernels

from rope_ext import _C
from rope_ext.integrations.transformers import families

CUDA = pytest.param("cuda", marks=pytest.mark.cuda)


@pytest.fixture(params=["cpu", CUDA])
def device(request):
    """The device to test on."""
    return torch.device(request.param)


@contextlib.contextmanager
def cpu_code(name):
    """On the CPU with the kernels of this name; skips if the processor can't run them."""
    before = _C.build_info()["cpu_capability"]
    try:
        _C.set_cpu_capability(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    yield torch.device("cpu")
    _C.set_cpu_capability(before)


@pytest.fixture(params=[*CPU_CODE, CUDA])
def backend(request):
    """The device to test on, with each of its sets of kernels."""
    if request.param == "cuda":
        yield torch.device("cuda")
        return
    with cpu_code(request.param) as device:
        yield device


@pytest.fixture(params=CPU_CODE)
def cpu_kernels(request):
    """Each set of kernels of the CPU, for tests on the CPU only."""
    with cpu_code(request.param):
        yield


@pytest.fixture(params=CPU_CODE[1:])
def vector_code(request):
    """The code in use, other than portable, with which that is compared."""
    with cpu_code(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and restores it after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads):
    """For many operations on tiny tensors, which threads of busy cores would wait for."""
    threads(1)


@pytest.fixture
def no_kernels():
    """The CPU as a device that rope_ext has no kernels for."""
    with cpu_without_kernels():
        yield


# An emulator of the CUDA runtime (CONTRIBUTING.md) executes the kernels of rope_ext; torch's own
# kernels run on the CPU instead. Tests for which that does not work wait for a GPU.
EMULATED = "libfakegpu" in os.environ.get("LD_PRELOAD", "")
INSIDE = "torch's own CUDA kernels are called inside of an operator or of autograd"
COMPILED = "torch.compile does not work under the emulator"
TRANSFORMED = "torch's own kernels have no place in torch.func's levels under the emulator"
GRAPHS = "CUDA graphs do not work under the emulator"
WAITS = "torch's own kernels run on the CPU in their place, and are waited for"
NOT_EMULATED = {
    r"test_paged_decode\.py.*\[deepseek_v3-cuda": "torch's own CUDA kernels choose the experts",
    r"test_positions_may_be_views\[": INSIDE,
    r"test_inv_freq_may_be_a_view\[": INSIDE,
    r"test_module_made_in_inference_mode_is_good_for_training\[": INSIDE,
    r"test_opcheck_of_the_rotation\[cuda-.*-position_ids-all\]": INSIDE,
    r"test_opcheck_of_the_tables\[cuda-.*-grad\]": INSIDE,
    r"test_opcheck_of_the_rotation_in_place\[": COMPILED,
    r"test_opcheck_of_the_rotation_into_out\[": COMPILED,
    r"test_scaling_compiles_to_one_graph_for_all_lengths\[": COMPILED,
    r"test_gradient_of_one_result_leaves_the_other_tensor_alone\[cuda": INSIDE,
    r"test_backward_makes_one_tensor_and_zeros_for_what_has_no_gradient\[cuda-norm": INSIDE,
    r"test_captured_graph_follows_the_positions\[": GRAPHS,
    r"test_no_value_is_waited_for\[": WAITS,
    r"test_length_on_a_device_is_not_waited_for\[": WAITS,
    r"test_module_made_and_used_in_inference_mode_goes_on_outside_of_it\[": INSIDE,
    r"test_regime_length_decides_for_each_sequence_as_if_it_were_alone\[cuda-longrope": INSIDE,
    r"test_one_graph_serves_all_sequence_lengths\[": COMPILED,
    r"test_no_more_than_one_recompilation_without_asking_for_dynamic_shapes\[": COMPILED,
    r"test_in_place_on_a_graph_input_writes_it\[": COMPILED,
    r"test_reading_before_and_after_an_in_place_rotation_stays_in_order\[": COMPILED,
    r"test_module_has_two_graphs_for_all_shapes_positions_and_tables\[": COMPILED,
    r"test_transforms_are_compiled\[": COMPILED,
    r"tests/test_transforms\.py::": TRANSFORMED,
    r"test_appends\.py::test_one_graph_for_all_lengths\[": COMPILED,
    r"test_reduce_overhead_replays_with_new_positions_and_no_sync\[": COMPILED,
    r"test_axes_and_positions_may_be_views\[": INSIDE,
    r"test_rows_are_picked_from_the_tables_of_each_axis\[cuda": INSIDE,
    r"test_frequencies_of_any_dtype_and_positions_and_frequencies_in_views\[": INSIDE,
}

# With --plain: what plain PyTorch does not promise.
TRACED = "graphs are traced as plain PyTorch, whose errors and order of sums are others"
NOT_PLAIN = {
    r"test_nothing_is_allocated": "results are computed, then copied",
    r"test_argument_of_another_type_beside_a_compiler": TRACED,
    r"test_learned_frequencies_compile_with_their_gradient": TRACED,
    r"test_rms_norm_rotary_transforms\.py::test_one_graph_for_all_lengths": TRACED,
    r"test_negated_view_is_rotated_in_place_by_vmap_and_refused_in_a_graph": TRACED,
}


COMPATIBILITY = Path(__file__).parents[1] / "docs" / "compatibility.md"


def pytest_addoption(parser):
    parser.addoption(
        "--record-families",
        action="store_true",
        help="run every model family, and write the results to the package and docs/",
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="of the selected tests only each Nth: a sample, where each of them is slow",
    )
    parser.addoption(
        "--plain",
        action="store_true",
        help="with the CPU as a device that has no kernels: the operators are plain PyTorch",
    )
    parser.addoption(
        "--works",
        choices=("print", "record"),
        help="the table of what works with what, in the docs: print it as the collected tests say, "
        "or write it as the tests that passed have shown (-m shows)",
    )


def pytest_configure(config):
    if config.getoption("--plain"):
        without_kernels = cpu_without_kernels()
        without_kernels.__enter__()
        config.add_cleanup(lambda: without_kernels.__exit__(None, None, None))
    if config.getoption("--record-families"):
        config.option.markexpr = config.option.keyword = ""  # a record needs all tests
    if works := config.getoption("--works"):
        plugin = works_with.Printed() if works == "print" else works_with.Recorded(COMPATIBILITY)
        config.pluginmanager.register(plugin)


@pytest.fixture(scope="session")
def recording(request):
    """The results of model families, to be recorded at the end; None in an ordinary run."""
    if not request.config.getoption("--record-families"):
        yield None
        return
    import transformers

    results = {}
    yield results
    if not results:
        return
    record = {"transformers": transformers.__version__, "families": dict(sorted(results.items()))}
    file = Path(families.__file__).with_name(families.RECORD)
    file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    page = COMPATIBILITY.read_text(encoding="utf-8")
    COMPATIBILITY.write_text(families.inserted(page, record), encoding="utf-8")


# The number of selected tests that wait for a GPU: each process counts them, the first prints it.
WAITING = pytest.StashKey()


@pytest.hookimpl(trylast=True)  # after the selection by -m and -k
def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        waiting = [item for item in items if item.get_closest_marker("cuda")]
        config.stash[WAITING] = len(waiting)
        config.hook.pytest_deselected(items=waiting)
        items[:] = [item for item in items if not item.get_closest_marker("cuda")]
    if (step := config.getoption("--every")) > 1:
        config.hook.pytest_deselected(items=[x for i, x in enumerate(items) if i % step])
        items[:] = items[::step]
    for item in items if config.getoption("--plain") else ():
        for pattern, reason in NOT_PLAIN.items():
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.skip(reason=reason))
    for item in items:
        item.user_properties.append(("shows", works_with.claims(item.iter_markers("shows"))))
        if EMULATED and item.get_closest_marker("cuda"):
            for pattern, reason in NOT_EMULATED.items():
                if re.search(pattern, item.nodeid):
                    item.add_marker(pytest.mark.skip(reason=reason))


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of pytest-xdist
        session.config.workeroutput["waiting"] = session.config.stash.get(WAITING, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[WAITING] = getattr(node, "workeroutput", {}).get("waiting", 0)


def pytest_terminal_summary(terminalreporter, config):
    if waiting := config.stash.get(WAITING, 0):
        terminalreporter.write_line(f"{waiting} tests wait for a GPU: not run")
