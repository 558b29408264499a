#!/usr/bin/env python3
"""Compares our GPT-2 with that of transformers: logits of random models that come to us as a checkpoint of llm.c and
through dev/convert.py, and of our models that go there. Needs torch, transformers and safetensors (pip install), and
`make train_gsa build/release/dev/logits`.

    python3 dev/gpt2_compare.py

Prints the relative error of the logits, |ours - theirs| / |theirs|, theirs computed in double; exit status 1 where one
exceeds 1e-5."""
import argparse
import os
import subprocess
import sys
import tempfile

from convert import one_sentence, say

sys.excepthook = one_sentence
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = lambda sentence: parser.exit(2, f"gpt2_compare.py: {sentence}; --help says more\n")
parser.parse_args()  # before the packages: --help needs none of them

import numpy as np
import safetensors.numpy
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LIMIT = 1e-5
LLMC = ["wte.weight", "wpe.weight", "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias",
        "attn.c_proj.weight", "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias", "ln_f.weight", "ln_f.bias"]  # the order in llm.c's files
bad = 0


def run(*command, **more):
    command = [os.path.join(ROOT, command[0]), *command[1:]]
    return subprocess.run(command, check=True, capture_output=True, cwd=ROOT, **more).stdout


def convert(*arguments):
    command = [sys.executable, os.path.join(ROOT, "dev/convert.py"), *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def compare(what, model, path, tokens):
    global bad
    written = run("build/release/dev/logits", path, input=" ".join(map(str, tokens)).encode())
    ours = np.frombuffer(written, "<f4").reshape(len(tokens), -1)
    with torch.no_grad():
        theirs = model.double()(torch.tensor([tokens])).logits[0].numpy()
    model.float()
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    agree = (ours.argmax(1) == theirs.argmax(1)).mean()
    bad += not error <= LIMIT
    verdict = "" if error <= LIMIT else "   TOO LARGE"
    say(f"{what:<66} relative error {error:.2e}, same likeliest token {100 * agree:.1f} %{verdict}")


def write_llmc(model, path, version):
    """as llm.c's train_gpt2.py writes it: header, tensors stacked by layer, matrices as (out, in), vocabulary padded to
    128"""
    c, state = model.config, {k.removeprefix("transformer."): v for k, v in model.state_dict().items()}
    Vp = (c.vocab_size + 127) // 128 * 128
    header = np.zeros(256, "<i4")
    header[:8] = [20240326, version, c.n_positions, c.vocab_size, c.n_layer, c.n_head, c.n_embd, Vp]
    with open(path, "wb") as f:
        f.write(header.tobytes())
        for name in LLMC:
            of_layer = not name.startswith(("w", "ln_f"))
            parts = [state[f"h.{l}.{name}"] for l in range(c.n_layer)] if of_layer else [state[name]]
            if name == "wte.weight":
                parts.append(torch.zeros(Vp - c.vocab_size, c.n_embd))
            for p in parts:
                p = p.T.contiguous() if of_layer and p.dim() == 2 else p
                f.write((p.bfloat16().view(torch.int16) if version == 5 else p).numpy().tobytes())


transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
torch.manual_seed(1)
rng = np.random.default_rng(1)
with tempfile.TemporaryDirectory() as folder:
    for L, NH, C, T, V in ((2, 2, 32, 48, 211), (3, 4, 104, 64, 384), (12, 12, 768, 1024, 50257)):
        shape = f"{L} layers, {NH} heads, {C} channels"
        config = transformers.GPT2Config(n_layer=L, n_head=NH, n_embd=C, n_positions=T, vocab_size=V)
        model = transformers.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for p in model.parameters():  # far from the symmetric start: biases and gains too
                p += torch.randn_like(p) * (0.1 if C < 768 else 0.03)
        tokens = rng.integers(0, V, T).tolist()
        path, there, back = (os.path.join(folder, name) for name in ("llmc.bin", "hf", "model.bin"))
        write_llmc(model, path, 3)
        compare(f"llm.c's checkpoint, {shape}", model, path, tokens)
        model.save_pretrained(there)
        convert(there, back)
        compare(f"transformers' safetensors, {shape}", model, back, tokens)
        model.bfloat16().save_pretrained(there)
        model.float()
        convert(there, back)
        compare(f"transformers' safetensors in bf16, {shape}", model, back, tokens)
        write_llmc(model, path, 5)
        compare(f"llm.c's checkpoint in bf16, {shape}", model, path, tokens)

    there, again, out = (os.path.join(folder, name) for name in ("ours", "again.bin", "out"))
    flags = ("--layers 2 --heads 2 --channels 64 --seq 64 --batch 4 --vocab 500 --steps 100 --eval-every 0 "
             "--sample-every 0 --lr 3e-3").split()
    for kind in ("--attention standard --pos learned", "--attention hybrid", "--attention extend --covariance full",
                 "--objective mlm --attention augment --mixer linear"):
        run("train_gsa", *flags, *kind.split(), "--out", out)
        model = os.path.join(out, "model_00000100.bin")
        convert(model, there)
        convert(there, again)
        same = open(model, "rb").read() == open(again, "rb").read()
        bad += not same
        loaded = safetensors.numpy.load_file(os.path.join(there, "model.safetensors"))
        total = sum(t.size for t in loaded.values())
        say(f"{kind}: there and back {'the same bytes' if same else 'NOT THE SAME'}; "
            f"the safetensors package reads {len(loaded)} tensors, {total} numbers")
        if os.path.exists(os.path.join(there, "config.json")):
            theirs, info = transformers.GPT2LMHeadModel.from_pretrained(there, output_loading_info=True)
            bad += any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            compare("our model in transformers", theirs.eval(), model, rng.integers(0, 500, 64).tolist())
            os.remove(os.path.join(there, "config.json"))
        subprocess.run(["rm", "-r", out], check=True)
sys.exit(1 if bad else 0)
