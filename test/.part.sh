#!/bin/sh
# The programs as a user meets them: runs that stop and go on, files of every wrong kind, flags of every wrong kind.
# OUT is the folder of the programs (empty: the top). Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
train=./${OUT}train_gsa infer=./${OUT}infer train_bpe=./${OUT}tokenizer/train_bpe prepare=./${OUT}data/prepare
make_stories=./${OUT}data/make_stories make_recall=./${OUT}data/make_recall
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
# check NAME COMMAND...: the command succeeds
check() {
    name=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then pass; else fail "$name (status $?): $(tail -n 2 "$dir/err")"; fi
}
# refuse NAME STATUS WORD COMMAND...: the command ends with STATUS (1 or 2) and one sentence on stderr that holds WORD
refuse() {
    name=$1 status=$2 word=$3
    shift 3
    ASAN_OPTIONS=detect_leaks=0 "$@" >"$dir/out" 2>"$dir/err" </dev/null # who stops with a sentence does not clean up
    got=$?
    if [ $got -ne "$status" ]; then fail "$name: status $got, not $status: $(tail -n 2 "$dir/err")"
    elif [ "$(wc -l <"$dir/err")" -ne 1 ]; then fail "$name: not one sentence: $(cat "$dir/err")"
    elif ! grep -qF -e "$word" "$dir/err"; then fail "$name: '$word' is not in: $(cat "$dir/err")"
    else pass; fi
}
patch() { printf "$3" | dd of="$1" bs=1 seek="$2" conv=notrunc 2>/dev/null; } # FILE OFFSET BYTES

$make_stories --bytes 60k --seed 3 --out "$dir/train.txt" 2>/dev/null
$make_stories --bytes 20k --seed 4 --out "$dir/val.txt" 2>/dev/null
check "train a vocabulary" $train_bpe --vocab 400 --out "$dir/t.bin" "$dir/train.txt"
check "prepare" $prepare --tokenizer "$dir/t.bin" --out "$dir/s" --val "$dir/val.txt" "$dir/train.txt"
data="--data $dir/s_train_*.bin --val $dir/s_val_*.bin --tokenizer $dir/t.bin"
shape="--layers 1 --heads 2 --channels 32 --seq 32 --batch 4 --sample-every 0"
set -f # the globs go to the program as they are
check "train on shards" $train $data $shape --steps 6 --eval-every 6 --eval-tokens 1G --out "$dir/p"
check "fine-tune" $train $data --init-from "$dir/p/model_00000006.bin" --batch 4 --steps 2 --sample-every 0 \
    --out "$dir/q"
check "fine-tune at another length" $train $data --init-from "$dir/p/model_00000006.bin" --seq 48 --batch 4 --steps 2 \
    --sample-every 0 --out "$dir/r"
check "resume what was fine-tuned" $train --resume --out "$dir/r"
# ---- heads of a standard model become heads of splats; all others attend as before, bit for bit
standard="--layers 2 --heads 4 --channels 32 --seq 32 --batch 4 --sample-every 0 --attention standard"
check "a standard model" $train $data $standard --gain head --rope-frequencies learned --forget-gate all --lr 1e-2 \
    --warmup 5 --steps 60 --eval-every 60 --out "$dir/st"
turn="$train $data --init-from $dir/st/model_00000060.bin --batch 4 --steps 1 --lr 0 --eval-every 1 --sample-every 0"
entropies() { sed -n "s/^s:$2 ent:.* ents:\([^ ]*\) .*/\1/p" "$1/main.log" | cut -d, -f"$3"; }
check "into splats, these heads" $turn --attention hybrid --gsa-heads 0:1,1:2 --fit 0 --out "$dir/st.map"
check "the other heads of the first layer attend as before" \
    sh -c "[ -n '$(entropies "$dir/st" 60 1,3,4)' ] &&
        [ '$(entropies "$dir/st" 60 1,3,4)' = '$(entropies "$dir/st.map" 0 1,3,4)' ]"
check "into splats, the nearest heads" $turn --attention hybrid --threads 2 --out "$dir/st.two"
cp "$dir/out" "$dir/turned.txt"
check "into splats: two heads a layer, those that attend nearest, and each learns" awk '
    /^into splats/ {
        lines++; far = 0; near = 1e9; line = $0
        while (match(line, /distance [0-9.]+, divergence [0-9.]+, fitted [0-9.]+/)) {
            split(substr(line, RSTART, RLENGTH), word, /[ ,]+/); heads++
            if (word[2] > far) far = word[2]
            if (word[6] + 0 >= word[4] + 0) wrong++
            line = substr(line, RSTART + RLENGTH)
        }
        while (match(line, /\([0-9.]+\)/)) {
            kept++; x = substr(line, RSTART + 1, RLENGTH - 2) + 0
            if (x < near) near = x
            line = substr(line, RSTART + RLENGTH)
        }
        if (far > near) wrong++
    }
    END { exit !(lines == 2 && heads == 4 && kept == 4 && !wrong) }' "$dir/turned.txt"
check "into splats, one thread" $turn --attention hybrid --threads 1 --out "$dir/st.one"
check "the same model, whatever the threads" cmp "$dir/st.one/model_00000001.bin" "$dir/st.two/model_00000001.bin"
check "what was turned into splats trains on" $train $data --init-from "$dir/st.one/model_00000001.bin" --batch 4 \
    --steps 2 --sample-every 0 --out "$dir/st.on"
check "into linear splats beside windows" $turn --attention hybrid --mixer linear --window 8 --gsa-heads 1 --fit 20 \
    --out "$dir/st.linear"
check "resume what was turned" $train --resume --out "$dir/st.linear"
check "all heads into splats, with phases" $turn --attention gsa --phase learned --splats 3 --fit 5 --out "$dir/st.gsa"
check "a standard encoder" $train $data $standard --pos learned --objective mlm --steps 5 --out "$dir/st.mlm"
check "an encoder into splats" $train $data --init-from "$dir/st.mlm/model_00000005.bin" --attention hybrid --steps 2 \
    --fit 5 --batch 4 --out "$dir/st.mlm2"
refuse "into splats: extend" 2 "--attention extend" $turn --attention extend --out "$dir/x"
refuse "into splats: a precision for each dimension" 2 "--covariance diag" $turn --attention hybrid --covariance diag \
    --out "$dir/x"
for flags in "--splat-init pca" --no-sphere "--unbounded centre" "--splats-alive 2" "--depth 2"; do
    refuse "into splats: $flags" 2 "${flags%% *}" $turn --attention hybrid $flags --out "$dir/x"
done
refuse "--fit without a standard model" 2 "--fit" $train $data --init-from "$dir/p/model_00000006.bin" --fit 9 \
    --out "$dir/x"
refuse "--fit of a new model" 2 "--fit" $train $data $shape --fit 9 --out "$dir/x"
check "gates in half of the heads" $train $data $standard --forget-gate half --steps 2 --out "$dir/st.half"
refuse "into splats: gates in half of the heads" 2 "gates in all or none" $train $data --attention hybrid \
    --init-from "$dir/st.half/model_00000002.bin" --out "$dir/x"
echo "$passed passed, $failed failed"
