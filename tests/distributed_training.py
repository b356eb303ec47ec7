"""A small Llama, trained on several ranks in each way that PyTorch has, and on one rank.

Each scenario returns the losses of all steps and the gradients of the first, as one rank computes
them. test_distributed.py runs the scenarios in separate processes, which do not need pytest.
"""

import datetime
import traceback

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import rope_ext

STEPS = 5
BATCH, LENGTH, VOCABULARY, LAYERS = 4, 16, 64, 2
DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 32, 64, 8, 4, 8
DTYPE = torch.float64


# ---- the model


def attention(q, k, v, **options):  # [B, S, H, D] each
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(*heads_first, **options, enable_gqa=True).transpose(1, 2)


def causal(q, k, v):
    return attention(q, k, v, is_causal=True)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.wq = nn.Linear(DIM, HEADS * HEAD_DIM, bias=False)
        self.wk = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wv = nn.Linear(DIM, KV_HEADS * HEAD_DIM, bias=False)
        self.wo = nn.Linear(HEADS * HEAD_DIM, DIM, bias=False)
        self.gate, self.up = (nn.Linear(DIM, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, DIM, bias=False)

    def forward(self, x, cos, sin, attend):
        y = self.norm1(x)
        q, k, v = (w(y).unflatten(-1, (-1, HEAD_DIM)) for w in (self.wq, self.wk, self.wv))
        q, k = rope_ext.apply_rotary_qk(q, k, cos, sin)  # DTensors, if the weights give them
        q, k, v = (t.to_local() if isinstance(t, DTensor) else t for t in (q, k, v))
        x = x + self.wo(attend(q, k, v).flatten(2))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    """With learned frequencies, so that their gradient is compared too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM)
        self.head = nn.Linear(DIM, VOCABULARY, bias=False)
        self.inv_freq = nn.Parameter(rope_ext.frequencies.default(HEAD_DIM)[0])

    def forward(self, tokens, position_ids, attend=causal):
        cos, sin = rope_ext.cos_sin(self.inv_freq, position_ids)  # once a step, for all layers
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.head(self.norm(x))


def made():
    torch.manual_seed(0)
    model = Llama().to(DTYPE)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    return model, tokens[:, :-1], tokens[:, 1:]


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, tokens, targets, position_ids, after_backward=lambda: None, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses, grads = [], {}
    for step in range(STEPS):
        logits = model(tokens, position_ids, **options)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        after_backward()
        if step == 0:
            grads = {name: whole(p.grad).clone() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(whole(loss.detach()).clone())
    return torch.stack(losses), grads


def average(tensor):
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


# ---- the scenarios


def one_process():
    return train(*made(), torch.arange(LENGTH)[None])


def with_tensor_parallel(model, mesh):
    """Heads and hidden channels are sharded; q and k are rotated as DTensors."""
    plan = {name: ColwiseParallel(use_local_output=False) for name in ("wq", "wk", "wv")}
    plan |= {"wo": RowwiseParallel(), "down": RowwiseParallel()}
    plan |= {"gate": ColwiseParallel(), "up": ColwiseParallel()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan)
    inv_freq = DTensor.from_local(model.inv_freq.detach(), mesh, [Replicate()])
    model.inv_freq = nn.Parameter(inv_freq)
    return DTensor.from_local(torch.arange(LENGTH)[None], mesh, [Replicate()])


def tensor_parallel():
    model, *batch = made()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return train(model, *batch, with_tensor_parallel(model, mesh))


def fully_sharded(mesh, model, tokens, targets, position_ids):
    """The batch is split along the mesh, and FSDP2 averages the gradients."""
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh)
    tokens, targets = (t.chunk(mesh.size())[mesh.get_local_rank()] for t in (tokens, targets))
    losses, grads = train(model, tokens, targets, position_ids)
    return average(losses), grads


def fsdp():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_sharded(mesh, *made(), torch.arange(LENGTH)[None])


def fsdp_and_tensor_parallel():
    model, *batch = made()
    mesh = init_device_mesh(
        "cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor")
    )
    return fully_sharded(mesh["data"], model, *batch, with_tensor_parallel(model, mesh["tensor"]))


def context_parallel():
    """Each rank has a part of the sequence, knows its positions, and gathers keys and values."""
    model, tokens, targets = made()
    world, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (world,))
    parts = [rope_ext.positions.context_parallel(LENGTH, world, r) for r in range(world)]
    mine, everyones = parts[rank], torch.cat(parts)
    seen = mine[:, None] >= everyones

    def gathered(x):  # from all ranks; each adds to the gradient
        everywhere = DTensor.from_local(x, mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        return everywhere.to_local(grad_placements=[Partial()])

    def attend(q, k, v):
        k, v = gathered(k), gathered(v)
        return attention(q, k, v, attn_mask=seen)

    def average_grads():
        for parameter in model.parameters():
            parameter.grad = average(parameter.grad)

    batch = tokens[:, mine], targets[:, mine], mine[None]
    losses, grads = train(model, *batch, after_backward=average_grads, attend=attend)
    return average(losses), grads


# The scenarios for each number of ranks: four ranks run those that two can't distinguish.
SCENARIOS = {
    2: (tensor_parallel, fsdp, context_parallel),
    4: (tensor_parallel, fsdp_and_tensor_parallel, context_parallel),
}


def run(rank, world, folder):
    """One rank of all scenarios; rank 0 saves name -> (losses, gradients), or the traceback."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    limit = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", store, rank=rank, world_size=world, timeout=limit)
    results = {}
    for scenario in SCENARIOS[world]:
        try:
            results[scenario.__name__] = scenario()
        except Exception:
            results[scenario.__name__] = traceback.format_exc()
        dist.barrier()
    if rank == 0:
        torch.save(results, f"{folder}/results")
    dist.destroy_process_group()
