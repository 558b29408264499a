#!/bin/sh
# Models and numbers do not depend on how many threads OpenMP gives: fewer than were asked for (a limit, a dynamic team,
# no parallel regions at all), other numbers, one core. Most of all with oneDNN, which has threads of its own. All
# programs but those whose numbers are times (dev/scan_bench, dev/infer_bench) and those of the GPU.
# Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
out=${OUT:-.}
config=release
case $OUT in build/*) config=$(basename "$OUT") ;; esac
logits=build/$config/dev/logits
make -s config="$config" "$logits" >"$dir/log" 2>&1 || fail "make $logits: $(tail -n 1 "$dir/log")"
unset OMP_NUM_THREADS OMP_THREAD_LIMIT OMP_DYNAMIC OMP_MAX_ACTIVE_LEVELS
export OMP_WAIT_POLICY=passive

{ "$out/data/make_stories" --bytes 100k --out "$dir/s.txt" && head -c 6000 "$dir/s.txt" >"$dir/val.txt" &&
    "$out/tokenizer/train_bpe" --vocab 400 --out "$dir/t.bin" "$dir/s.txt" &&
    "$out/data/prepare" --tokenizer "$dir/t.bin" --out "$dir/s" "$dir/s.txt"; } >"$dir/log" 2>&1 ||
    fail "the data: $(tail -n 1 "$dir/log")"
shard=$(ls "$dir"/s_*.bin | head -n 1)
printf '%s\n' '{"ctx": "Once upon a", "endings": [" time", " tree"], "label": 0}' \
    '{"ctx": "The girl went to the", "endings": [" park", " was"], "label": 0}' >"$dir/tasks.jsonl"

# products of bf16 numbers, where the CPU has them
bf16=bf16
"$out/train_gsa" --products bf16 --steps 1 --depth 1 --out "$dir/probe" >/dev/null 2>"$dir/err" || {
    bf16=
    echo "skip bf16: $(tail -n 1 "$dir/err")"
    skipped=1
}

"$out/data/make_recall" --ask 2 --far 16 --out "$dir/ask.txt" >"$dir/log" 2>&1 || fail "questions"

# made FILE COMMAND...: what it prints is kept in FILE, but for times
made() {
    file=$1
    shift
    $threads "$@" >"$dir/log" 2>"$dir/err" || fail "$name: $*: $(tail -n 1 "$dir/err")"
    grep -av 'tokens/s\|tasks/s\|MB/s' "$dir/log" | sed 's/, [0-9.]* s$//' >"$work/$file"
}
# NAME COMMAND: all kinds of attention, trained and used; what they make lies in $dir/NAME. COMMAND sets the threads.
run() {
    name=$1 work=$dir/work # names of files get into what is printed and drawn
    shift
    threads=$*
    mkdir "$work"
    made stories "$out/data/make_stories" --bytes 20k --out -
    made make_recall "$out/data/make_recall" --bytes 5k --out -
    made prepare "$out/data/prepare" --tokenizer "$dir/t.bin" --out "$work/shard" "$dir/s.txt"
    made train_bpe "$out/tokenizer/train_bpe" --vocab 400 --out "$work/bpe" "$dir/s.txt"
    made tokens "$out/tokenizer/tokenize" encode --tokenizer "$dir/t.bin" "$dir/val.txt"
    made text "$out/tokenizer/tokenize" decode --tokenizer "$dir/t.bin" "$work/tokens"
    for kind in standard hybrid linear extend encoder learned full $bf16; do
        case $kind in
        linear) flags="--attention gsa --mixer linear --optimizer adamw" ;;
        extend) flags="--attention extend --window 8 --splats-alive 4 --adapt grow --recompute
            --adapt-rules every=5,life=5,activation=0.95" ;;
        encoder) flags="--attention gsa --objective mlm --splat-init kmeans --accum 2" ;;
        bf16) flags="--products bf16" ;;
        learned) flags="--attention hybrid --phase learned --gain head --rope-frequencies learned --forget-gate half" ;;
        full) flags="--attention augment --mixer linear --covariance full --window 8 --pos both --splat-init pca" ;;
        *) flags="--attention $kind" ;;
        esac
        model=$work/$kind.bin
        made screen "$out/train_gsa" --depth 1 --heads 2 --seq 32 --batch 2 --steps 20 --eval-every 10 \
            --data "$shard" --val "$shard" --eval-tokens 512 --tokenizer "$dir/t.bin" $flags --out "$dir/run"
        grep -v ' cfg:\| tps:' "$dir/run/main.log" >"$work/$kind.log"
        mv "$dir/run/model_00000020.bin" "$model"
        mv "$dir/run/state_00000020.bin" "$work/$kind.state"
        rm -r "$dir/run" "$work/screen" # lines of steps come by time
        made "$kind.quantize" "$out/infer" quantize "$model" "$work/$kind.int8" --type int8
        made "$kind.report" "$out/infer" report "$model" "Once upon a time" -o "$work/$kind.html" --pictures "$dir/png"
        cat "$dir"/png/*.png >"$work/$kind.png"
        rm -r "$dir/png"
        case $kind in
        encoder) made fill "$out/infer" fill "$model" "The [MASK] sat." ;;
        *)
            made "$kind.perplexity" "$out/infer" perplexity "$model" "$dir/val.txt"
            made "$kind.int8.perplexity" "$out/infer" perplexity "$work/$kind.int8" "$dir/val.txt" --stride 9
            made "$kind.score" "$out/infer" score "$model" "$dir/tasks.jsonl"
            made "$kind.recall" "$out/infer" recall "$model" "$dir/ask.txt"
            made "$kind.generate" "$out/infer" generate "$model" Once --tokens 20 --samples 3 --seed 1
            made "$kind.measure" "$out/infer" measure "$model" "$dir/val.txt" --tokens 512
            seq 1 9 | $threads "$logits" "$model" >"$work/$kind.logits" || fail "$name: logits"
            seq 1 8 | $threads "$logits" "$model" --gradients "$work/$kind.gradients" || fail "$name: gradients"
            ;;
        esac
        case $kind in
        standard) ;; # has no splats
        encoder) made inspect "$out/infer" inspect "$model" ;;
        learned)
            made meaning "$out/infer" inspect "$model" --text "$dir/val.txt" --tokens 512
            made classes "$out/infer" measure "$model" "$dir/val.txt" --tokens 512 --classes stories --silence
            made without "$out/infer" generate "$model" Once --tokens 9 --temperature 0 --without 0:1:0-3
            ;;
        *) made "$kind.inspect" "$out/infer" inspect "$model" ;;
        esac
    done
    made plot "$out/dev/plot" loss "$work/standard.log" -o "$work/loss.png"
    mv "$work" "$dir/$name"
}
compare() {
    run "$@"
    for file in "$dir"/two/*; do
        if cmp -s "$file" "$dir/$1/${file##*/}"; then pass; else fail "$1: ${file##*/} is not that of two threads"; fi
    done
}

run two env OMP_NUM_THREADS=2
compare limit env OMP_NUM_THREADS=2 OMP_THREAD_LIMIT=1
compare limit2 env OMP_NUM_THREADS=4 OMP_THREAD_LIMIT=2
compare dynamic env OMP_NUM_THREADS=64 OMP_DYNAMIC=true
compare levels env OMP_NUM_THREADS=2 OMP_MAX_ACTIVE_LEVELS=0
compare one env OMP_NUM_THREADS=1
compare three env OMP_NUM_THREADS=3
if command -v taskset >/dev/null; then
    compare core taskset -c "$(taskset -cp $$ | sed 's/.*: *//; s/[-,].*//')" env
else
    echo "skip one core: no taskset"
    skipped=$((skipped + 1))
fi

echo "threads: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
