#!/usr/bin/env python3
"""Turns heads of a standard model into heads of splats: a start for train_gsa --init-from. Needs numpy and torch.

    dev/pytorch/into_splats.py MODEL.bin OUT.bin SHARD.bin [--mixer softmax|linear] [--heads N] [--window W]

MODEL.bin is a decoder of --attention standard (a GPT-2 through dev/convert.py), SHARD.bin tokens that it was trained
on. In each layer the N heads (half of them) that attend nearest on these tokens become GSA heads. All others stay
exactly as they are: positions, gain, rotations; so do the queries, keys and values of those N. Their splats start at
the k-means of their keys and are fitted for --steps steps to the weights of the old head: least mean Kullback-Leibler
divergence of the new weights from the old, under the model's own bounds, one layer after the other, each on what the
old model hands it.

With --window W the heads that stay see W tokens from then on (with --mixer linear: a model of linear cost).

Prints for each layer the heads, their mean distance, and the divergence before and after. Then
    train_gsa --init-from OUT.bin --data ... --steps ..."""
import argparse
import math
import os
import struct
import sys

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = lambda sentence: parser.exit(2, f"into_splats.py: {sentence}; --help says more\n")
parser.add_argument("model", help="a model file of --attention standard")
parser.add_argument("out", help="the model file to write")
parser.add_argument("shard", help="tokens, from data/prepare")
parser.add_argument("--mixer", choices=["softmax", "linear"], default="softmax", help="of the new heads (softmax)")
parser.add_argument("--heads", type=int, metavar="N", help="heads of each layer that get splats (half of them)")
parser.add_argument("--splats", type=int, metavar="S", help="of a head (as train_gsa: half the head size, or 16)")
parser.add_argument("--window", type=int, default=0, metavar="W", help="of the heads that stay; 0: as they were")
parser.add_argument("--steps", type=int, default=300, help="of the fit, in each layer (300); 0: k-means alone")
parser.add_argument("--tokens", type=int, default=16384, help="of the shard, that all is done with (16384)")
parser.add_argument("--lr", type=float, default=0.01, help="Adam's rate in the fit (0.01)")
parser.add_argument("--seed", type=int, default=1)
options = parser.parse_args()  # before the packages: --help needs none of them

import numpy as np
import torch
import torch.nn.functional as F

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import convert
from gsa import GaussianSplatAttention, apply_bounds, unit_vectors

SOFTER = 0.1  # the amplitudes' start, times what gives logits of random vectors a deviation of 1
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def die(sentence):
    sys.exit(f"into_splats.py: {sentence}")


def read_shard(path, V):
    data = convert.read_bytes(path)
    magic, _, count = struct.unpack_from("<3i", data) if len(data) >= 1024 else (0, 0, 0)
    if magic != 20240520 or len(data) != 1024 + 2 * count:
        die(f"{path} is not a shard of data/prepare, or damaged")
    tokens = np.frombuffer(data, "<u2", offset=1024)
    if count and tokens.max() >= V:
        die(f"{path} holds the token {tokens.max()}, and the model's vocabulary has {V}")
    return tokens


def module_of(config, layer, tensors):
    """the attention of one layer with its tensors"""
    m = GaussianSplatAttention(
        config["n_embd"], config["n_head"], gsa_heads=config["gsa_heads"][layer], layers=config["n_layer"],
        **{name: config[name] for name in ("attention", "mixer", "envelope", "covariance", "splats", "window",
                                           "position", "gain", "rope", "phase") if name in config})
    prefix = f"transformer.h.{layer}.attn."
    m.load_state_dict({name.removeprefix(prefix): torch.from_numpy(np.array(t)) for name, t in tensors.items()
                       if name.startswith(prefix)}, strict=False)
    return m.to(DEVICE)


class Trunk:
    """the rest of the network, as functions of the tensors"""

    def __init__(self, tensors):
        self.p = {name.removeprefix("transformer."): torch.from_numpy(np.array(t)).to(DEVICE)
                  for name, t in tensors.items()}

    def norm(self, x, name):
        return F.layer_norm(x, x.shape[-1:], self.p[name + ".weight"], self.p[name + ".bias"])

    def embed(self, tokens):
        x = self.p["wte.weight"][tokens]
        return x + self.p["wpe.weight"][:tokens.shape[1]] if "wpe.weight" in self.p else x

    def mlp(self, x, l):
        h = F.linear(self.norm(x, f"h.{l}.ln_2"), self.p[f"h.{l}.mlp.c_fc.weight"], self.p[f"h.{l}.mlp.c_fc.bias"])
        h = F.gelu(h, approximate="tanh")
        return F.linear(h, self.p[f"h.{l}.mlp.c_proj.weight"], self.p[f"h.{l}.mlp.c_proj.bias"])


def k_means(x, S, generator, rounds=25):
    """centres (S, d) of x (n, d), begun at points that lie far from those before"""
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < S:
        near = torch.cdist(x, centres).amin(1).square().double().cpu()
        centres = torch.cat([centres, x[torch.multinomial(near / near.sum(), 1, generator=generator)]])
    for _ in range(rounds):
        owner = torch.cdist(x, centres).argmin(1)
        count = torch.bincount(owner, minlength=S).unsqueeze(1)
        sums = torch.zeros_like(centres).index_add(0, owner, x)
        centres = torch.where(count > 0, sums / count.clamp_min(1), centres)
    return centres


def divergence(old, new):
    """mean over queries of sum_j old ln(old / new), in nats; (B, H, T, T) both"""
    return (torch.special.xlogy(old, old) - torch.special.xlogy(old, new.clamp_min(1e-12))).sum(-1).mean()


def fit(new, heads, inputs, old, generator):
    """Adam on the splats of the new module until its weights are those of the old one's heads"""
    for name, p in new.named_parameters():
        p.requires_grad_(name.partition(".")[0] not in ("c_attn", "c_proj", "log_gain", "log_rope"))
    optimiser = torch.optim.Adam([p for p in new.parameters() if p.requires_grad], lr=options.lr)

    def loss_of(batch):
        return divergence(old[batch], new(inputs[batch], output_attentions=True)[1][:, heads])

    with torch.no_grad():
        before = float(loss_of(slice(0, 4)))
    for step in range(options.steps):
        for group in optimiser.param_groups:
            group["lr"] = options.lr * min(1, 2 * (1 - step / options.steps))
        loss = loss_of(torch.randint(len(inputs), (2,), generator=generator))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        apply_bounds(new)
    with torch.no_grad():
        return before, float(loss_of(slice(0, 4)))


def new_config(old, config):
    """that of the hybrid, without its heads"""
    d = old["n_embd"] // old["n_head"]
    linear = options.mixer == "linear"
    return old | {"attention": "hybrid", "mixer": options.mixer, "envelope": "raised" if linear else "cosine",
                  "covariance": "iso", "splats": options.splats or (16 if linear else d // 2),
                  "window": options.window or old["window"], "gsa_heads": []}


def layer_of_splats(config, layer, tensors, old, h, weights, generator):
    """the new module of a layer and what became of it"""
    T, N = h.shape[1], options.heads if options.heads is not None else (config["n_head"] + 1) // 2
    apart = (torch.arange(T)[:, None] - torch.arange(T)).clamp_min(0).to(DEVICE)
    distance = (weights * apart).sum(-1).mean((0, 2)).tolist()
    heads = sorted(sorted(range(len(distance)), key=distance.__getitem__)[:N])
    config["gsa_heads"].append(heads)
    kept = [i for i, head in enumerate(old.rope_heads) if head not in heads]
    prefix = f"transformer.h.{layer}.attn."
    own = {name: t[kept] if name in (prefix + "log_gain", prefix + "log_rope") else t for name, t in tensors.items()}
    torch.manual_seed(options.seed + layer)
    new = module_of(config, layer, own)
    if not heads:
        return new
    B, _, C = h.shape
    d = C // config["n_head"]
    with torch.no_grad():
        keys = F.linear(h, old.c_attn.weight, old.c_attn.bias).view(B, T, 3, -1, d)[:, :, 1].reshape(B * T, -1, d)
        for g, head in enumerate(heads):
            new.mu[g] = k_means(unit_vectors(keys[:, head]), new.splats, generator)
        if new.mixer == "softmax":  # k-means' splats answer more than random ones: begin with softer attention
            new.log_alpha += math.log(SOFTER)
            new.log_alpha_reference += math.log(SOFTER)
    before, after = fit(new, heads, h, weights[:, heads], generator)
    print(f"layer {layer}: heads {heads} of mean distance {', '.join(f'{distance[i]:.1f}' for i in heads)} (others "
          f"{', '.join(f'{x:.1f}' for i, x in enumerate(distance) if i not in heads) or 'none'}); divergence "
          f"{before:.3f}, fitted {after:.3f}", flush=True)
    return new


def main():
    config, masks, step, directory, tensors = convert.read_model(options.model)
    theirs = convert.transformers_config(config, masks, config["V"], {})
    if theirs["attention"] != "standard" or theirs["objective"] != "lm":
        die(f"{options.model} is of --attention {theirs['attention']}, --objective {theirs['objective']}; only "
            "standard decoders are turned into splats")
    if theirs.get("forget", "none") != "none":
        die(f"{options.model} has forget gates, which belong to heads that may have to go; train it without them")
    if options.heads is not None and not 1 <= options.heads <= config["NH"]:
        die(f"--heads {options.heads}: a layer has {config['NH']}")
    T, generator = config["T"], torch.Generator().manual_seed(options.seed)
    shard = read_shard(options.shard, config["V"])
    count = min(len(shard), options.tokens) // T
    if count < 1:
        die(f"{options.shard}: {min(len(shard), options.tokens)} tokens are less than one window of {T}")
    starts = torch.linspace(0, len(shard) - T, count).long().tolist()  # from all over the shard
    tokens = torch.from_numpy(np.stack([shard[at:at + T] for at in starts]).astype("<i8")).to(DEVICE)
    named = convert.transformers_tensors(config, masks, tensors, config["V"])
    trunk, result = Trunk(named), new_config(theirs, config)
    out = {name: t for name, t in named.items() if ".attn." not in name}
    x = trunk.embed(tokens)
    for layer in range(config["L"]):
        old, h = module_of(theirs, layer, named), trunk.norm(x, f"h.{layer}.ln_1")
        with torch.no_grad():
            parts = [old(part, output_attentions=True)[:2] for part in h.split(4)]
        attended, weights = (torch.cat(part) for part in zip(*parts))
        new = layer_of_splats(result, layer, named, old, h, weights, generator)
        out |= {f"transformer.h.{layer}.attn.{name}": t.cpu().numpy() for name, t in new.state_dict().items()}
        x = x + attended
        x = x + trunk.mlp(x, layer)
    convert.from_transformers(options.out, result, out, tensors.get("tokenizer"))
    print(f"{options.out}: {options.mixer} heads {result['gsa_heads']}")


if __name__ == "__main__":
    main()
