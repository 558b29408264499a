#!/usr/bin/env python3
"""Trains a model of train_gsa in plain PyTorch: the module of gsa.py in a GPT, over the batches that train_gsa draws
and with its update by AdamW, so that the losses are train_gsa's to rounding. A start for a loop of your own. Needs
numpy and torch.

    ./train_gsa --data SHARD.bin --tokenizer TOKENIZER --steps 1 --lr 0 --out begin ...
    dev/pytorch/train.py begin/model_00000001.bin SHARD.bin --steps 500 --lr 1e-3 --warmup 50 > losses.txt
    ./train_gsa --init-from begin/model_00000001.bin --optimizer adamw --data SHARD.bin --steps 500 --lr 1e-3 \\
        --warmup 50 --out run

START.bin is a decoder, SHARD.bin tokens from data/prepare. Prints the loss of every step, in nats a token; on a GPU
where there is one."""
import argparse
import math
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.dirname(HERE)]
import convert
from convert import number

sys.excepthook = convert.one_sentence
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = lambda sentence: parser.exit(2, f"train.py: {sentence}; --help says more\n")
parser.add_argument("start", metavar="START.bin")
parser.add_argument("shard", metavar="SHARD.bin")
parser.add_argument("--steps", type=number(int, 1), default=500, help="updates (500)")
parser.add_argument("--batch", type=number(int, 1), default=4, help="sequences of the model's length (4)")
parser.add_argument("--lr", type=number(float, 0, 10), default=1e-3, help="highest rate (0.001)")
parser.add_argument("--warmup", type=number(int, 0), default=50, help="steps until then (50)")
parser.add_argument("--seed", type=number(int, 0), default=1, help="of the order (1)")
parser.add_argument("--bf16", action="store_true", help="autocast, as train_gsacu computes")
parser.add_argument("--compile", action="store_true", help="torch.compile the model")
options = parser.parse_args()  # before the packages: --help needs none of them

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import gsa

BITS = (1 << 64) - 1


# ---- the order of the data, as in data/loader.c


def scramble(x):
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & BITS
    x = (x ^ x >> 27) * 0x94D049BB133111EB & BITS
    return x ^ x >> 31


def rng_mix(a, b):
    return scramble(scramble(a + 0x9E3779B97F4A7C15 & BITS) ^ (b * 0xD6E8FEB86659FD93 & BITS))


def permute(x, n, key):
    half = 1
    while half < 32 and 1 << 2 * half < n:
        half += 1
    mask = (1 << half) - 1
    while True:
        left, right = x >> half, x & mask
        for step in range(4):
            left, right = right, left ^ (rng_mix(key + step & BITS, right) & mask)
        x = left << half | right
        if x < n:
            return x


def read_shard(path, config):
    """the tokens of a file of data/prepare, for a model of this configuration"""
    data, T, V = convert.read_bytes(path), config["T"], config["V"]
    magic = int(convert.source("data/loader.h", r"SHARD_MAGIC = (\d+)")[0])
    if len(data) < 1024 or int.from_bytes(data[:4], "little") != magic:
        convert.die(f"{path} is not a shard of data/prepare")
    tokens = np.frombuffer(data, "<u2", (len(data) - 1024) // 2, 1024)
    if len(tokens) <= T:
        convert.die(f"{path} holds {len(tokens)} tokens, and a window of this model is {T} and one more")
    if tokens.max() >= V:
        convert.die(f"{path} holds token {tokens.max()}, and the model's vocabulary has {V}: another tokenizer's")
    return tokens


def windows(tokens, T, seed):
    """the windows of a shard, T + 1 tokens each, in the order in which train_gsa draws them"""
    count, epoch, last = (len(tokens) - 1) // T, 0, len(tokens) - 1 - T
    while True:
        key = rng_mix(seed, epoch)
        for w in range(count):
            start = min(permute(w, count, rng_mix(key, 0)) * T + rng_mix(key, 1) % (T if count > 1 else last + 1), last)
            yield tokens[start:start + T + 1].astype("<i8")
        epoch += 1


def learning_rate(step, steps, warmup, high):
    """--schedule cosine, down to a tenth"""
    if step < warmup:
        return high * (step + 1) / warmup
    return high * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


# ---- the model


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        C = c["n_embd"]
        own = {name: c[name] for name in ("attention", "extra_heads", "mixer", "envelope", "covariance", "splats",
                                          "window", "position", "gain", "rope", "phase", "forget", "sphere",
                                          "unbounded") if name in c}
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn = gsa.GaussianSplatAttention(C, c["n_head"], gsa_heads=c["gsa_heads"][layer], **own)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))[0]
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.wte, self.ln_f = nn.Embedding(c["vocab_size"], c["n_embd"]), nn.LayerNorm(c["n_embd"])
        self.wpe = nn.Embedding(c["n_positions"], c["n_embd"]) if c["position"] != "rope" else None
        self.h = nn.ModuleList(Block(c, layer) for layer in range(c["n_layer"]))

    def forward(self, tokens):
        x = self.wte(tokens)
        if self.wpe is not None:
            x = x + self.wpe.weight[:tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def main():
    config, heads, _, _, tensors = convert.read_model(options.start)
    c = convert.transformers_config(config, heads, config["V"], {})
    if c["objective"] != "lm":
        convert.die(f"{options.start} is an encoder; this loop predicts the next token")
    shard = read_shard(options.shard, config)
    named = convert.transformers_tensors(config, heads, tensors, config["V"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPT(c)
    model.load_state_dict({name.removeprefix("transformer."): torch.from_numpy(np.array(t))
                           for name, t in named.items()})
    model.to(device)
    call = torch.compile(model) if options.compile else model
    draw = windows(shard, config["T"], options.seed)
    groups = gsa.parameter_groups(model, options.lr)
    rates = [group["lr"] for group in groups]
    optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(options.steps):
        batch = torch.from_numpy(np.stack([next(draw) for _ in range(options.batch)])).to(device)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=options.bf16):
            logits = call(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        gsa.clip_gradients(model, 1.0)
        for group, rate in zip(optimiser.param_groups, rates):
            group["lr"] = learning_rate(step, options.steps, options.warmup, rate)
        optimiser.step()
        gsa.apply_bounds(model)
        convert.say(f"{float(loss.detach()):.9g}")


if __name__ == "__main__":
    main()
