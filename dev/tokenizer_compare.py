#!/usr/bin/env python3
"""Compares tokenizer/ with Hugging Face `tokenizers` (pip install tokenizers): ids, trained vocabularies and speed.

    make tokenizer/train_bpe tokenizer/tokenize
    dev/tokenizer_compare.py --gpt2 FOLDER TEXT...    GPT-2's vocabulary on these texts, random text and broken UTF-8
    dev/tokenizer_compare.py --train 4096 TEXT        both learn a vocabulary from TEXT; entries and ids compared

Exit status 1 where anything differs; the first difference is shown. Both sides run on one thread, in turns.
Our time is that of the whole program: start, reading text and vocabulary, encoding, writing ids. Theirs is only
encoding text that is in memory, the fastest of three ways to ask for it.

Code points that the two Unicode versions class differently (letters newer than utf8proc's tables, mostly) are found by
asking both about every code point, and removed from what is compared."""
import argparse, ctypes, ctypes.util, os, random, re, struct, subprocess, sys, tempfile, time

from convert import die, number, one_sentence, read_bytes
from convert import say as line

sys.excepthook = one_sentence
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
EOT, MASK = "<|endoftext|>", "[MASK]"
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
failures = 0

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.error = lambda sentence: parser.exit(2, f"tokenizer_compare.py: {sentence}; --help says more\n")
parser.add_argument("texts", nargs="*", metavar="TEXT", help="UTF-8 files")
parser.add_argument("--gpt2", metavar="FOLDER", help="holds encoder.json and vocab.bpe")
parser.add_argument("--train", type=number(int, 258, 65536), metavar="N",
                    help="learn N entries from each TEXT in both programs")
parser.add_argument("--programs", default=os.path.join(ROOT, "tokenizer"), help="folder of train_bpe and tokenize")
parser.add_argument("--random", type=number(int, 1), default=2000000, help="characters of random text")
parser.add_argument("--repeats", type=number(int, 0), default=3, help="timings of each; the best counts; 0: none")
parser.add_argument("--seed", type=int, default=1)
args_ = parser.parse_args()  # before the package: --help does not need it
args_.sink = None  # where the output of our programs goes
if not args_.gpt2 and not args_.train:
    parser.error("--gpt2 FOLDER or --train N says what to compare")

if args_.train and not args_.texts:
    parser.error("--train needs a TEXT to learn from")
texts = []  # (name, bytes)
for path in args_.texts:
    texts.append((path, read_bytes(path)))
    try:
        texts[-1][1].decode()
    except UnicodeDecodeError:
        die(f"{path} is not UTF-8")

from tokenizers import Tokenizer, models, pre_tokenizers, trainers


def say(good, text):
    global failures
    failures += not good
    line(("same       " if good else "DIFFERENT  ") + text)


def ours(name, *args):
    start = time.perf_counter()
    if subprocess.run([os.path.join(args_.programs, name), *args], stdout=args_.sink).returncode != 0:
        die(f"{name} {' '.join(args)} failed: see above")
    return time.perf_counter() - start


def encode_ours(tokenizer, data, special):
    """ids and the program's seconds"""
    with tempfile.TemporaryDirectory() as folder:
        text, ids = os.path.join(folder, "text"), os.path.join(folder, "ids")
        with open(text, "wb") as f:
            f.write(data)
        with open(ids, "wb") as args_.sink:
            seconds = ours("tokenize", "encode", "--binary", "--tokenizer", tokenizer, *["--special"] * special, text)
        args_.sink = None
        with open(ids, "rb") as f:
            raw = f.read()
        decode = [os.path.join(args_.programs, "tokenize"), "decode", "--binary", "--tokenizer", tokenizer, ids]
        back = subprocess.run(decode, check=True, stdout=subprocess.PIPE).stdout
        if back != data:
            say(False, "decode(encode(x)) is not x")
        return list(struct.unpack("<%dH" % (len(raw) // 2), raw)), seconds


def byte_characters():
    """how both of GPT-2's files write a byte"""
    prints = [b for b in range(256) if 33 <= b <= 126 or b >= 161 and b != 173]
    table, n = {b: chr(b) for b in prints}, 256
    for b in range(256):
        if b not in table:
            table[b], n = chr(n), n + 1
    return table


TABLE = byte_characters()


def entries_of(path):
    """all entries of a tokenizer file in GPT-2's spelling"""
    with open(path, "rb") as f:
        raw = f.read()
    V, at, out = struct.unpack_from("<i", raw, 8)[0], 1024, []
    for _ in range(V):
        out.append("".join(TABLE[b] for b in raw[at + 1:at + 1 + raw[at]]))
        at += 1 + raw[at]
    return out


# ---- Unicode classes

def their_class(codes):
    """a code point is a letter where "a" and it are one piece, a number where "1" and it are, and so on"""
    split, classes = pre_tokenizers.ByteLevel(add_prefix_space=False), {}
    for name, before in (("letter", "a"), ("number", "1"), ("other", "!")):
        text = "".join(before + chr(c) + "\n" for c in codes)
        spans = {span for _, span in split.pre_tokenize_str(text)}
        classes.update({c: name for i, c in enumerate(codes) if (3 * i, 3 * i + 2) in spans})
    return [classes.get(c, "space") for c in codes]


def different_codes():
    name = ctypes.util.find_library("utf8proc")
    if not name:
        die("the library utf8proc is missing (Debian: libutf8proc-dev)")
    library = ctypes.CDLL(name)
    library.utf8proc_unicode_version.restype = ctypes.c_char_p
    names = {**dict.fromkeys(range(1, 6), "letter"), **dict.fromkeys(range(9, 12), "number"),
             **dict.fromkeys(range(23, 26), "space")}
    found = {}
    for start in range(0, 0x110000, 0x8000):
        codes = [c for c in range(start, start + 0x8000) if not 0xD800 <= c < 0xE000]
        for c, theirs in zip(codes, their_class(codes)) if codes else ():
            mine = "space" if c in (9, 10, 11, 12, 13, 0x85) else names.get(library.utf8proc_category(c), "other")
            if mine != theirs:
                found[c] = (mine, theirs)
    kinds = {}
    for pair in found.values():
        kinds[pair] = kinds.get(pair, 0) + 1
    line(f"utf8proc has Unicode {library.utf8proc_unicode_version().decode()}; "
         f"{len(found)} code points are classed differently"
         + "".join(f", {n} {a} here and {b} there" for (a, b), n in kinds.items())
         + (f"; the first is U+{min(found):04X}" if found else ""))
    return found


# ---- comparisons

def report(what, mine, theirs, entries):
    if mine == theirs:
        return say(True, f"{what}: {len(mine)} ids")
    i = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    show = lambda ids: [entries[k] if k < len(entries) else k for k in ids[max(0, i - 3):i + 4]]
    say(False, f"{what}: id {i} of {len(mine)} and {len(theirs)}; ours {show(mine)} theirs {show(theirs)}")


def compare_text(what, hf, tokenizer, data, entries, shift=lambda i: i):
    text = data.decode("utf-8")
    drop = set(text) & excluded
    if drop:
        which = " ".join("U+%04X" % ord(c) for c in sorted(drop))
        line(f"           {what}: {sum(map(text.count, drop))} characters removed, of different class: {which}")
        text = text.translate({ord(c): None for c in drop})
    hf.encode_special_tokens = False
    theirs = hf.encode(text, add_special_tokens=False).ids
    mine, _ = encode_ours(tokenizer, text.encode(), True)
    report(what, mine, [shift(i) for i in theirs], entries)
    if EOT in text or MASK in text:
        hf.encode_special_tokens = True
        theirs = hf.encode(text, add_special_tokens=False).ids
        hf.encode_special_tokens = False
        mine, _ = encode_ours(tokenizer, text.encode(), False)
        report(what + ", special tokens as text", mine, [shift(i) for i in theirs], entries)


def random_text(rng, n):
    """sample texts with a bias to what the pattern cares about, separated by special tokens so that each has an end"""
    pools = ["abcdeABCxyz", "0123456789", " ",
             " \t\n\r\v\f\x1c\x1f\x85\xa0\u1680\u180e\u2003\u200b\u2028\u3000\ufeff",
             "'", "!?.,;-_()[]<>|@#", "stmdrvel", "\x00\x01\x7f",
             "äößéñçÀÿªº²¼", "абвгДЖ", "αβγΩ", "中文字日本語", "한국어",
             "१२३٤٥٦Ⅷ①", "👍🏽👩‍👩‍👧🇩🇪❤️", "\u0301\u0308\u093e\u0e31", "ﬁǅʰ"]
    words = ["'s", "'t", "'re", "'ve", "'m", "'ll", "'d", "'S", "don't", " the", "<|endoftext", "[MASK", "e\u0301",
             "  ", "\r\n", "\n\n", "a" * 60, " " * 50]
    out, size = [], 0
    while size < n:
        part = []
        for _ in range(rng.randrange(1, 30)):
            k = rng.random()
            if k < 0.75:
                part.append("".join(rng.choices(rng.choice(pools), k=rng.randrange(1, 5))))
            elif k < 0.9:
                part.append(rng.choice(words))
            else:
                c = rng.randrange(0x110000 if rng.random() < 0.3 else 0x3000)
                part.append("" if 0xD800 <= c < 0xE000 or chr(c) in excluded else chr(c))
        out.append("".join(part) + (rng.choice((EOT, MASK)) if rng.random() < 0.5 else ""))
        size += len(out[-1])
    return "".join(out)


def break_bytes(rng, data):
    """random bytes put in, taken out and changed, and pieces of pure noise"""
    data = bytearray(data)
    for _ in range(len(data) // 15):
        i, k = rng.randrange(len(data)), rng.random()
        if k < 0.4:
            data[i] = rng.randrange(256)
        elif k < 0.7:
            data[i:i + 1] = b""
        elif k < 0.97:
            data[i:i] = rng.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82",
                                    b"\xf0\x9f\x98", b"\x80", b"\xe0\x80\xaf"])
        else:
            data[i:i] = rng.randbytes(20)
    return bytes(data)


def compare_broken(what, hf, tokenizer, data, entries):
    """They take only text. So each byte outside valid UTF-8 is U+FFFD for their splitting (it is of no class, as such a
    byte is here), and their merging gets the true bytes of each piece."""
    escaped = data.decode("utf-8", "surrogateescape")
    escaped = "".join(c for c in escaped if c not in excluded)
    data = escaped.encode("utf-8", "surrogateescape")
    invalid = sum("\udc80" <= c <= "\udcff" for c in escaped)
    theirs, known = [], {}
    for _, (a, b) in hf.pre_tokenizer.pre_tokenize_str(re.sub("[\udc80-\udcff]", "\ufffd", escaped)):
        piece = escaped[a:b].encode("utf-8", "surrogateescape")
        if piece not in known:
            known[piece] = [token.id for token in hf.model.tokenize("".join(TABLE[c] for c in piece))]
        theirs += known[piece]
    mine, _ = encode_ours(tokenizer, data, False)
    report(f"{what}, {invalid} broken bytes", mine, theirs, entries)


def time_text(what, hf, tokenizer, data):
    text = data.decode("utf-8")
    documents = [d for d in re.split("(?<=<\\|endoftext\\|>)", text) if d]
    lines = text.splitlines(keepends=True)
    ways = {"whole": lambda: hf.encode(text), "documents": lambda: hf.encode_batch_fast(documents),
            "lines": lambda: hf.encode_batch_fast(lines)}
    best, mine = {}, []
    for _ in range(args_.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best.get(name, 1e9), time.perf_counter() - start)
        mine.append(encode_ours(tokenizer, data, True)[1])
    name = min(best, key=best.get)
    size = len(data) / 1e6
    line(f"time       {what}: ours {size / min(mine):.1f} MB/s, tokenizers {size / best[name]:.1f} MB/s ({name}): "
         f"{best[name] / min(mine):.1f} times as fast")


def build_gpt2(folder):
    hf = Tokenizer(models.BPE.from_file(os.path.join(folder, "encoder.json"), os.path.join(folder, "vocab.bpe")))
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.add_special_tokens([EOT, MASK])
    return hf


def compare_training(path, data, V, folder):
    tokenizer = os.path.join(folder, "trained.bin")
    mine = ours("train_bpe", "--vocab", str(V), "--out", tokenizer, path)
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=V, special_tokens=[EOT, MASK],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), max_token_length=255,
                                  show_progress=False)
    start = time.perf_counter()
    hf.train_from_iterator(data.decode("utf-8").split(EOT), trainer)
    theirs = time.perf_counter() - start
    entries = entries_of(tokenizer)
    learned = [hf.id_to_token(i + 2) for i in range(V - 2)]
    i = next((i for i in range(V - 2) if entries[i] != learned[i]), None)
    if i is None:
        say(True, f"{path}: {V} entries learned")
    else:
        say(False, f"{path}: entry {i} is {entries[i]!r} here and {learned[i]!r} there")
    line(f"time       learning: ours {mine:.2f} s (encoding the text again and writing included), "
         f"tokenizers {theirs:.2f} s")
    compare_text(path + ", learned vocabulary", hf, tokenizer, data, entries, lambda i: i - 2 if i >= 2 else V - 2 + i)
    if args_.repeats:
        time_text(path + ", learned vocabulary", hf, tokenizer, data)


excluded = {chr(c) for c in different_codes()}

with tempfile.TemporaryDirectory() as folder:
    if args_.gpt2:
        tokenizer = os.path.join(folder, "gpt2.bin")
        ours("train_bpe", "--gpt2", args_.gpt2, "--out", tokenizer)
        hf = build_gpt2(args_.gpt2)
        entries = entries_of(tokenizer)
        rng = random.Random(args_.seed)
        text = random_text(rng, args_.random)
        compare_text(f"random text, seed {args_.seed}", hf, tokenizer, text.encode(), entries)
        broken = break_bytes(rng, text[:args_.random // 4].encode())
        compare_broken(f"broken text, seed {args_.seed}", hf, tokenizer, broken, entries)
        compare_broken(f"random bytes, seed {args_.seed}", hf, tokenizer, rng.randbytes(args_.random // 4), entries)
        every = "".join(f"a{chr(c)}{chr(c)}1 {chr(c)}!{chr(c)}\n" for c in range(0x110000)
                        if not 0xD800 <= c < 0xE000 and chr(c) not in excluded)
        compare_text("every code point beside a letter, a number, a space and a mark", hf, tokenizer, every.encode(),
                     entries)
        for path, data in texts:
            compare_text(path, hf, tokenizer, data, entries)
            if args_.repeats:
                time_text(path, hf, tokenizer, data)
    if args_.train:
        for path, data in texts:
            compare_training(path, data, args_.train, folder)
sys.exit(1 if failures else 0)
