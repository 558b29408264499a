"""Times PyTorch's scaled_dot_product_attention (FlashAttention-2 and cuDNN) on the shapes of attention_bench.cu."""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from convert import die, one_sentence, say

sys.excepthook = one_sentence
parser = argparse.ArgumentParser(description=__doc__)
parser.error = lambda sentence: parser.exit(2, f"attention_bench.py: {sentence}; --help says more\n")
parser.parse_args()  # before the package: --help does not need it

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


def median_ms(f, repeats):
    for n in range(3):
        f(n)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for n in range(repeats):
        f(n)
        events[n + 1].record()
    torch.cuda.synchronize()
    return sorted(events[n].elapsed_time(events[n + 1]) for n in range(repeats))[repeats // 2]


if not torch.cuda.is_available():
    die("no NVIDIA GPU answers")
say(f"PyTorch {torch.__version__} {torch.cuda.get_device_name()}")
SHAPES = [(64, 1024, 12, 64), (16, 4096, 12, 64), (4, 16384, 12, 64), (1, 65536, 12, 64), (64, 1024, 24, 32),
          (64, 1024, 6, 128)]
for B, T, NH, HS in SHAPES:
    repeats = 30 if T < 16384 else 5
    for name, backend in [("flash", SDPBackend.FLASH_ATTENTION), ("cuDNN", SDPBackend.CUDNN_ATTENTION)]:
        kind = dict(device="cuda", dtype=torch.bfloat16)
        try:
            sets = [[torch.randn(B, NH, T, HS, **kind, requires_grad=True) for _ in range(3)] for _ in range(2)]
            dout = torch.randn(B, NH, T, HS, **kind)
            with sdpa_kernel(backend):
                attention = torch.nn.functional.scaled_dot_product_attention
                with torch.no_grad():
                    forward = median_ms(lambda n: attention(*sets[n % 2], is_causal=True), repeats)
                outs = [attention(*s, is_causal=True) for s in sets]
                backward = median_ms(
                    lambda n: torch.autograd.grad(outs[n % 2], sets[n % 2], dout, retain_graph=True), repeats)
            product = B * T * NH * HS * (T + 1)
            say(f"{name} {B:3d} x {T}, {NH:2d} heads of {HS:3d}: "
                f"forward {forward:.3f} ms {2e-9 * product / forward:.0f} TFLOP/s, "
                f"backward {backward:.3f} ms {5e-9 * product / backward:.0f} TFLOP/s, "
                f"both {forward + backward:.3f} ms")
        except RuntimeError as error:
            say(f"{name} {B} {T} {NH} {HS} not available: {str(error).splitlines()[0]}")
