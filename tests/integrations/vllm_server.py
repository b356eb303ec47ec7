"""Serves models by vLLM in a process of its own, `python vllm_server.py JOBS RESULTS`.

JOBS is a JSON list of engines: a name and the arguments of vllm.LLM. RESULTS gets, by torch.save,
for each name the tokens of requests that come and go, the number of calls of rope_ext's operators
and of the model, the class of its rotation, and what this rotated in its first and its last call.
"""

import json
import os
import sys

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other processes need the cores too
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}

import torch
from vllm import LLM, SamplingParams

# Lengths of the prompts, tokens to generate, and the step before which a request comes.
REQUESTS = [(1, 9, 0), (40, 6, 0), (7, 8, 2), (90, 5, 3), (16, 7, 5), (3, 9, 5)]
ABORTED = 2  # of these, before step 6


def prompt(number, length):
    return {"prompt_token_ids": [(37 * i * (number + 2) + 11) % 4000 + 100 for i in range(length)]}


def serve(engine):
    """The tokens of each request that is not aborted."""
    tokens, step = {}, 0
    while step < 6 or engine.has_unfinished_requests():
        for number, (length, new, arrives) in enumerate(REQUESTS):
            if arrives == step:
                params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
                engine.add_request(str(number), prompt(number, length), params)
        if step == 6:
            engine.abort_request([str(ABORTED)])
        for output in engine.step():
            if output.finished:
                tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
    return tokens


def results(arguments):
    llm = LLM(
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        max_num_batched_tokens=256,
        skip_tokenizer_init=True,
        **arguments,
    )
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    model = executor.driver_worker.worker.model_runner.get_model()
    rotation = model.model.layers[0].self_attn.rotary_emb
    kept, forwards = [], []

    def before(module, given):
        kept.append([x.clone() for x in given])

    def after(module, given, rotated):
        kept[-1] += [x.clone() for x in rotated]

    if arguments.get("enforce_eager"):  # a compiled model does not call the module
        rotation.register_forward_pre_hook(before)
        rotation.register_forward_hook(after)
        model.register_forward_hook(lambda *_: forwards.append(1))
    with torch.profiler.profile() as profile:
        tokens = serve(llm.llm_engine)
    names = [event.key for event in profile.key_averages() for _ in range(event.count)]
    table = getattr(rotation, "float32_table", rotation.cos_sin_cache)
    return {
        "tokens": tokens,
        "calls": sum(name.startswith("rope::") for name in names),
        "own_calls": sum(name.startswith("_C::rotary_embedding") for name in names),
        "forwards": len(forwards),
        "layers": len(model.model.layers),
        "class": type(rotation).__name__,
        "table": table.clone(),
        "rotated": kept[:1] + kept[-1:],
    }


if __name__ == "__main__":
    jobs, path = sys.argv[1:]
    torch.save({name: results(arguments) for name, arguments in json.loads(jobs)}, path)
