#!/usr/bin/env python3
"""Models between our format and safetensors with GPT-2's tensor names, bit for bit in both directions. Needs numpy.

    dev/convert.py model_00001000.bin FOLDER    writes FOLDER/model.safetensors and FOLDER/tokenizer.bin, and
                                                FOLDER/config.json where the model is a plain GPT-2, so that
                                                transformers' from_pretrained(FOLDER) takes it
        --hf                                    every kind of model for transformers: besides, tokenizer.json and the
                                                model's code, so that AutoModelForCausalLM (encoders:
                                                AutoModelForMaskedLM) and AutoTokenizer take it by
                                                from_pretrained(FOLDER, trust_remote_code=True); in fp32
    dev/convert.py FOLDER model.bin             FOLDER as above, also after save_pretrained; or with a GPT-2 from
                                                elsewhere: model.safetensors and config.json
        --tokenizer FILE                        for a FOLDER without tokenizer.bin; without either the model holds none,
                                                and infer needs --tokenizer

Matrices are transposed (GPT-2 keeps them as (in, out)), layers are tensors of their own (h.0.attn.c_attn.weight), the
padding of the vocabulary is left out. What GPT-2 lacks keeps the name of gsa/model.h: gsa.mu, gsa.log_precision and so
on, with one line per GSA head. Configuration, step and directory stand in the file's metadata, so that every kind of
model comes back as it was. With --hf a layer's tensors are those of dev/pytorch/gsa.py, and what is left out is the
record of the splats' birth and death. Models and folders with the names of splats' tensors that were used before (lnp,
gsa.lnp) are read too; what is written has today's."""
import argparse
import json
import math
import os
import re
import struct
import subprocess
import sys

try:
    import numpy as np
except ImportError:
    np = None  # --help does without it


def source(path, pattern):
    """what the C sources say, so that it stands in one place"""
    with open(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", path), encoding="utf-8") as f:
        return re.findall(pattern, f.read(), re.M)


MAGIC, TOKENIZER_MAGIC, ALIGN = 20261123, 20240328, 64
VERSION, OLDEST = (int(source("gsa/checkpoint.c", rf"\b{name} = (\d+)")[0]) for name in ("VERSION", "OLDEST"))
FIELDS = source("gsa/model.h", r'^ +X\((\w+), "')  # CONFIG_FIELDS, in the order of a file's header
TENSORS = source("gsa/model.h", r'^ +X\((\w+), (?!")')  # PARAMETERS and SPLAT_TENSORS
CHOICES = {name.lower(): words.split("|") for name, words in
           source("gsa/model.h", r'^#define (\w+)_CHOICES "(.+)"')}  # words of a field's values
FP32, BYTES, I64, BF16 = 0, 1, 2, 3  # types of entries
DTYPES = {FP32: "<f4", I64: "<i8", BF16: "<u2"}  # bf16: the upper halves of fp32, as they are
SIZES = {FP32: 4, BYTES: 1, I64: 8, BF16: 2}
ENTRY = struct.Struct("<64sii4qqq")

# ours, GPT-2's within a layer, transposed
LAYER = [("ln1w", "ln_1.weight", False), ("ln1b", "ln_1.bias", False),
         ("qkvw", "attn.c_attn.weight", True), ("qkvb", "attn.c_attn.bias", False),
         ("attprojw", "attn.c_proj.weight", True), ("attprojb", "attn.c_proj.bias", False),
         ("ln2w", "ln_2.weight", False), ("ln2b", "ln_2.bias", False),
         ("fcw", "mlp.c_fc.weight", True), ("fcb", "mlp.c_fc.bias", False),
         ("fcprojw", "mlp.c_proj.weight", True), ("fcprojb", "mlp.c_proj.bias", False)]
WHOLE = {"wte": "wte.weight", "wpe": "wpe.weight", "lnfw": "ln_f.weight", "lnfb": "ln_f.bias"}
OF_LAYER = {ours: (theirs, transposed) for ours, theirs, transposed in LAYER}
# what splats' tensors were called before
OLD = {"lnp": "log_precision", "lnalpha": "log_alpha", "lnalpha0": "log_alpha_reference", "lntheta": "log_theta",
       "lndelta": "log_delta", "lng": "log_far"}


def current(name):
    """a tensor's name as it is today, with its prefix (gsa.) if it has one"""
    prefix, dot, bare = name.rpartition(".")
    return prefix + dot + OLD.get(bare, bare)


def die(sentence):
    sys.exit(f"{os.path.basename(sys.argv[0])}: {sentence}")


def say(line):
    """A line on standard output, now; dies where that cannot be done."""
    try:
        print(line, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or it would be tried again at the end
        die(f"cannot write standard output: {error.strerror}")


def one_sentence(kind, error, trace):
    """sys.excepthook of the scripts beside this one: what whoever started them can mend is a sentence."""
    if issubclass(kind, KeyboardInterrupt):
        sentence = "interrupted"
    elif issubclass(kind, ModuleNotFoundError) and error.name and "." not in error.name:
        sentence = f"the Python package {error.name} is missing: pip install {error.name}"
    elif issubclass(kind, OSError):
        sentence = f"cannot use {error.filename}: {error.strerror}" if error.filename else str(error)
    elif issubclass(kind, subprocess.CalledProcessError):
        said = (error.stderr or b"").decode(errors="replace").strip().split("\n")[-1]
        sentence = f"{' '.join(error.cmd)} failed: {said or 'see above'}"
    else:
        return sys.__excepthook__(kind, error, trace)
    print(f"{os.path.basename(sys.argv[0])}: {sentence}", file=sys.stderr)


def number(kind, low, high=math.inf):
    """argparse's type of numbers within bounds; kind: int or float"""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            what, most = "whole number" if kind is int else "number", "on" if high == math.inf else f"to {high}"
            raise argparse.ArgumentTypeError(f"'{text}' is not a {what} from {low} {most}")
        return value
    return read


def write_file(path, *pieces):
    try:
        with open(path + ".tmp", "wb") as f:
            for piece in pieces:
                f.write(piece)
        os.replace(path + ".tmp", path)
    except OSError as error:
        if os.path.isfile(path + ".tmp"):
            os.remove(path + ".tmp")
        die(f"cannot write {path}: {error.strerror}")


def read_bytes(path):
    try:
        with open(path, "rb") as f:
            return f.read()
    except OSError as error:
        die(f"cannot read {path}: {error.strerror}")


# ---- our format (gsa/checkpoint.h)


def read_model(path):
    """(configuration, masks of GSA heads, step, [(name, type, shape)], {name: array or bytes})"""
    data = read_bytes(path)
    header = struct.unpack_from("<256i", data) if len(data) >= 1024 else [0]
    if header[0] != MAGIC:
        die(f"{path} is not a model file of gsa.c")
    if not OLDEST <= header[1] <= VERSION or header[2] != 1:
        die(f"{path} is of version {header[1]}, kind {header[2]}; only model files of versions "
            f"{OLDEST} to {VERSION} are known")
    if struct.unpack_from("<q", data, 16)[0] != len(data) or 1024 + header[3] * ENTRY.size > len(data):
        die(f"{path} is truncated or damaged")
    config = dict(zip(FIELDS, header[16:]))
    heads = list(struct.unpack_from("<64Q", data, 512))
    directory, tensors = [], {}
    for i in range(header[3]):
        name, kind, dimensions, *shape, offset, count = ENTRY.unpack_from(data, 1024 + i * ENTRY.size)
        name, shape = current(name.split(b"\0")[0].decode("ascii", "replace")), shape[:dimensions]
        if kind not in SIZES:
            die(f"{path}: tensor {name} is neither fp32 nor bf16; convert the model that it was quantized from")
        inside = offset >= 0 and count >= 0 and offset + count <= len(data)
        if not inside or count != int(np.prod(shape, dtype=object)) * SIZES[kind]:
            die(f"{path} is damaged: entry {i} of its directory is not sound")
        directory.append((name, kind, shape))
        raw = data[offset:offset + count]
        tensors[name] = raw if kind == BYTES else np.frombuffer(raw, DTYPES[kind]).reshape(shape)
    return config, heads, header[6], directory, tensors


def write_model(path, config, heads, step, directory, tensors):
    at, entries, places = 1024 + len(directory) * ENTRY.size, b"", []
    for name, kind, shape in directory:
        at = (at + ALIGN - 1) // ALIGN * ALIGN
        count = int(np.prod(shape, dtype=object)) * SIZES[kind]
        entries += ENTRY.pack(name.encode(), kind, len(shape), *(list(shape) + [0] * (4 - len(shape))), at, count)
        places.append((at, name, count))
        at += count
    header = np.zeros(256, "<i4")
    header[:4], header[6] = [MAGIC, VERSION, 1, len(directory)], step
    header[4:6] = np.frombuffer(struct.pack("<q", at), "<i4")
    header[16:16 + len(FIELDS)] = [config.get(f, 0) for f in FIELDS]
    header[128:256] = np.frombuffer(struct.pack("<64Q", *heads), "<i4")
    pieces, written = [header.tobytes(), entries], 1024 + len(entries)
    for at, name, count in places:
        data = tensors[name] if isinstance(tensors[name], bytes) else np.ascontiguousarray(tensors[name]).tobytes()
        if len(data) != count:
            die(f"tensor {name} has {len(data)} bytes, not {count}")
        pieces += [bytes(at - written), data]
        written = at + count
    write_file(path, *pieces)


# ---- safetensors: the header's length in 8 bytes, a JSON header, raw numbers


def read_safetensors(path):
    """({name: array}, metadata); bf16 as uint16, fp16 as fp32, which holds it exactly"""
    data = read_bytes(path)
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    try:
        header = json.loads(data[8:8 + length]) if 0 < length <= len(data) - 8 else None
        metadata = header.pop("__metadata__", {})
        tensors = {}
        for name, t in header.items():
            begin, end = t["data_offsets"]
            raw, kind = data[8 + length + begin:8 + length + end], t["dtype"]
            if not 0 <= begin <= end <= len(data) - 8 - length:
                raise ValueError
            if re.search(r"\.attn\.(masked_)?bias$", name):
                continue  # GPT-2's masks, of several types
            if kind not in ("F32", "F16", "BF16", "I64"):
                die(f"{path}: tensor {name} is {kind}; only F32, F16, BF16 and I64 are read")
            array = np.frombuffer(raw, {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8"}[kind])
            tensors[name] = (array.astype("<f4") if kind == "F16" else array).reshape(t["shape"])
        return tensors, metadata
    except (ValueError, KeyError, TypeError, AttributeError):
        die(f"{path} is not a safetensors file, or damaged")


def write_safetensors(path, tensors, metadata):
    header, at = {"__metadata__": metadata}, 0
    for name, array in tensors.items():
        kind = {"<f4": "F32", "<i8": "I64", "<u2": "BF16"}[array.dtype.str]
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_file(path, struct.pack("<Q", len(text)), text, *(np.ascontiguousarray(a).tobytes() for a in tensors.values()))


# ---- from one to the other


def is_plain(config):
    """a GPT-2, as transformers knows it: nothing but its shape is set"""
    return not any(config[field] for field in FIELDS if field not in ("T", "V", "Vp", "L", "NH", "C"))


def make_folder(folder):
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        die(f"cannot make the folder {folder}: {error.strerror}")


def write_gpt2_config(folder, config, **more):
    text = json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
                       "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
                       "n_layer": config["L"], "n_head": config["NH"], "n_embd": config["C"],
                       "n_positions": config["T"], "n_ctx": config["T"], "vocab_size": config["V"],
                       "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0} | more, indent=2)
    write_file(os.path.join(folder, "config.json"), text.encode() + b"\n")


def to_safetensors(path, folder, hf, tokenizer):
    config, heads, step, directory, tensors = read_model(path)
    if hf and tokenizer and "tokenizer" not in tensors:
        tensors["tokenizer"] = read_bytes(tokenizer)
    V, out = config["V"], {}
    for name, kind, shape in directory:
        t = tensors[name]
        if kind == BYTES or t.size == 0:
            continue
        if name == "wte":
            out[WHOLE[name]] = t[:V, :, 0]
            if t[V:].tobytes().strip(b"\0"):  # an encoder may keep its [MASK] there
                out["gsa.wte_padding"] = t[V:, :, 0]
        elif name in WHOLE:
            out[WHOLE[name]] = t.reshape([n for n in shape if n != 1] if name != "wpe" else shape[:2])
        elif name in OF_LAYER:
            theirs, transposed = OF_LAYER[name]
            for l in range(config["L"]):
                out[f"h.{l}.{theirs}"] = t[l].T if transposed else t[l].reshape(-1)
        else:
            out["gsa." + name] = t
    make_folder(folder)
    if "tokenizer" in tensors:
        write_file(os.path.join(folder, "tokenizer.bin"), tensors["tokenizer"])
    special = write_tokenizer_json(folder, tensors["tokenizer"], config["T"]) if hf and "tokenizer" in tensors else {}
    if is_plain(config):
        write_gpt2_config(folder, config, **{name: special[name] for name in special if name != "mask_token_id"})
    elif hf:
        return to_transformers(folder, config, heads, tensors, special)
    ours = {"config": config, "heads": heads[:config["L"]], "step": step, "directory": directory}
    write_safetensors(os.path.join(folder, "model.safetensors"), out, {"format": "pt", "gsa": json.dumps(ours)})
    return f"{folder}: {len(out)} tensors, {'a plain GPT-2' if is_plain(config) else 'of a kind that only gsa.c runs'}"


# ---- transformers: the module of dev/pytorch/gsa.py has a layer's tensors, as (out, in) and with what fits its heads

RENAMED = {"T": "n_positions", "V": "vocab_size", "Vp": None, "L": "n_layer", "NH": "n_head", "C": "n_embd",
           "extra": "extra_heads", "S": "splats", "raw": "sphere", "unbounded": "unbounded"}
CODE = ("gsa.py", "configuration_gsa.py", "modeling_gsa.py")
OF_HEAD = {"log_far", "log_gain", "forgetb"}  # one number a head


def gsa_heads(config, heads):
    return [[h for h in range(64) if heads[l] >> h & 1] for l in range(config["L"])]


def head_rows(config, layers, name):
    """for each layer the first and the last row that it has of a tensor: of GSA heads; of those with softmax of q . k,
    for log_gain and log_rope; of gated ones, for forgetw and forgetb"""
    counts = np.array([len(heads) for heads in layers])
    if name in ("log_gain", "log_rope", "forgetw", "forgetb"):
        extends = CHOICES["attention"][config["attention"]] == "extend"
        counts = config["NH"] + config["extra"] - (0 * counts if extends else counts)
        if name.startswith("forget") and CHOICES["forget"][config["forget"]] == "half":
            counts = (counts + 1) // 2
    ends = np.cumsum(counts)
    return list(zip(ends - counts, ends))


def transformers_tensors(config, heads, tensors, rows):
    """by their names there; rows: of the token embedding"""
    layers, L = gsa_heads(config, heads), config["L"]
    tensors = to_fp32({name: t for name, t in tensors.items() if not isinstance(t, bytes)})
    out = {"transformer.wte.weight": tensors["wte"][:rows, :, 0],
           "transformer.ln_f.weight": tensors["lnfw"].reshape(-1), "transformer.ln_f.bias": tensors["lnfb"].reshape(-1)}
    if "wpe" in tensors and tensors["wpe"].size:
        out["transformer.wpe.weight"] = tensors["wpe"][:, :, 0]
    for name, (theirs, matrix) in OF_LAYER.items():
        for l in range(L):
            out[f"transformer.h.{l}.{theirs}"] = tensors[name][l] if matrix else tensors[name][l].reshape(-1)
    for name in TENSORS:
        if name in WHOLE or name in OF_LAYER or name not in tensors:
            continue
        for l, (first, end) in enumerate(head_rows(config, layers, name)):
            t = tensors[name][first:end]
            if t.size:
                shape = (-1,) if name in OF_HEAD else t.shape if name in ("mu", "log_precision") else t.shape[:2]
                out[f"transformer.h.{l}.attn.{name}"] = t.reshape(shape)
    return out


def transformers_config(config, heads, rows, special):
    """config.json; rows: of the token embedding; special: ids of tokens"""
    theirs = {}
    for field in FIELDS:
        name, value = RENAMED.get(field, field), config[field]
        if field == "raw":
            value = not value
        elif field == "unbounded":
            value = [bound for bit, bound in enumerate(CHOICES["bound"]) if value >> bit & 1]
        elif field in CHOICES:
            value = CHOICES[field][value]
        if name:
            theirs[name] = value
    theirs |= {"vocab_size": rows, "output_size": config["V"], "gsa_heads": gsa_heads(config, heads)}
    masked = theirs["objective"] == "mlm"
    model = "GSAForMaskedLM" if masked else "GSAForCausalLM"
    auto = {"AutoConfig": "configuration_gsa.GSAConfig", "AutoModel": "modeling_gsa.GSAModel",
            "AutoModelForMaskedLM" if masked else "AutoModelForCausalLM": "modeling_gsa." + model}
    special = {name: special[name] for name in special if name != "mask_token_id"}
    return {"model_type": "gsa", "architectures": [model], "auto_map": auto, "dtype": "float32"} | theirs | special


def to_transformers(folder, config, heads, tensors, special):
    masked = config["objective"] == CHOICES["objective"].index("mlm")
    rows = config["V"] + (masked and special.get("mask_token_id") == config["V"])  # [MASK] may be in the padding
    out = transformers_tensors(config, heads, tensors, rows)
    text = json.dumps(transformers_config(config, heads, rows, special), indent=2)
    write_file(os.path.join(folder, "config.json"), text.encode() + b"\n")
    write_safetensors(os.path.join(folder, "model.safetensors"), out, {"format": "pt"})
    for name in CODE:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pytorch", name)
        write_file(os.path.join(folder, name), read_bytes(path))
    return f"{folder}: {len(out)} tensors, for transformers with trust_remote_code"


def from_transformers(path, theirs, tensors, tokenizer):
    """a model of modeling_gsa.py, whether from here or trained there; tokenizer: its file's bytes, or None"""
    config = dict.fromkeys(FIELDS, 0)
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
        if type(theirs.get(name)) is not int or theirs[name] < 1:
            die(f"config.json: {name} is {theirs.get(name)}, not a whole number above 0")
    if not isinstance(theirs.get("gsa_heads"), list) or len(theirs["gsa_heads"]) != theirs["n_layer"]:
        die(f"config.json: gsa_heads is not a list of the GSA heads of each of the {theirs['n_layer']} layers")
    for field in FIELDS:
        value = theirs.get(RENAMED.get(field, field))
        if field == "raw":
            value = not theirs.get("sphere", True)
        elif field == "unbounded":
            value = sum(1 << CHOICES["bound"].index(bound) for bound in value or [])
        elif field in CHOICES:
            value = CHOICES[field].index(value) if value else 0
        config[field] = int(value or 0)
    layers, L, C = theirs["gsa_heads"], config["L"], config["C"]
    rows, config["V"] = config["V"], theirs.get("output_size") or config["V"]
    config["Vp"] = (rows + 127) // 128 * 128
    heads = [sum(1 << h for h in layer) for layer in layers]
    tensors = {name.removeprefix("transformer."): t for name, t in to_fp32(tensors).items()}
    wte = take(tensors, "wte.weight", (rows, C))
    out = {"wte": np.concatenate([wte, np.zeros((config["Vp"] - rows, C), "<f4")])[:, :, None],
           "lnfw": tensors["ln_f.weight"].reshape(1, -1, 1), "lnfb": tensors["ln_f.bias"].reshape(1, -1, 1)}
    if "wpe.weight" in tensors:
        out["wpe"] = tensors["wpe.weight"][:, :, None]
    for name, (there, matrix) in OF_LAYER.items():
        t = np.stack([tensors[f"h.{l}.{there}"] for l in range(L)])
        out[name] = t if matrix else t[:, :, None]
    for name in TENSORS:
        parts = [tensors[f"h.{l}.attn.{name}"] for l in range(L) if f"h.{l}.attn.{name}" in tensors]
        if parts:
            t = np.concatenate(parts)
            out[name] = t.reshape(*t.shape, *[1] * (3 - t.ndim))
    directory = [(name, FP32, list(out[name].shape)) for name in TENSORS if name in out]
    if tokenizer:
        out["tokenizer"] = tokenizer
        directory.insert(0, ("tokenizer", BYTES, [len(tokenizer)]))
    write_model(path, config, heads + [0] * (64 - L), 0, directory, out)
    return config


def byte_characters():
    """how tokenizer.json writes the bytes of an entry: printing ones as they are, the others as letters behind them"""
    table, n = {}, 256
    for b in range(256):
        prints = 33 <= b <= 126 or b >= 161 and b != 173
        table[b] = chr(b) if prints else chr(n)
        n += not prints
    return table


def write_tokenizer_json(folder, data, length):
    """The tokenizer as byte-level BPE: an entry's id is its rank, so every two entries that join to a third are a merge
    of its rank. Texts begin with <|endoftext|>, as in training. Returns ids for config.json."""
    _, _, V, eot, mask = struct.unpack_from("<5i", data)
    table, at, entries = byte_characters(), 1024, []
    for _ in range(V):
        entries.append(data[at + 1:at + 1 + data[at]])
        at += 1 + data[at]
    eot = V - 1 if struct.unpack_from("<i", data, 4)[0] == 1 else eot
    mask = mask or V
    spell = lambda entry: "".join(table[b] for b in entry)
    known, merges = {entry: i for i, entry in enumerate(entries) if i not in (eot, mask)}, []
    for i, entry in enumerate(entries):
        if i in (eot, mask):
            continue
        splits = [(entry[:n], entry[n:]) for n in range(len(entry) - 1, 0, -1)]
        merges += [[spell(a), spell(b)] for a, b in splits if known.get(a, i) < i and known.get(b, i) < i]
    special = [(eot, "<|endoftext|>"), (mask, "[MASK]")]
    start = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    whole = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                          "normalized": False, "special": True} for i, text in sorted(special)],
        "normalizer": None, "pre_tokenizer": level, "decoder": level,
        "post_processor": {"type": "TemplateProcessing", "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
                           "pair": [start] + [{"Sequence": {"id": x, "type_id": 0}} for x in "AB"],
                           "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [eot],
                                                                "tokens": ["<|endoftext|>"]}}},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": {spell(entry): i for entry, i in known.items()} | {"<|endoftext|>": eot},
                  "merges": merges}}
    write_file(os.path.join(folder, "tokenizer.json"), json.dumps(whole, ensure_ascii=False).encode())
    told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length, "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "mask_token": "[MASK]",
            "clean_up_tokenization_spaces": False, "padding_side": "left"}
    write_file(os.path.join(folder, "tokenizer_config.json"), json.dumps(told, indent=2).encode() + b"\n")
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "mask_token_id": mask}


def take(tensors, name, shape):
    """a tensor of that shape: what is reshaped unseen is scrambled where only its size fits"""
    t = tensors[name]
    if list(t.shape) != list(shape):
        die(f"tensor {name} is of shape {tuple(t.shape)}, and its model needs {tuple(shape)}")
    return t


def turn_matrices(tensors, L, C):
    """Matrices as GPT-2 keeps them, (in, out); nanoGPT and others keep (out, in). The square one of a layer does not
    say which it is: the others, all alike, decide."""
    expected = {"attn.c_attn.weight": (C, 3 * C), "mlp.c_fc.weight": (C, 4 * C), "mlp.c_proj.weight": (4 * C, C)}
    turned = None
    for l in range(L):
        for name, shape in expected.items():
            name = f"h.{l}.{name}"
            found = tensors[name].shape
            if found not in (shape, shape[::-1]):
                die(f"tensor {name} is of shape {found}, and its model needs {shape}")
            if turned not in (None, found != shape):
                die(f"tensor {name} is of shape {found}: some matrices are (in, out) and some (out, in)")
            turned = found != shape
    for l in range(L if turned else 0):
        for name in (*expected, "attn.c_proj.weight"):
            tensors[f"h.{l}.{name}"] = tensors[f"h.{l}.{name}"].T


def foreign_vocabulary(path, theirs, rows, tokenizer):
    """the entries of the vocabulary; rows of the embedding beyond them are padding (50304 rows for 50257 entries)"""
    V, whose = theirs.get("vocab_size", rows), f"{path}: vocab_size"
    if tokenizer:
        header = struct.unpack_from("<256i", tokenizer) if len(tokenizer) >= 1024 else [0] * 256
        if header[0] != TOKENIZER_MAGIC:
            die("the tokenizer given is not a tokenizer file of gsa.c or llm.c")
        V, whose = header[2], "the tokenizer's vocabulary"
    if type(V) is not int or not 0 < V <= rows:
        die(f"{whose} is {V}, and the token embedding has {rows} rows")
    return V


def foreign_config(folder, tensors, tokenizer):
    """the configuration of a GPT-2 that did not come from us; its tensors become fp32 and GPT-2's in shape"""
    tensors |= to_fp32(tensors)
    for name in ("wte.weight", "wpe.weight"):
        if tensors[name].ndim != 2 or 0 in tensors[name].shape:
            die(f"tensor {name} is of shape {tensors[name].shape}, not a matrix")
    (T, C), (rows, _), L = tensors["wpe.weight"].shape, tensors["wte.weight"].shape, 0
    while f"h.{L}.ln_1.weight" in tensors:
        L += 1
    if not 1 <= L <= 64:
        die(f"{folder}/model.safetensors has {L} layers (h.0.ln_1.weight ...), and this program's models have 1 to 64")
    path = os.path.join(folder, "config.json")
    try:
        theirs = json.loads(read_bytes(path))
    except ValueError:
        die(f"{path} is not JSON")
    if not isinstance(theirs, dict):
        die(f"{path} is not an object {{...}} with the settings of a GPT-2")
    for key, value in (("activation_function", "gelu_new"), ("layer_norm_epsilon", 1e-5),
                       ("scale_attn_weights", True), ("scale_attn_by_inverse_layer_idx", False)):
        if theirs.get(key, value) != value:
            die(f"{path}: {key} is {theirs[key]}, and this program's models have {value}")
    NH = theirs.get("n_head")
    if type(NH) is not int:
        die(f"{path} does not say n_head, the number of heads")
    if NH < 1 or C % NH:
        die(f"{path}: n_head is {NH}, which does not divide the {C} channels")
    head = tensors.pop("lm_head.weight", tensors["wte.weight"])
    if head.tobytes() != tensors["wte.weight"].tobytes():
        die(f"{folder}: its lm_head is not its token embedding, as it must be here")
    turn_matrices(tensors, L, C)
    V = foreign_vocabulary(path, theirs, rows, tokenizer)
    tensors["wte.weight"] = take(tensors, "wte.weight", (rows, C))[:V]
    shape = {"T": T, "V": V, "Vp": (V + 127) // 128 * 128, "L": L, "NH": NH, "C": C}
    return dict.fromkeys(FIELDS, 0) | shape


def from_safetensors(folder, path, tokenizer):
    whole = os.path.join(folder, "model.safetensors")
    if not os.path.exists(whole) and os.path.exists(whole + ".index.json"):
        die(f"{folder} holds a model in several files ({whole}.index.json); join them into one model.safetensors first")
    tensors, metadata = read_safetensors(whole)
    tensors = {current(name.removeprefix("transformer.")): t for name, t in tensors.items()}
    own = os.path.join(folder, "tokenizer.bin")
    file = tokenizer or (own if os.path.exists(own) else None)
    out, step, heads = {}, 0, []
    if file:
        out["tokenizer"] = read_bytes(file)
    try:
        theirs = None if "gsa" in metadata else own_config(folder)
        if theirs:
            config = from_transformers(path, theirs, tensors, out.get("tokenizer"))
            return described(path, config, file)
        if "gsa" in metadata:
            ours = json.loads(metadata["gsa"])
            config, heads, step = ours["config"], ours["heads"], ours["step"]
            directory = [(current(name), kind, shape) for name, kind, shape in ours["directory"]]
            if any(name == "tokenizer" for name, _, _ in directory) and not file:
                die(f"{folder} has no tokenizer.bin, which belongs to its model; put it back or name it with "
                    "--tokenizer")
            directory = [(name, kind, [len(out[name])] if kind == BYTES else shape) for name, kind, shape in directory]
        else:
            config = foreign_config(folder, tensors, out.get("tokenizer"))
            T, Vp, L, C = config["T"], config["Vp"], config["L"], config["C"]
            directory = [("tokenizer", BYTES, [len(out["tokenizer"])])] if file else []
            directory += [(name, FP32, shape) for name, shape in (
                ("wte", [Vp, C, 1]), ("wpe", [T, C, 1]), ("ln1w", [L, C, 1]), ("ln1b", [L, C, 1]),
                ("qkvw", [L, 3 * C, C]), ("qkvb", [L, 3 * C, 1]), ("attprojw", [L, C, C]), ("attprojb", [L, C, 1]),
                ("ln2w", [L, C, 1]), ("ln2b", [L, C, 1]), ("fcw", [L, 4 * C, C]), ("fcb", [L, 4 * C, 1]),
                ("fcprojw", [L, C, 4 * C]), ("fcprojb", [L, C, 1]), ("lnfw", [1, C, 1]), ("lnfb", [1, C, 1]))]
        for name, kind, shape in directory:
            if kind == BYTES:
                continue
            if 0 in shape:
                t = np.zeros(shape, DTYPES[kind])
            elif name == "wte":
                V, C = config["V"], config["C"]
                t, padding = take(tensors, WHOLE[name], (V, C)), (shape[0] - V, C)
                tensors.setdefault("gsa.wte_padding", np.zeros(padding, t.dtype))
                t = np.concatenate([t, take(tensors, "gsa.wte_padding", padding)])
            elif name in WHOLE:
                t = take(tensors, WHOLE[name], shape[:2] if name == "wpe" else [n for n in shape if n != 1])
            elif name in OF_LAYER:
                theirs, transposed = OF_LAYER[name]
                one = shape[:0:-1] if transposed else [shape[1] * shape[2]]
                layers = [take(tensors, f"h.{l}.{theirs}", one) for l in range(config["L"])]
                t = np.stack([t.T if transposed else t for t in layers])
            else:
                t = take(tensors, "gsa." + name, shape)
            if t.dtype != DTYPES[kind]:
                raise ValueError
            out[name] = t.reshape(shape)
        write_model(path, config, heads + [0] * (64 - len(heads)), step, directory, out)
    except KeyError as missing:
        die(f"{folder}/model.safetensors is not a GPT-2: it has no {missing.args[0]}")
    except (ValueError, TypeError, AttributeError, IndexError, OverflowError, struct.error):
        die(f"{folder}/model.safetensors: its tensors are not of the shapes and types of its configuration")
    return described(path, config, file)


def described(path, config, tokenizer):
    without = "" if tokenizer else ", without a tokenizer"
    return f"{path}: {config['L']} layers, {config['NH']} heads, {config['C']} channels{without}"


def own_config(folder):
    """config.json where it is of modeling_gsa.py, else None"""
    path = os.path.join(folder, "config.json")
    try:
        theirs = json.loads(read_bytes(path)) if os.path.exists(path) else {}
    except ValueError:
        return None  # foreign_config will say so
    return theirs if isinstance(theirs, dict) and theirs.get("model_type") == "gsa" else None


def to_fp32(tensors):
    return {name: (t.astype("<u4") << 16).view("<f4") if t.dtype == "<u2" else t for name, t in tensors.items()}


def main(arguments=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda sentence: p.exit(2, f"convert.py: {sentence}; --help says more\n")
    p.add_argument("source", help="a model file, or a folder with model.safetensors")
    p.add_argument("target", help="a folder, or a model file")
    p.add_argument("--tokenizer", metavar="FILE", help="tokenizer file for a model that comes without one")
    p.add_argument("--hf", action="store_true", help="a folder that transformers loads, whatever the kind of model")
    a = p.parse_args(arguments)
    if np is None:
        die("the Python package numpy is missing: pip install numpy, or this system's package (python3-numpy)")
    if os.path.isdir(a.source):
        if a.hf:
            p.error("--hf is for a model file as the source; what it wrote is taken back without it")
        said = from_safetensors(a.source, a.target, a.tokenizer)
    else:
        if a.tokenizer and not a.hf:
            p.error("--tokenizer is for a folder without tokenizer.bin; this model file brings its own")
        said = to_safetensors(a.source, a.target, a.hf, a.tokenizer)
    say(said)


if __name__ == "__main__":
    sys.excepthook = one_sentence
    main()
