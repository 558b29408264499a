#!/bin/sh
# Models and numbers do not depend on how many threads OpenMP gives: fewer than were asked for (a limit, a dynamic team,
# no parallel regions at all), other numbers, one core. Most
# of all with oneDNN, which has threads of its own. Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
out=${OUT:-.}
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

# All kinds of attention, trained and used; what they make lies in $dir/NAME. NAME COMMAND: COMMAND sets the threads.
run() {
    name=$1
    shift
    mkdir "$dir/$name"
    "$@" "$out/data/prepare" --tokenizer "$dir/t.bin" --out "$dir/$name/shard" "$dir/s.txt" >"$dir/log" 2>&1 ||
        fail "$name: prepare: $(tail -n 1 "$dir/log")"
    "$@" "$out/tokenizer/train_bpe" --vocab 400 --out "$dir/$name/bpe" "$dir/s.txt" >"$dir/log" 2>&1 ||
        fail "$name: train_bpe: $(tail -n 1 "$dir/log")"
    "$@" "$out/tokenizer/tokenize" encode --tokenizer "$dir/t.bin" "$dir/val.txt" >"$dir/$name/tokens" 2>"$dir/log" ||
        fail "$name: tokenize: $(tail -n 1 "$dir/log")"
    for kind in standard hybrid linear extend encoder $bf16; do
        case $kind in
        linear) flags="--attention gsa --mixer linear" ;;
        extend) flags="--attention extend --window 8 --splats-alive 4 --adapt grow --recompute
            --adapt-rules every=5,life=5,activation=0.95" ;;
        encoder) flags="--attention gsa --objective mlm --splat-init kmeans --accum 2" ;;
        bf16) flags="--products bf16" ;;
        *) flags="--attention $kind" ;;
        esac
        runs=$dir/$name.$kind
        "$@" "$out/train_gsa" --depth 1 --heads 2 --seq 32 --batch 2 --steps 20 --data "$shard" \
            --tokenizer "$dir/t.bin" $flags --out "$runs" >"$dir/log" 2>&1 ||
            fail "$name: train $kind: $(tail -n 1 "$dir/log")"
        model=$runs/model_00000020.bin
        cp "$model" "$dir/$name/$kind.bin"
        cp "$runs/state_00000020.bin" "$dir/$name/$kind.state"
        for command in "perplexity $model $dir/val.txt" "measure $model $dir/val.txt --tokens 512" \
            "score $model $dir/tasks.jsonl" "generate $model Once --tokens 20 --samples 2 --seed 1" \
            "inspect $model" "quantize $model $dir/$name/$kind.int8 --type int8" "fill $model The_[MASK]_sat."; do
            case $kind.$command in
            encoder.inspect* | encoder.quantize* | encoder.fill*) ;;
            encoder.* | *.fill* | standard.inspect*) continue ;; # of decoders, of encoders, of splats
            esac
            "$@" "$out/infer" $command >"$dir/log" 2>"$dir/err" || fail "$name: $command: $(tail -n 1 "$dir/err")"
            # speeds differ, and the folder's name
            grep -av 'tokens/s' "$dir/log" | sed "s,$dir/$name,,g" >"$dir/$name/$kind.${command%% *}"
        done
    done
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
