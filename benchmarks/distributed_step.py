"""Training steps of a small Llama on several processes, with and without rope_ext.

    torchrun --nproc-per-node 4 benchmarks/distributed_step.py
    torchrun --nproc-per-node 4 benchmarks/distributed_step.py --parallel context --length 2048

--parallel tensor   weights and heads are sharded; q and k are rotated as DTensors
--parallel context  the sequence is sharded (zig-zag): a rank rotates its tokens, and gathers keys
                    and values
--parallel data     FSDP2: the batch and the parameters are sharded

NCCL on CUDA, else gloo. Both models have the same initial weights, see the same tokens and take
turns; their losses have to agree. Times are medians over the slowest rank.
"""

import argparse
import os
import statistics
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu
from tqdm import tqdm

import rope_ext

VOCABULARY = 256
# Losses are about log(256) = 5.5. Both rotations round alike in float32, so the two models differ
# only by the order of sums, by some ulp a step.
AGREE = {"rtol": 1e-4, "atol": 0.0}


def rotated_plainly(q, k, cos, sin):
    """Rotates as transformers does; cos and sin [1, S, P]."""
    cos, sin = (torch.cat((t, t), dim=-1).unsqueeze(2) for t in (cos, sin))

    def rotated(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotated(q), rotated(k)


class Layer(nn.Module):
    def __init__(self, dim, heads, head_dim, rotate):
        super().__init__()
        self.head_dim, self.rotate = head_dim, rotate
        self.norm1, self.norm2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.wq, self.wk, self.wv = (
            nn.Linear(dim, n * head_dim, bias=False) for n in (heads, heads // 2, heads // 2)
        )
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.gate, self.up = (nn.Linear(dim, 2 * dim, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x, cos, sin, attend):
        y = self.norm1(x)
        q, k, v = (w(y).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = self.rotate(q, k, cos, sin)
        q, k, v = (t.to_local() if isinstance(t, DTensor) else t for t in (q, k, v))
        x = x + self.wo(attend(q, k, v).flatten(2))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


class Llama(nn.Module):
    def __init__(self, args, rotate):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, args.dim)
        self.layers = nn.ModuleList(
            Layer(args.dim, args.heads, args.dim // args.heads, rotate) for _ in range(args.layers)
        )
        self.norm = nn.RMSNorm(args.dim)
        self.head = nn.Linear(args.dim, VOCABULARY, bias=False)

    def forward(self, tokens, cos, sin, attend):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin, attend)
        return self.head(self.norm(x))


def attention(mesh, seen=None):
    """Causal attention of a rank's tokens; with `seen` [S / world, S], to those of all ranks."""

    def gathered(x):
        everywhere = DTensor.from_local(x, mesh, [Shard(1)]).redistribute(placements=[Replicate()])
        return everywhere.to_local(grad_placements=[Partial()])

    def attend(q, k, v):
        if seen is not None:
            k, v = gathered(k), gathered(v)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=seen is None, enable_gqa=True
        )
        return y.transpose(1, 2)

    return attend


def average(tensor):
    dist.all_reduce(tensor)
    tensor /= dist.get_world_size()


def build(args, rotate, mesh, device):
    """The model, the rank's tokens and the work after the backward: (loss, after_backward)."""
    world, rank = mesh.size(), mesh.get_local_rank()
    torch.manual_seed(0)
    model = Llama(args, rotate).to(device)
    tokens = torch.randint(0, VOCABULARY, (args.batch, args.length + 1), device=device)
    tokens, targets = tokens[:, :-1], tokens[:, 1:]
    position_ids, seen, reduce = torch.arange(args.length, device=device), None, ()
    if args.parallel == "context":
        parts = [
            rope_ext.positions.context_parallel(args.length, world, r, device=device)
            for r in range(world)
        ]
        position_ids = parts[rank]
        tokens, targets = tokens[:, position_ids], targets[:, position_ids]
        seen = position_ids[:, None] >= torch.cat(parts)
        reduce = tuple(model.parameters())
    elif args.parallel == "data":
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        tokens, targets = tokens.chunk(world)[rank], targets.chunk(world)[rank]
    elif args.parallel == "tensor":
        plan = {name: ColwiseParallel(use_local_output=False) for name in ("wq", "wk", "wv")}
        plan |= {"gate": ColwiseParallel(), "up": ColwiseParallel()}
        plan |= {"wo": RowwiseParallel(), "down": RowwiseParallel()}
        for layer in model.layers:
            parallelize_module(layer, mesh, plan)
    inv_freq, _ = rope_ext.frequencies.default(args.dim // args.heads, device=device)
    cos, sin = rope_ext.cos_sin(inv_freq, position_ids[None])
    if args.parallel == "tensor":
        cos, sin = (DTensor.from_local(t, mesh, [Replicate()]) for t in (cos, sin))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attend = attention(mesh, seen)

    def step():
        loss = cross_entropy(model(tokens, cos, sin, attend).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        for parameter in reduce:
            average(parameter.grad)
        optimizer.step()
        return loss.detach()

    return step


def timed(step, device):
    """Seconds of a step, and its loss, averaged over ranks."""
    dist.barrier()
    begin = time.perf_counter()
    loss = step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    average(loss)
    return seconds, loss.item()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parallel", choices=("tensor", "context", "data"), default="tensor")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8, help="of q; half as many of k and v")
    args = parser.parse_args()

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rotations = {"plain PyTorch": rotated_plainly, "rope_ext": rope_ext.apply_rotary_qk}
    ways = {name: build(args, rotate, mesh, device) for name, rotate in rotations.items()}
    results = {name: [] for name in ways}
    for _ in tqdm(range(args.warm_up + args.steps), "steps", disable=dist.get_rank() != 0):
        for name, step in ways.items():
            results[name].append(timed(step, device))

    losses = {name: torch.tensor([loss for _, loss in result]) for name, result in results.items()}
    medians = torch.tensor(
        [statistics.median(t for t, _ in r[args.warm_up :]) for r in results.values()],
        device=device,
    )
    dist.all_reduce(medians, op=dist.ReduceOp.MAX)
    plain, ours = medians.tolist()
    expected, got = losses.values()
    if dist.get_rank() == 0:
        print(f"{mesh.size()} {device.type} processes, {args.parallel} parallel")
        for name, seconds in zip(ways, (plain, ours), strict=True):
            print(f"  {name:14} {1e3 * seconds:8.1f} ms a step")
        print(f"  {plain / ours:.2f} times as fast; loss {got[0]:.4f} -> {got[-1]:.4f}")
    torch.testing.assert_close(got, expected, **AGREE)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
