"""Tokens a second of PyTorch on the same training step as train_gsacu: a GPT-2, 124M unless a shape is given, with
torch.compile, fused attention and bf16.

    python3 dev/pytorch_bench.py [--layers 12] [--heads 12] [--channels 768] [--vocab 50304] [--batch 64] [--seq 1024]
                                 [--mode default|reduce-overhead|max-autotune] [--steps 20]

The model is GPT-2's as train_gsa.c has it with --attention standard --pos learned: learned positions, biases, GELU in
its tanh form, tied classifier of --vocab rows, layernorms of epsilon 1e-5. The step is the one a user would write:
autocast to bf16, fp32 weights, fused AdamW, gradient clipping at 1."""

import argparse
import sys
import time

from convert import die, number, one_sentence, say

sys.excepthook = one_sentence

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = lambda sentence: parser.exit(2, f"pytorch_bench.py: {sentence}; --help says more\n")
parser.add_argument("--batch", type=number(int, 1), default=64)
parser.add_argument("--seq", type=number(int, 1), default=1024)
parser.add_argument("--layers", type=number(int, 1), default=12)
parser.add_argument("--heads", type=number(int, 1), default=12)
parser.add_argument("--channels", type=number(int, 1), default=768)
parser.add_argument("--vocab", type=number(int, 1), default=50304)
modes = ["default", "reduce-overhead", "max-autotune"]
parser.add_argument("--mode", choices=modes, default="default", help="of torch.compile")
parser.add_argument("--steps", type=number(int, 1), default=20)
args = parser.parse_args()  # before the package: --help does not need it
if args.channels % args.heads:
    parser.error(f"--channels {args.channels} is not a multiple of --heads {args.heads}")

import torch
import torch.nn as nn
import torch.nn.functional as F

V, L, NH, C = args.vocab, args.layers, args.heads, args.channels


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.qkv, self.attproj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.fc, self.fcproj = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, NH, C // NH).transpose(1, 2) for t in self.qkv(self.ln1(x)).split(C, dim=2))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attproj(o.transpose(1, 2).reshape(B, T, C))
        return x + self.fcproj(F.gelu(self.fc(self.ln2(x)), approximate="tanh"))


class GPT(nn.Module):
    def __init__(self, T):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(V, C), nn.Embedding(T, C)
        self.blocks, self.lnf = nn.ModuleList(Block() for _ in range(L)), nn.LayerNorm(C)
        self.head = nn.Linear(C, V, bias=False)
        self.head.weight = self.wte.weight
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)

    def forward(self, x, y):
        h = self.wte(x) + self.wpe(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return F.cross_entropy(self.head(self.lnf(h)).view(-1, V), y.view(-1))


def main():
    if not torch.cuda.is_available():
        die("no NVIDIA GPU answers")
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    model = GPT(args.seq).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled = torch.compile(model, mode=args.mode)
    x = torch.randint(0, V, (args.batch, args.seq), device="cuda")
    y = torch.randint(0, V, (args.batch, args.seq), device="cuda")

    def step():
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = compiled(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    for _ in range(5):
        loss = step()
    torch.cuda.synchronize()
    times = []
    for _ in range(args.steps):
        began = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    median = sorted(times)[len(times) // 2]
    tokens = args.batch * args.seq
    say(f"PyTorch {torch.__version__}, torch.compile ({args.mode}), {torch.cuda.get_device_name()}: "
        f"{1e3 * median:.2f} ms a step, {tokens / median:.0f} tokens/s, loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
