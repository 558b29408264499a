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

tiny="--layers 2 --heads 2 --channels 32 --seq 32 --batch 2 --vocab 300 --eval-tokens 256 --sample-every 0"

# ---- a run killed at step 10 and resumed equals an unbroken one; reruns and thread counts agree bit for bit
run="$tiny --steps 20 --eval-every 5 --save-every 10 --keep 0"
check "train 20 steps" $train $run --out "$dir/a" --threads 2
check "train again, one thread" $train $run --out "$dir/b" --threads 1
check "same seed, same model, whatever the threads" cmp "$dir/a/model_00000020.bin" "$dir/b/model_00000020.bin"
mkdir "$dir/c" && cp "$dir/a/model_00000010.bin" "$dir/a/state_00000010.bin" "$dir/c"
sed -n '/^s:[0-9] \|^s:10 /p' "$dir/a/main.log" >"$dir/c/main.log"
check "resume at 10" $train --resume --out "$dir/c"
check "the resumed model is the unbroken one" cmp "$dir/a/model_00000020.bin" "$dir/c/model_00000020.bin"
check "the resumed state is the unbroken one" cmp "$dir/a/state_00000020.bin" "$dir/c/state_00000020.bin"
grep -h 'tr[l]:\|te[l]:' "$dir/a/main.log" | sort -u >"$dir/a.log"
grep -h 'tr[l]:\|te[l]:' "$dir/c/main.log" | sort -u >"$dir/c.log"
check "the losses in the logs agree to the last digit" cmp "$dir/a.log" "$dir/c.log"
check "train with recomputed blocks" $train $run --recompute --out "$dir/re"
check "recomputed blocks, same model" cmp "$dir/a/model_00000020.bin" "$dir/re/model_00000020.bin"
# ---- splats' scalars have a rate of their own, and AdamW's first step is the rate: amplitudes of 1 after it
amplitudes() {
    rm -rf "$dir/rate"
    $train --steps 1 --warmup 1 --batch 2 --sample-every 0 --eval-every 0 --gsa-heads 1 "$@" \
        --out "$dir/rate" >/dev/null &&
        $infer inspect "$dir/rate/model_00000001.bin" |
        awk '$1 ~ /^[0-9]+$/ && NF > 3 { print $3 }' | sort -u | tr '\n' ' '
}
check "ten times the learning rate, but at most 0.01" sh -c "[ '$(amplitudes)' = '0.99 1.01 ' ]"
check "ten times a low learning rate" sh -c "[ '$(amplitudes --lr 1e-4)' = '1.00 ' ]"
check "a rate for the splats" sh -c "[ '$(amplitudes --splat-lr 0.1)' = '0.90 1.11 ' ]"
entropy_at_start() {
    rm -rf "$dir/rate"
    $train $tiny --steps 1 --eval-every 1 "$@" --out "$dir/rate" |
        sed -n 's|^step 0/1 .*entropy \([0-9.]*\).*|\1|p'
}
softer=$(
    {
        entropy_at_start --splat-amplitude 1
        entropy_at_start --splat-amplitude 0.1
        entropy_at_start --splats-alive 3 --splat-amplitude 1
        entropy_at_start --splats-alive 3 --splat-amplitude 0.1
    } | awk '{ e[NR] = $1 } END { print (e[2] > e[1] + 0.1) && (e[4] > e[3] + 0.1) }'
)
check "a lower amplitude makes attention softer" [ "$softer" = 1 ]
check "no rate for the splats" sh -c "[ '$(amplitudes --splat-lr 0)' = '1.00 ' ]"
# ---- products of bf16 numbers: refused where the CPU has none, part of a run where it has
refuse "bf16 on a CPU without it" 2 "--products bf16" env DNNL_MAX_CPU_ISA=AVX2 \
    $train $tiny --products bf16 --out "$dir/x"
if $train $tiny --products bf16 --steps 4 --save-every 2 --keep 0 --out "$dir/bf" >/dev/null 2>"$dir/err"; then
    mkdir "$dir/bg" && cp "$dir/bf/model_00000002.bin" "$dir/bf/state_00000002.bin" "$dir/bg"
    check "bf16: resumed" sh -c "$train --resume --out '$dir/bg' && \
        cmp '$dir/bf/state_00000004.bin' '$dir/bg/state_00000004.bin'"
    check "bf16: other numbers" sh -c "$train $tiny --steps 4 --products fp32 --out '$dir/bh' && \
        ! cmp -s '$dir/bf/model_00000004.bin' '$dir/bh/model_00000004.bin'"
    refuse "fp32 for a run of bf16" 1 "contradicts" $train --resume --products fp32 --out "$dir/bf"
else
    grep -q -- "--products bf16" "$dir/err" || fail "bf16: $(cat "$dir/err")"
    echo "skip products of bf16: $(cat "$dir/err")"
    skipped=$((skipped + 1))
fi
# ---- birth and death of splats: events, the same whatever the threads, resumed bit for bit; flags that make no sense
adapt="$tiny --splats 8 --adapt-rules every=5,life=5,activation=0.95 --steps 40 --eval-every 10"
adapt="$adapt --save-every 20 --keep 0"
for mode in "relocate" "grow --splats-alive 5" "grow --splats-alive 5 --mixer linear" \
    "grow --attention extend --splats-alive 3 --covariance diag" \
    "relocate --splat-init ball --objective mlm --recompute"; do
    rm -rf "$dir/ad" "$dir/ae" "$dir/af"
    check "adapt $mode" $train $adapt --adapt $mode --out "$dir/ad" --threads 2
    check "adapt $mode: one thread" sh -c "$train $adapt --adapt $mode --out '$dir/ae' --threads 1 && \
        cmp '$dir/ad/model_00000040.bin' '$dir/ae/model_00000040.bin'"
    mkdir "$dir/af" && cp "$dir/ad/model_00000020.bin" "$dir/ad/state_00000020.bin" "$dir/af"
    check "adapt $mode: resumed" sh -c "$train --resume --out '$dir/af' && \
        cmp '$dir/ad/model_00000040.bin' '$dir/af/model_00000040.bin' && \
        cmp '$dir/ad/state_00000040.bin' '$dir/af/state_00000040.bin'"
    check "adapt $mode: events and a summary in the log" \
        sh -c "grep -Eq '^s:[0-9]+ adp:(birth|split|move|death|merge) l:[0-9]+ h:[0-9]+ slot:[0-9]+ ' \
        '$dir/ad/main.log' && grep -q '^s:40 adp:state alive:' '$dir/ad/main.log'"
    check "adapt $mode: nothing in the last 30 %" \
        sh -c "! grep -Eq '^s:(29|3[0-9]|40) adp:(birth|split|move|death|merge) ' '$dir/ad/main.log'"
    check "inspect what has adapted" sh -c "$infer inspect '$dir/ad/model_00000040.bin' | grep -q 'alive'"
done
check "another start from what has adapted" $train --init-from "$dir/ad/model_00000040.bin" --adapt relocate \
    --steps 2 --batch 2 --sample-every 0 --out "$dir/ag"
refuse "more alive than there are" 2 "--splats-alive" $train $tiny --splats-alive 60 --out "$dir/x"
refuse "no such way to adapt" 2 "--adapt" $train $tiny --adapt always --out "$dir/x"
refuse "adaptation without splats" 2 "--adapt" $train $tiny --attention standard --adapt grow --out "$dir/x"
refuse "precision of another model's splats" 2 "--splat-precision" $train $tiny \
    --splat-init "$dir/ad/model_00000040.bin" --splat-precision 2 --out "$dir/x"
refuse "amplitude of another model's splats" 2 "--splat-amplitude" $train $tiny \
    --splat-init "$dir/ad/model_00000040.bin" --splat-amplitude 2 --out "$dir/x"
refuse "amplitudes that cancel" 2 "--splat-amplitude" $train $tiny --mixer linear --splat-amplitude 0.1 --out "$dir/x"
while read -r what word rules; do
    refuse "rules: $what" 2 "$word" $train $tiny --adapt grow --adapt-rules "$rules" --out "$dir/x"
    grep -qF -- "--adapt-rules" "$dir/err" &&
        grep -qF "every life activation overlap coverage density pull" "$dir/err" ||
        fail "rules: $what: $(cat "$dir/err")"
done <<'END'
interval-of-0 every every=0
share-above-1 overlap life=5,overlap=2
half-a-step life life=0.5
unknown 'speed' pull=3,speed=2
doubled twice life=5,pull=3,life=6
no-value pull life=5,pull
no-number pull pull=much
nothing rule life=5,
END
refuse "rules without splats" 2 "--adapt-rules" $train $tiny --attention standard --adapt-rules life=5 --out "$dir/x"
# a state of before --adapt-rules has a flag for each rule; four lines that say nothing make room for the longer ones
rm -rf "$dir/af" && mkdir "$dir/af" && cp "$dir/ad/model_00000020.bin" "$dir/af"
rules='every life activation overlap coverage density pull'
LC_ALL=C sed -e '/^preset=$/d' -e '/^data=$/d' -e '/^val=$/d' -e '/^tokenizer=$/d' \
    -e "/^adapt-rules=/{s/^adapt-rules=/adapt-/$(printf ';s/,\\(%s\\)=/\\nadapt-\\1=/' ${rules#every });}" \
    "$dir/ad/state_00000020.bin" >"$dir/af/state_00000020.bin"
check "an old state" sh -c "[ \$(wc -c <'$dir/ad/state_00000020.bin') = \$(wc -c <'$dir/af/state_00000020.bin') ] &&
    grep -aqx 'adapt-activation=0.95' '$dir/af/state_00000020.bin' &&
    ! grep -aq '^adapt-rules' '$dir/af/state_00000020.bin'"
refuse "other rules for an old state" 1 "contradicts" $train --resume \
    --adapt-rules every=6,life=5,activation=0.95 --out "$dir/af"
check "an old state resumed, its rules given again" sh -c "$train --resume \
    --adapt-rules activation=0.95,life=5,every=5 --out '$dir/af' &&
    cmp '$dir/ad/model_00000040.bin' '$dir/af/model_00000040.bin' &&
    cmp '$dir/ad/state_00000040.bin' '$dir/af/state_00000040.bin'"
refuse "alive splats of another model" 2 "--splats-alive" $train $tiny --splat-init "$dir/ad/model_00000040.bin" \
    --splats-alive 2 --out "$dir/x"

check "another seed gives another model" \
    sh -c "$train $run --seed 2 --out '$dir/d' && ! cmp -s '$dir/a/model_00000020.bin' '$dir/d/model_00000020.bin'"
check "resume of a finished run does nothing" $train --resume --out "$dir/a"

# ---- an interrupt saves, says where, and can be resumed
$train $tiny --steps 100000 --eval-every 0 --out "$dir/i" >"$dir/i.txt" 2>&1 &
pid=$!
for _ in $(seq 30); do
    grep -q '^step 1/' "$dir/i.txt" && break
    sleep 1
done
kill -INT $pid
wait $pid
status=$?
if [ $status -eq 130 ] && grep -q '^interrupted; go on with --resume' "$dir/i.txt" && ls "$dir"/i/model_*.bin \
    >/dev/null 2>&1; then pass; else fail "interrupt: status $status: $(tail -n 2 "$dir/i.txt")"; fi

# ---- every attention, position, covariance and envelope trains, resumes bit for bit and generates
for mode in "--attention standard --pos learned" "--attention standard --pos rope" \
    "--attention gsa --pos both --covariance diag" "--attention hybrid --envelope none --splats 7" \
    "--attention hybrid --gsa-heads 0:1,1:0-1 --splats 3 --covariance diag --schedule wsd" \
    "--attention hybrid --gsa-heads 1 --accum 2 --doc-start --schedule constant"; do
    rm -rf "$dir/m" "$dir/n"
    check "train $mode" $train $tiny $mode --steps 4 --save-every 2 --eval-every 2 --out "$dir/m"
    mkdir "$dir/n" && cp "$dir"/m/*_00000002.bin "$dir/n"
    check "resume $mode" $train --resume --out "$dir/n"
    check "same model $mode" cmp "$dir/m/model_00000004.bin" "$dir/n/model_00000004.bin"
    check "generate $mode" $infer generate "$dir/m/model_00000004.bin" "Once" --tokens 12 --temperature 0
done
by_heart="--steps 150 --lr 5e-3 --warmup 5 --overfit-batch --eval-every 0"
check "overfit one batch" \
    sh -c "$train $tiny $by_heart --out '$dir/o' | grep 'step 150/150 | loss 0\.[0-4]'"

# ---- linear mixers, windows, extra and extended heads: the same; then encoders, which fill instead
for mode in "--attention gsa --mixer linear" \
    "--attention gsa --mixer linear --envelope decay --covariance full --pos learned" \
    "--attention gsa --mixer linear --envelope none --covariance diag --splats 64" \
    "--attention gsa --covariance full" "--attention standard --window 8 --pos both" \
    "--attention hybrid --mixer linear --window 8" "--attention hybrid --window 1 --accum 2" "--attention augment" \
    "--attention augment --gsa-heads 3 --mixer linear --window 5" "--attention extend --window 8" \
    "--attention extend --window 1 --gsa-heads 1 --covariance diag --envelope decay --pos learned" \
    "--attention extend" "--attention hybrid --no-sphere --covariance diag" \
    "--attention gsa --mixer linear --no-sphere --unbounded precision,centre,amplitude,frequency,decay" \
    "--objective mlm --attention gsa --mixer linear" "--objective mlm --attention hybrid --window 8" \
    "--objective mlm --attention standard --pos learned" \
    "--objective mlm --attention augment --mixer linear --accum 2"; do
    rm -rf "$dir/m" "$dir/n"
    check "train $mode" $train $tiny $mode --steps 4 --save-every 2 --eval-every 2 --out "$dir/m" --threads 2
    mkdir "$dir/n" && cp "$dir"/m/*_00000002.bin "$dir/n"
    check "resume $mode" $train --resume --out "$dir/n" --threads 1
    check "same model $mode" cmp "$dir/m/model_00000004.bin" "$dir/n/model_00000004.bin"
    case $mode in
    *mlm*)
        $infer fill "$dir/m/model_00000004.bin" 'The [MASK] sat[MASK].' >"$dir/out" 2>"$dir/err"
        if [ $? -eq 0 ] && LC_ALL=C grep -aq '^The.*sat.*[.]$' "$dir/out" && ! grep -aqF '[MASK]' "$dir/out" && \
            [ "$(LC_ALL=C grep -ac '%$' "$dir/err")" = 2 ]; then pass
        else fail "fill $mode: $(cat "$dir/out" "$dir/err")"; fi
        refuse "generate $mode" 1 "encoder" $infer generate "$dir/m/model_00000004.bin" "Once"
        refuse "perplexity $mode" 1 "encoder" $infer perplexity "$dir/m/model_00000004.bin" "$0"
        refuse "score $mode" 1 "encoder" $infer score "$dir/m/model_00000004.bin" "$0"
        ;;
    *)
        check "generate $mode" $infer generate "$dir/m/model_00000004.bin" "Once" --tokens 24 --temperature 0
        refuse "fill $mode" 1 "decoder" $infer fill "$dir/m/model_00000004.bin" "The [MASK] sat."
        ;;
    esac
done
refuse "fill without a mask" 1 "[MASK]" $infer fill "$dir/m/model_00000004.bin" "The cat sat."
refuse "fill without a text" 2 "text" $infer fill "$dir/m/model_00000004.bin"
refuse "fill a long text" 1 "tokens" $infer fill "$dir/m/model_00000004.bin" "[MASK] $(head -c 500 "$0")"
check "an encoder learns a batch with its masks by heart" \
    sh -c "$train $tiny --objective mlm --attention gsa --mixer linear $by_heart --out '$dir/e' | \
    grep 'step 150/150 | loss 0\.[0-4]'"

# ---- other starts of the splats
for start in kmeans pca; do
    check "start from $start" $train $tiny --attention hybrid --mixer linear --splat-init $start --steps 2 \
        --out "$dir/$start" --threads 2
    check "start from $start again" $train $tiny --attention hybrid --mixer linear --splat-init $start --steps 2 \
        --out "$dir/$start.2" --threads 1
    check "the same model from $start" cmp "$dir/$start/model_00000002.bin" "$dir/$start.2/model_00000002.bin"
done
check "k-means is not principal components" \
    sh -c "! cmp -s '$dir/kmeans/model_00000002.bin' '$dir/pca/model_00000002.bin'"
check "start from another model's splats" $train $tiny --attention hybrid --mixer linear \
    --splat-init "$dir/kmeans/model_00000002.bin" --steps 2 --out "$dir/file"
refuse "splats of another number" 1 "tensor mu" $train $tiny --attention hybrid --mixer linear --splats 4 \
    --splat-init "$dir/kmeans/model_00000002.bin" --out "$dir/x"
refuse "splats of another precision" 1 "tensor log_precision" $train $tiny --attention hybrid --mixer linear \
    --covariance diag --splat-init "$dir/kmeans/model_00000002.bin" --out "$dir/x"
refuse "splats of another envelope" 1 "tensor log_theta" $train $tiny --attention hybrid --mixer linear \
    --envelope none --splat-init "$dir/kmeans/model_00000002.bin" --out "$dir/x"
check "a model without splats" $train $tiny --attention standard --steps 1 --eval-every 0 --out "$dir/plain"
refuse "the splats of a model without any" 1 "tensor mu" $train $tiny --attention gsa \
    --splat-init "$dir/plain/model_00000001.bin" --out "$dir/x"

# ---- deliberately bad runs: finite to the end, or a sentence that says which splat parameters left their bounds;
# never a NaN in the log
for mode in "gsa" "gsa --covariance full" "gsa --mixer linear" "gsa --mixer linear --covariance full" \
    "hybrid --mixer linear --window 8" "augment --mixer linear --covariance diag" "extend --window 8" \
    "gsa --mixer linear --objective mlm"; do
    for bad in "--lr 0.02" "--lr 0.3 --warmup 0 --clip 0"; do
        rm -rf "$dir/bad"
        $train $tiny --attention $mode --splat-precision 400 $bad --steps 60 --eval-every 20 --out "$dir/bad" \
            >"$dir/bad.txt" 2>"$dir/err"
        status=$?
        if grep -v cfg: "$dir/bad/main.log" | grep -qi 'nan\|inf'; then
            fail "bad run $mode $bad: not finite: $(cat "$dir/err")"
        elif [ $status -eq 0 ] && grep -q '^step 60/60 | validation loss [0-9.]* ' "$dir/bad.txt" &&
            grep -q 'put back into bounds: [a-z]* [0-9]' "$dir/bad.txt"; then pass
        elif [ $status -eq 1 ] && grep -q 'out of bounds before: [a-z]* [0-9]' "$dir/err"; then pass
        else fail "bad run $mode $bad: status $status: $(tail -n 1 "$dir/err")"; fi
    done
done
check "a start out of bounds stays where the bound is off" $train $tiny --attention gsa --splat-precision 50 \
    --unbounded precision --steps 3 --out "$dir/unbounded"
check "and no precision is put back" \
    sh -c "! grep -q 'splat-precision 50 is out' '$dir/out' && ! grep -q 'into bounds: precision' '$dir/out'"
four="[0-9.]*,[0-9.]*,[0-9.]*,[0-9.]*" # two heads in each of two layers
check "entropy and distance of every head in the log" \
    grep -q "^s:0 ent:[0-9.]* dst:[0-9.]* rch:[0-9]* ents:$four dsts:$four\$" "$dir/unbounded/main.log"
for again in "" --recompute; do
    check "k-means $again" $train $tiny --attention gsa --splat-init kmeans --steps 2 --save-every 0 \
        --out "$dir/k$again" $again
done
check "keys of recomputed blocks, same model" cmp "$dir/k/model_00000002.bin" "$dir/k--recompute/model_00000002.bin"
check "a start out of bounds is said and put right" \
    grep -q 'splat-precision 400 is out of bounds: all splats start with 40' "$dir/bad.txt"

# ---- text to shards to a model; the trainer's validation loss is what infer measures
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
check "a standard model" $train $data $standard --forget-gate all --lr 1e-2 --warmup 5 --steps 60 \
    --eval-every 60 --out "$dir/st"
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
check "turned and trained" $train $data --init-from "$dir/st/model_00000060.bin" --attention hybrid --fit 5 --batch 4 \
    --steps 4 --save-every 2 --keep 0 --sample-every 0 --out "$dir/st.long"
mkdir "$dir/st.again" && cp "$dir/st.long/model_00000002.bin" "$dir/st.long/state_00000002.bin" "$dir/st.again"
check "resumed as without a break, its state too" sh -c "$train --resume --out '$dir/st.again' &&
    cmp '$dir/st.long/model_00000004.bin' '$dir/st.again/model_00000004.bin' &&
    cmp '$dir/st.long/state_00000004.bin' '$dir/st.again/state_00000004.bin'"
check "all heads into splats, with phases" $turn --attention gsa --phase learned --splats 3 --fit 5 --out "$dir/st.gsa"
check "a standard model of windows" $train $data $standard --window 8 --steps 1 --eval-every 0 --out "$dir/st.narrow"
check "all its heads into splats" $train $data --init-from "$dir/st.narrow/model_00000001.bin" --attention gsa --fit 5 \
    --batch 4 --steps 1 --sample-every 0 --out "$dir/st.wide"
refuse "into splats, all of them within a window" 2 "--window" $train $data \
    --init-from "$dir/st.narrow/model_00000001.bin" --attention gsa --window 8 --batch 4 --steps 1 --out "$dir/x"
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
check "gates in half of the heads" $train $data $standard --forget-gate half --lr 1e-2 --warmup 5 --steps 40 \
    --eval-every 40 --out "$dir/st.half"
turn="$train $data --init-from $dir/st.half/model_00000040.bin --batch 4 --steps 1 --lr 0 --eval-every 1"
turn="$turn --sample-every 0"
check "into splats, one head of either half" $turn --attention hybrid --gsa-heads 0:1-2,1:0,1:3 --fit 0 \
    --out "$dir/st.half2"
check "heads with and without gates attend as before" \
    sh -c "[ -n '$(entropies "$dir/st.half" 40 1,4)' ] &&
        [ '$(entropies "$dir/st.half" 40 1,4)' = '$(entropies "$dir/st.half2" 0 1,4)' ]"
check "into splats, the nearest of either half" $turn --attention hybrid --fit 5 --out "$dir/st.half3"
refuse "into splats: a head would get a gate" 2 "head 0:2 would get" $turn --attention hybrid --gsa-heads 0:0-1 \
    --out "$dir/x"
set +f
long=$(printf '%600s' '' | sed 's| |./|g') # a text of any length survives in a state file
check "train on shards with a long name" $train --data "$dir/${long}s_train_*.bin" --tokenizer "$dir/t.bin" $shape \
    --steps 4 --save-every 2 --keep 0 --out "$dir/long"
mkdir "$dir/longer" && cp "$dir"/long/*_00000002.bin "$dir/longer"
check "resume with a long name" sh -c "$train --resume --out '$dir/longer' &&
    cmp '$dir/long/model_00000004.bin' '$dir/longer/model_00000004.bin' &&
    cmp '$dir/long/state_00000004.bin' '$dir/longer/state_00000004.bin'"
refuse "a name that would break a state file" 2 "line break" $train --data "$dir/s_train_*.bin
steps=9" --tokenizer "$dir/t.bin" $shape --out "$dir/x"

check "a vocabulary of 385" $train_bpe --vocab 385 --out "$dir/t385.bin" "$dir/train.txt"
# ---- shards may move between a run and its resumption; what is in them may not change
mkdir "$dir/old" "$dir/new" "$dir/new/other" && cp "$dir"/s_*.bin "$dir/t.bin" "$dir/old"
$train --data "$dir/old/s_train_000000.bin" --val "$dir/old/s_val_000000.bin" --tokenizer "$dir/old/t.bin" $shape \
    --steps 4 --save-every 2 --keep 0 --out "$dir/moved" >/dev/null
again() { rm -rf "$dir/moved2" && mkdir "$dir/moved2" && cp "$dir"/moved/*_00000002.bin "$dir/moved2"; }
mv "$dir"/old/* "$dir/new"
again
refuse "resume where the shards have moved" 1 "old/s_train" $train --resume --out "$dir/moved2"
check "their new place" $train --resume --data "$dir/new/s_train_*.bin" --val "$dir/new/s_val_000000.bin" \
    --tokenizer "$dir/new/t.bin" --out "$dir/moved2"
check "the same model from there" cmp "$dir/moved/model_00000004.bin" "$dir/moved2/model_00000004.bin"
check "the new place is remembered" grep -aqF "data=$dir/new/s_train_*.bin" "$dir/moved2/state_00000004.bin"
for kind in train val; do # the same number of tokens, the last of them another
    cp "$dir/new/s_${kind}_000000.bin" "$dir/new/other/$kind.bin"
    patch "$dir/new/other/$kind.bin" $(($(wc -c <"$dir/new/other/$kind.bin") - 2)) '\1\1'
done
again
refuse "other training data" 1 "--data $dir/new/other/train.bin" $train --resume --data "$dir/new/other/train.bin" \
    --val "$dir/new/s_val_000000.bin" --out "$dir/moved2"
refuse "other validation data" 1 "--val $dir/new/other/val.bin" $train --resume --out "$dir/moved2" \
    --data "$dir/new/s_train_000000.bin" --val "$dir/new/other/val.bin"
refuse "data for a run on stories" 1 "--data" $train --resume --data "$dir/new/s_train_000000.bin" --out "$dir/c"
refuse "another tokenizer" 1 "t385.bin" $train --resume --data "$dir/new/s_train_000000.bin" \
    --val "$dir/new/s_val_000000.bin" --tokenizer "$dir/t385.bin" --out "$dir/moved2"
cp "$dir"/new/other/train.bin "$dir/old/s_train_000000.bin" && cp "$dir"/new/s_val_000000.bin "$dir/old"
refuse "other data under the old name" 1 "--data $dir/old/s_train_000000.bin" $train --resume --out "$dir/moved2"
# a state of before there was a hash: its entry gets a name that nobody asks for
LC_ALL=C sed 's/data\x00\x00/past\x00\x00/' "$dir/moved/state_00000002.bin" >"$dir/moved2/state_00000002.bin"
check "an old state takes a new place, with a warning" sh -c "$train --resume --data '$dir/new/s_train_000000.bin' \
    --val '$dir/new/s_val_000000.bin' --out '$dir/moved2' 2>'$dir/one' && grep -q 'not checked' '$dir/one' &&
    cmp '$dir/moved/model_00000004.bin' '$dir/moved2/model_00000004.bin'"

# ---- a vocabulary without [MASK] that fills its padding: the mask gets a row of its own
head -c -7 "$dir/t385.bin" >"$dir/t384.bin" # without its last entry
patch "$dir/t384.bin" 8 '\200\001\0\0' && patch "$dir/t384.bin" 16 '\0\0\0\0'
check "prepare without a mask" $prepare --tokenizer "$dir/t384.bin" --out "$dir/u" "$dir/train.txt"
set -f
check "an encoder on shards without a mask" $train --data "$dir/u_train_*.bin" --tokenizer "$dir/t384.bin" $shape \
    --objective mlm --steps 3 --out "$dir/u"
set +f
check "its norm is that of a start" \
    sh -c "sed -n 's/^s:1 trl.* norm:\([0-9.]*\) .*/\1/p' '$dir/u/main.log' | awk '{ exit !(\$1 > 0 && \$1 < 10) }'"
check "it fills" $infer fill "$dir/u/model_00000003.bin" "The [MASK] sat."

model=$dir/p/model_00000006.bin
$infer perplexity "$model" "$dir"/s_val_000000.bin >"$dir/ppl" 2>/dev/null
trained=$(sed -n 's/^s:6 tel://p' "$dir/p/main.log") measured=$(sed -n 's/^loss \([0-9.]*\) .*/\1/p' "$dir/ppl")
# infer also measures the tokens after the last full window, up to 31 of some thousands
if awk "BEGIN { d = ($trained + 0) - ($measured + 0); exit !($trained > 0 && d < 0.01 && d > -0.01) }"; then pass; \
    else fail "validation loss $trained in training, $measured by infer perplexity"; fi
check "perplexity of a text" $infer perplexity "$model" "$dir/val.txt"
check "the text gives what its shard gives" sh -c "grep '^loss' '$dir/ppl' >'$dir/one' && \
    $infer perplexity '$model' '$dir/val.txt' --batch 3 2>/dev/null | grep '^loss' | cmp - '$dir/one'"

# ---- windows that overlap; tasks
for stride in 1 5 31 32; do
    $infer perplexity "$model" "$dir/s_val_000000.bin" --stride $stride >"$dir/stride.$stride" 2>/dev/null
    check "stride $stride: as many tokens" sh -c "head -n 1 '$dir/ppl' | cut -d, -f 1 >'$dir/one' && \
        head -n 1 '$dir/stride.$stride' | cut -d, -f 1 | cmp - '$dir/one'"
done
check "a stride of the window is none" \
    sh -c "sed 1d '$dir/ppl' >'$dir/one' && sed 1d '$dir/stride.32' | cmp - '$dir/one'"
check "the table's tokens are all tokens" awk '
    /^tokens/ { n = $2 + 0 }
    /\+-/ && !/^perplexity/ { for (i = 1; i <= NF; i++) if ($i == "+-") sum += $(i - 2) }
    END { exit !(n > 0 && n == sum) }' "$dir/ppl"
refuse "a stride beyond the window" 2 "--stride 33" $infer perplexity "$model" "$dir/val.txt" --stride 33
for form in choice last-word; do
    check "tasks: $form" $make_stories --tasks $form --count 20 --seed 5 --out "$dir/$form.jsonl"
done
check "score choices" sh -c "$infer score '$model' '$dir/choice.jsonl' --threads 2 | \
    grep '^choice: 20 tasks, accuracy 0[0-9.]* +- 0[0-9.]*, normalised 0[0-9.]* +- 0[0-9.]*, by chance 0.2500$' \
    >'$dir/one'"
check "score last words" sh -c "$infer score '$model' '$dir/last-word.jsonl' | \
    grep '^last word: 20 tasks, accuracy 0[0-9.]*\( +- 0[0-9.]*\)*, log-likelihood -[0-9.]* +- [0-9.]*$' >'$dir/two'"
check "both at once, one thread, from standard input" sh -c "cat '$dir/choice.jsonl' '$dir/last-word.jsonl' | \
    $infer score '$model' - --threads 1 >'$dir/both' && cat '$dir/one' '$dir/two' | cmp - '$dir/both'"
while read -r word line; do
    { head -n 2 "$dir/choice.jsonl" && echo && echo "$line"; } >"$dir/bad.jsonl"
    refuse "task $line" 1 "bad.jsonl, line 4: $word" $infer score "$model" "$dir/bad.jsonl"
    grep -qF -e "$word" "$dir/err" || fail "task $line: $(cat "$dir/err")"
done <<'END'
not {"ctx":"a","endings":["b","c"],"label":1
not ["ctx"]
not hello
not {"text":"a b"} {"text":"a b"}
a {"ctx":"a"}
a {"ctx":"a","endings":["b","c"],"label":1,"text":"a b"}
"ctx" {"endings":["b","c"],"label":1}
"endings" {"ctx":"a","endings":["b"],"label":0}
"endings" {"ctx":"a","endings":"bc","label":0}
"endings" {"ctx":"a","endings":["b",1],"label":0}
"endings" {"ctx":"a","endings":["b"," "],"label":0}
"label" {"ctx":"a","endings":["b","c"]}
"label" {"ctx":"a","endings":["b","c"],"label":2}
"label" {"ctx":"a","endings":["b","c"],"label":-1}
"label" {"ctx":"a","endings":["b","c"],"label":0.5}
"label" {"ctx":"a","endings":["b","c"],"label":"1x"}
"text" {"text":"alone"}
"text" {"text":["a b"]}
END
: >"$dir/empty.jsonl"
refuse "no tasks" 1 "no tasks" $infer score "$model" "$dir/empty.jsonl"
refuse "score without tasks" 2 "tasks" $infer score "$model"

# ---- a checkpoint of llm.c: 8 words, then the tensors, which in these sizes are the tail of our own file
set -f
check "train a GPT-2" $train $data $shape --attention standard --pos learned --steps 4 --out "$dir/gpt2"
set +f
gpt2=$dir/gpt2/model_00000004.bin llmc=$dir/llmc.bin
{ printf '\306\327\064\001\003\0\0\0\040\0\0\0\220\001\0\0\001\0\0\0\002\0\0\0\040\0\0\0\0\002\0\0' && head -c 992 \
    /dev/zero && tail -c $((4 * 30176)) "$gpt2"; } >"$llmc"
for what in "generate FILE Once --tokens 9 --seed 3" "perplexity FILE $dir/val.txt"; do
    check "${what%% *} ours" sh -c "$infer $(echo "$what" | sed "s|FILE|$gpt2|") >'$dir/ours'"
    check "${what%% *} llm.c's as ours" \
        sh -c "$infer $(echo "$what" | sed "s|FILE|$llmc|") --tokenizer '$dir/t.bin' | cmp - '$dir/ours'"
done
set -f
check "train on from llm.c's" $train $data --init-from "$llmc" --batch 4 --steps 2 --sample-every 0 --out "$dir/llmc.on"
check "train on from ours" $train $data --init-from "$gpt2" --batch 4 --steps 2 --sample-every 0 --out "$dir/gpt2.on"
check "llm.c's into splats" $train $data --init-from "$llmc" --attention hybrid --fit 5 --batch 4 --steps 2 \
    --sample-every 0 --out "$dir/llmc.into"
check "ours into splats" $train $data --init-from "$gpt2" --attention hybrid --fit 5 --batch 4 --steps 2 \
    --sample-every 0 --out "$dir/gpt2.into"
set +f
check "to the same model" cmp "$dir/llmc.on/model_00000002.bin" "$dir/gpt2.on/model_00000002.bin"
check "into the same splats" cmp "$dir/llmc.into/model_00000002.bin" "$dir/gpt2.into/model_00000002.bin"
check "report of llm.c's" $infer report "$llmc" Once --tokenizer "$dir/t.bin" -o "$dir/r.html"
check "the tokenizer of a model, given again" $infer generate "$gpt2" Once --tokens 2 --tokenizer "$dir/t.bin"
refuse "another tokenizer than the model's" 1 "t385.bin" $infer generate "$gpt2" Once --tokenizer "$dir/t385.bin"
refuse "llm.c's without a tokenizer" 1 "--tokenizer" $infer generate "$llmc" Once
refuse "llm.c's with a tokenizer of another size" 1 "385" $infer generate "$llmc" Once --tokenizer "$dir/t385.bin"
refuse "train: llm.c's without a tokenizer" 1 "--tokenizer" $train --init-from "$llmc" --out "$dir/x"
refuse "train: splats of llm.c's" 1 "tensor mu" $train $tiny --attention gsa --splat-init "$llmc" --out "$dir/x"
refuse "fill with llm.c's" 1 "decoder" $infer fill "$llmc" "a [MASK]" --tokenizer "$dir/t.bin"
for wrong in "4 \001 version" "24 \377\377 --channels" "12 \377\377\377\377 vocabulary" "8 \377\377\377\177 --seq" \
    "8 \041 bytes"; do
    set -- $wrong
    cp "$llmc" "$dir/wrong.bin" && patch "$dir/wrong.bin" $1 "$2"
    refuse "llm.c's with word $(($1 / 4)) wrong" 1 "$3" $infer generate "$dir/wrong.bin" Once --tokenizer "$dir/t.bin"
done
head -c 100000 "$llmc" >"$dir/wrong.bin"
refuse "llm.c's cut off" 1 "truncated" $infer generate "$dir/wrong.bin" Once --tokenizer "$dir/t.bin"

# ---- to safetensors and back, every byte; a safetensors file from elsewhere has no metadata of ours
python=python3
$python -c 'import numpy' 2>/dev/null || python=/usr/bin/python3 # Debian's numpy is for Debian's python
if $python -c 'import numpy' 2>/dev/null; then
    check "train with phases, to convert" $train $tiny --phase learned --steps 1 --out "$dir/ph"
    for file in "$gpt2" "$dir/p/model_00000006.bin" "$dir/m/model_00000004.bin" "$dir/u/model_00000003.bin" \
        "$dir/kmeans/model_00000002.bin" "$dir/ph/model_00000001.bin"; do
        rm -rf "$dir/folder"
        check "convert $file" $python dev/convert.py "$file" "$dir/folder"
        check "convert $file back" $python dev/convert.py "$dir/folder" "$dir/back.bin"
        check "$file there and back" cmp "$file" "$dir/back.bin"
    done
    # a model and a folder in which the splats' tensors have the names of before
    check "train a model with all splats' tensors" $train $tiny --attention extend --window 8 --steps 1 --out "$dir/all"
    cat >"$dir/rename.py" <<'END'
import json, struct, sys
before = {"log_precision": "lnp", "log_alpha": "lnalpha", "log_alpha_reference": "lnalpha0", "log_theta": "lntheta",
          "log_delta": "lndelta", "log_far": "lng"}
model, old, folder = sys.argv[1:]
data, used = bytearray(open(model, "rb").read()), set()
for i in range(struct.unpack_from("<i", data, 12)[0]):  # entries of 120 bytes, each begins with a name of 64
    name = data[1024 + 120 * i:][:64].rstrip(b"\0").decode()
    if name in before:
        used.add(name)
        struct.pack_into("64s", data, 1024 + 120 * i, before[name].encode())
assert used == set(before), used
open(old, "wb").write(data)
path = folder + "/model.safetensors"
data = open(path, "rb").read()
end = 8 + struct.unpack("<Q", data[:8])[0]
header = json.loads(data[8:end])
ours = json.loads(header["__metadata__"]["gsa"])
ours["directory"] = [[before.get(name, name), *rest] for name, *rest in ours["directory"]]
header["__metadata__"]["gsa"] = json.dumps(ours)
text = json.dumps({"gsa." + before[k[4:]] if k[4:] in before else k: t for k, t in header.items()}).encode()
open(path, "wb").write(struct.pack("<Q", len(text)) + text + data[end:])
END
    model_of_all=$dir/all/model_00000001.bin
    check "convert all" $python dev/convert.py "$model_of_all" "$dir/old_folder"
    check "give its tensors their old names" $python "$dir/rename.py" "$model_of_all" "$dir/old.bin" "$dir/old_folder"
    check "a folder with old names" $python dev/convert.py "$dir/old_folder" "$dir/back.bin"
    check "becomes the model of today" cmp "$model_of_all" "$dir/back.bin"
    check "a model with old names" $python dev/convert.py "$dir/old.bin" "$dir/folder"
    check "and back" $python dev/convert.py "$dir/folder" "$dir/back.bin"
    check "becomes the model of today, too" cmp "$model_of_all" "$dir/back.bin"
    rm -rf "$dir/folder"
    check "convert a GPT-2" $python dev/convert.py "$gpt2" "$dir/folder"
    cat >"$dir/foreign.py" <<'END' # as from elsewhere: other order of tensors, a prefix, no metadata
import json, struct, sys
data = open(sys.argv[1], "rb").read()
n = struct.unpack("<Q", data[:8])[0]
header, raw = json.loads(data[8:8 + n]), data[8 + n:]
del header["__metadata__"]
new, out = {}, b""
for name in sorted(header):
    begin, end = header[name]["data_offsets"]
    new["transformer." + name] = dict(header[name], data_offsets=[len(out), len(out) + end - begin])
    out += raw[begin:end]
text = json.dumps(new).encode()
open(sys.argv[1], "wb").write(struct.pack("<Q", len(text)) + text + out)
END
    $python "$dir/foreign.py" "$dir/folder/model.safetensors"
    check "convert a foreign GPT-2" $python dev/convert.py "$dir/folder" "$dir/back.bin"
    check "its words are ours" sh -c "$infer perplexity '$gpt2' '$dir/val.txt' >'$dir/ours' && \
        $infer perplexity '$dir/back.bin' '$dir/val.txt' | cmp - '$dir/ours'"
    cat >"$dir/change.py" <<'END' # a folder's GPT-2 changed: FOLDER NEW CHANGE
import json, os, shutil, struct, sys
import numpy as np
old, new, change = sys.argv[1:]
shutil.rmtree(new, ignore_errors=True)
shutil.copytree(old, new)
path = new + "/model.safetensors"
data = open(path, "rb").read()
n = struct.unpack("<Q", data[:8])[0]
header, raw = json.loads(data[8:8 + n]), data[8 + n:]
out, parts, at = {}, [], 0
for name, t in header.items():
    a = np.frombuffer(raw[slice(*t["data_offsets"])], "<f4").reshape(t["shape"])
    matrix = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
    if matrix and (change == "turn" or (change == "turn some" and "c_fc" in name)):
        a = a.T
    if change == "pad" and name.endswith("wte.weight"):
        a = np.concatenate([a, np.ones((512 - len(a), a.shape[1]), "<f4")])
    if change == "flat" and name.endswith("0.ln_1.weight"):
        a = a.reshape(1, -1)
    if change == "F64":
        a = a.astype("<f8")
    part = np.ascontiguousarray(a).tobytes()
    out[name] = {"dtype": "F64" if change == "F64" else "F32", "shape": a.shape, "data_offsets": [at, at + len(part)]}
    parts.append(part)
    at += len(part)
text = json.dumps(out).encode()
open(path, "wb").write(struct.pack("<Q", len(text)) + text + b"".join(parts))
if change == "sharded":
    os.rename(path, new + "/model-00001-of-00002.safetensors")
    open(path + ".index.json", "w").write("{}")
config = json.load(open(new + "/config.json"))
if change == "pad":
    config["vocab_size"] = 512
if change == "heads":
    config["n_head"] = 7
open(new + "/config.json", "w").write("[1]" if change == "list" else json.dumps(config))
END
    for change in turn pad; do
        check "change it: $change" $python "$dir/change.py" "$dir/folder" "$dir/changed" "$change"
        check "convert it: $change" $python dev/convert.py "$dir/changed" "$dir/changed.bin"
        check "it is the same model: $change" cmp "$dir/back.bin" "$dir/changed.bin"
    done
    for change in "turn some:some (out, in)" "flat:ln_1.weight" "F64:is F64" "sharded:several files" \
        "heads:n_head is 7" "list:not an object"; do
        check "change it: ${change%%:*}" $python "$dir/change.py" "$dir/folder" "$dir/changed" "${change%%:*}"
        refuse "convert it: ${change%%:*}" 1 "${change#*:}" $python dev/convert.py "$dir/changed" "$dir/changed.bin"
    done
    refuse "convert into a folder that is missing" 1 "cannot write" \
        $python dev/convert.py "$dir/folder" "$dir/missing/model.bin"
    refuse "convert from a folder that is missing" 1 "cannot read" \
        $python dev/convert.py "$dir/missing" "$dir/changed.bin"
    check "convert for transformers" $python dev/convert.py "$gpt2" "$dir/plain_hf" --hf
    check "convert another for transformers" $python dev/convert.py "$model_of_all" "$dir/hf" --hf
    for change in "n_head 0" "n_layer null" "n_embd true" 'vocab_size "300"' "gsa_heads 3" "gsa_heads [[0]]"; do
        rm -rf "$dir/changed" && cp -r "$dir/hf" "$dir/changed"
        $python - "$dir/changed/config.json" $change <<'END'
import json, sys
config = json.load(open(sys.argv[1]))
config[sys.argv[2]] = json.loads(sys.argv[3])
json.dump(config, open(sys.argv[1], "w"))
END
        refuse "config.json: $change" 1 "config.json: ${change%% *} is" $python dev/convert.py "$dir/changed" \
            "$dir/changed.bin"
    done
    refuse "convert: nobody reads what it says" 1 "cannot write standard output" \
        sh -c "$python dev/convert.py '$gpt2' '$dir/mute' >/dev/full"
    rm "$dir/folder/tokenizer.bin"
    check "convert it without a tokenizer" $python dev/convert.py "$dir/folder" "$dir/back.bin"
    check "it takes one from a file" \
        sh -c "$infer perplexity '$dir/back.bin' '$dir/val.txt' --tokenizer '$dir/t.bin' | cmp - '$dir/ours'"
    refuse "it needs one" 1 "--tokenizer" $infer perplexity "$dir/back.bin" "$dir/val.txt"
    head -c 5000 "$dir/folder/model.safetensors" >"$dir/short" && mv "$dir/short" "$dir/folder/model.safetensors"
    refuse "convert a truncated file" 1 "model.safetensors" $python dev/convert.py "$dir/folder" "$dir/back.bin"
    head -c 50000 "$gpt2" >"$dir/short"
    refuse "convert a truncated model" 1 "short" $python dev/convert.py "$dir/short" "$dir/folder"
else
    echo "skip safetensors: no python3 with numpy"
    skipped=$((skipped + 1))
fi

# ---- what splats mean
set -f
check "train all heads with splats" $train $data $shape --steps 1 --attention gsa --out "$dir/splats_only"
check "train a standard twin" $train $data $shape --steps 1 --attention standard --out "$dir/twin"
set +f
all=$dir/splats_only/model_00000001.bin twin=$dir/twin/model_00000001.bin
loss_of() { # FLAG...: of the model, or of the one that $of names
    $infer perplexity "${of:-$model}" "$dir/val.txt" "$@" 2>/dev/null | sed -n 's/^loss \([0-9.]*\) .*/\1/p'
}
last=$(($($infer inspect "$model" --heads 0:1 2>/dev/null | sed -n 's/.* of \([0-9]*\) alive$/\1/p') - 1))
check "silenced splats change the loss" \
    sh -c "[ -n '$(loss_of)' ] && [ '$(loss_of)' != '$(loss_of --without 0:1:1-$last)' ]"
check "those of several heads change it more" \
    sh -c "[ -n '$(of=$all && loss_of --without 0:0:1-$last,0:1:1-$last)' ] &&
    [ '$(of=$all && loss_of --without 0:0:1-$last,0:1:1-$last)' != '$(of=$all && loss_of --without 0:1:1-$last)' ]"
check "generate without a splat" $infer generate "$model" "Once" --tokens 5 --without 0:1:0-2
refuse "generate: no splats there" 2 "layer 0, head 0" $infer generate "$model" "a" --without 0:0:1
refuse "perplexity: a splat too many" 2 "no splat 99" $infer perplexity "$model" "$dir/val.txt" --without 0:1:99
refuse "score: no list" 2 "layer:head:splat" $infer score "$model" "$dir/val.txt" --without 0:1
refuse "generate: a splat twice" 2 "named twice" $infer generate "$model" "a" --without 0:1:1,0:1:1
refuse "generate: a range backwards" 2 "behind" $infer generate "$model" "a" --without 0:1:3-1
refuse "generate: no splat left" 2 "without a splat" $infer generate "$model" "a" --without "0:1:0-$last"
check "inspect --text" $infer inspect "$model" --text "$dir/val.txt" --tokens 500 --show 2 --heads 0:1
cp "$dir/out" "$dir/meaning"
check "each splat has a name, a share, contributions and snippets" \
    sh -c "[ \$(grep -c '^splat 0:1:' '$dir/meaning') -gt 1 ] && ! grep -q '^splat 1:' '$dir/meaning' &&
    [ \$(grep -c '^splat' '$dir/meaning') = \$(grep -c 'adds to logits' '$dir/meaning') ] &&
    grep -q '% .*\[.*\]' '$dir/meaning'"
set -f
check "train splats with phases" $train $data $shape --steps 30 --phase learned --splat-lr 0.2 --out "$dir/phase"
set +f
check "inspect their distances" $infer inspect "$dir/phase/model_00000030.bin" --text "$dir/val.txt" --tokens 100
cp "$dir/out" "$dir/meaning"
# the wave cos(theta n - psi) again, by the numbers of the other table: it is about as large as it gets in the window of
# 32 tokens at the distances that are named
$infer inspect "$dir/phase/model_00000030.bin" >"$dir/table" 2>/dev/null
check "the distances that a splat favours are those in a window where its wave is largest" awk '
    FNR == NR { if (/^ *[0-9]+ +[0-9.]+ /) { turn[++splats] = $5; phase[splats] = $6 } next }
    /a turn of/ {
        seen++; most = -1; least = 1
        for (n = 0; n < 32; n++) {
            wave[n] = cos(6.283185307 * n / turn[seen] - phase[seen])
            if (wave[n] > most) most = wave[n]
            if (wave[n] < least) least = wave[n]
        }
        flat = most - least
        good = /no distance:/ ? flat < 0.12 : /shortest/ ? wave[0] == most : /longest/ ? wave[31] == most : flat > 0.08
        for (i = 9; i <= NF && / distances [0-9]/; i++)
            if ($i ~ /^[0-9]/) good = good && $i + 0 < 32 && wave[$i + 0] > most - 0.13
        if (!good) { print most, least ": " $0 >"/dev/stderr"; bad = 1 }
    }
    END { exit bad || seen != 8 || seen != splats }' "$dir/table" "$dir/meaning"
check "measure --classes --silence" $infer measure "$model" "$dir/val.txt" --tokens 1k --classes english --silence
cp "$dir/out" "$dir/meaning"
check "information of splats is below the entropy of classes, and above chance" \
    awk '/in nats of/ { gsub(";", ""); for (i = 1; i < NF; i++) if ($i == "nats") most = $(i + 2) }
    /^  all keys/ { sub(/\(/, " "); known = $3; chance = $NF }
    END { exit !(most > 0 && known > 0 && known < most && chance > 0 && chance < known) }' "$dir/meaning"
check "an effect of each of the eight splats, with its chance" \
    sh -c "[ \$(grep -c '^[01]:1:[0-9]* .*  *[01]\.[0-9]*  ' '$dir/meaning') = 8 ] &&
    grep -q 'have an effect' '$dir/meaning'"
refuse "measure: --silence alone" 2 "--classes" $infer measure "$model" "$dir/val.txt" --silence
seq 1 900 >"$dir/numbers.txt"
check "a text without words has no effects, and none that are not numbers" sh -c "
    $infer measure '$model' '$dir/numbers.txt' --tokens 1k --classes stories --silence >'$dir/one' &&
    ! grep -qi 'nan\|inf ' '$dir/one' && grep -q '^0 of .* have an effect' '$dir/one'"
refuse "inspect: nothing to read" 1 "standard input holds no text" $infer inspect "$model" --text -
for text in "" "--text $dir/val.txt"; do
    refuse "inspect: heads without splats $text" 2 "--heads '0:0'" $infer inspect "$model" --heads 0:0 $text
done

# a twin's standard heads stand for those that a layer has not: a model that is its own twin says what it says alone;
# the column of k-means elsewhere is the twin's, whatever model stands beside it
elsewhere() { # MODEL [TWIN]: that column, behind those of splats and of k-means there; or nothing
    $infer measure "$1" "$dir/val.txt" --tokens 1k --classes english ${2:+--twin "$2"} >"$dir/out" 2>"$dir/err" &&
        awk '/^  all keys/ { gsub(/\([^)]*\)/, ""); print $5; exit }' "$dir/out"
}
check "train a twin of another length" $train --depth 2 --seq 16 --batch 2 --steps 1 --vocab 300 --sample-every 0 \
    --attention standard --out "$dir/shorter"
check "no standard head, no k-means of one" [ "$(elsewhere "$all")" = - ]
check "a twin's stand for them" awk "BEGIN { exit !($(elsewhere "$all" "$twin") > 0) }"
check "a twin takes the place of own standard heads" \
    sh -c "[ '$(elsewhere "$model" "$twin")' = '$(elsewhere "$all" "$twin")' ] &&
    [ '$(elsewhere "$model" "$twin")' != '$(elsewhere "$model")' ]"
own=$(elsewhere "$model" "$model")
check "a model that is its own twin" [ -n "$own" -a "$own" = "$(elsewhere "$model")" ]
refuse "measure: --twin alone" 2 "--classes" $infer measure "$model" "$dir/val.txt" --twin "$twin"
refuse "measure: a twin of splats only" 1 "no standard heads" $infer measure "$model" "$dir/val.txt" \
    --classes english --twin "$all"
refuse "measure: a twin of another length" 1 "16 tokens of context" $infer measure "$model" "$dir/val.txt" \
    --classes english --twin "$dir/shorter/model_00000001.bin"

# ---- what heads do: the loss of the longest history is the loss of all; a GSA head taken out costs something; a short
# text is refused
check "measure" $infer measure "$model" "$dir/val.txt" --tokens 1k
cp "$dir/out" "$dir/measured"
check "a row for each head" \
    [ "$(grep -c '^ *0 *[01] \(standard\|splats, softmax\) *[0-9.]* *[0-9.]* *[0-9.]*$' "$dir/measured")" = 2 ]
check "the effective context is the shortest history from which on all losses are within 1 % of the last" awk '
    /^effective/ { said = $3 }
    /^loss [0-9]/ { loss = $2 }
    /^history/ { table = 1; next }
    table && NF == 2 { h[++n] = $1; l[n] = $2 }
    END {
        for (i = n; i > 0 && l[i] <= 1.01 * l[n]; i--) found = h[i]
        exit !(n > 4 && h[1] == 1 && h[n] == 25 && said == found)
    }' "$dir/measured"
check "losses without each kind of heads" \
    [ "$(grep -c '^loss without the 1 \(GSA\|standard\) heads [0-9.]*$' "$dir/measured")" = 2 ]
check "measure one window of what perplexity measures" \
    sh -c "$infer measure '$model' '$dir/val.txt' --tokens 1G 2>/dev/null | \
    sed -n 's/^loss \([0-9.]*\) .*/\1/p' >'$dir/one'; awk '{ d = \$1 - $measured; exit !(d < 0.01 && d > -0.01) }' \
    '$dir/one'"
check "measures do not depend on the batch" \
    sh -c "$infer measure '$model' '$dir/val.txt' --tokens 1k --batch 3 --threads 1 2>/dev/null | cmp - '$dir/measured'"
printf 'Too short.' >"$dir/tiny.txt"
refuse "measure: less than a window" 1 "window" $infer measure "$model" "$dir/tiny.txt"
refuse "measure without a text" 2 "file" $infer measure "$model"

# ---- recall: what the model would write is right, another word is wrong, and distances are those of the tokens
next=$($infer generate "$model" "zoo Once upon" --tokens 1 --temperature 0 2>/dev/null)
next=${next#zoo Once upon}
printf 'mine\t[zoo] Once upon[%s]\nmine\t[zoo] Once upon[%%]\n' "$next" >"$dir/ask.txt"
check "recall" $infer recall "$model" "$dir/ask.txt"
cp "$dir/out" "$dir/recalled"
distance=$(printf 'zoo Once upon' | ./${OUT}tokenizer/tokenize encode --tokenizer "$dir/t.bin" | wc -w)
check "one of two is right, $distance tokens later" awk -v distance="$distance" '
    $1 == "mine" && $2 == distance && $3 == 2 && $4 == 0.5 { found = 1 }
    END { exit !found }' "$dir/recalled"
check "questions" $make_recall --ask 3 --far 16 --out "$dir/ask.txt"
check "questions that are documents" \
    sh -c "[ \$(wc -l <'$dir/ask.txt') = 12 ] && ! grep -v '^\(pairs\|facts\).*\(\[[A-Za-z]*\]\).* \2$' '$dir/ask.txt'"
refuse "recall: no questions" 1 "make_recall" $infer recall "$model" "$dir/tiny.txt"
refuse "recall: empty" 1 "no questions" $infer recall "$model" /dev/null
check "questions that are longer than the model are left out and counted" sh -c "
    $make_recall --ask 9 --far 64 --out '$dir/ask.txt' &&
    $infer recall '$model' '$dir/ask.txt' >'$dir/one' 2>'$dir/said' &&
    grep -q 'line [0-9]*: .*trained for 32' '$dir/said' && grep -q '^left out: [1-9]' '$dir/one'"
refuse "make_recall: no file" 2 "--out" $make_recall
refuse "make_recall: documents and questions" 2 "--ask" $make_recall --ask 3 --bytes 1k --out "$dir/ask.txt"
check "the same seed, the same documents" sh -c "$make_recall --bytes 20k --seed 4 --out - 2>/dev/null >'$dir/one'; \
    $make_recall --bytes 20k --seed 4 --out - 2>/dev/null | cmp - '$dir/one'"

# ---- one prompt three ways, greedy and by seed
printf 'Once upon a time\n' >"$dir/prompt"
$infer generate "$model" "Once upon a time" --tokens 20 --seed 5 >"$dir/g1" 2>/dev/null
$infer generate "$model" --file "$dir/prompt" --tokens 20 --seed 5 >"$dir/g2" 2>/dev/null
$infer generate "$model" --file - --tokens 20 --seed 5 --threads 1 <"$dir/prompt" >"$dir/g3" 2>/dev/null
check "prompt from an argument and from a file" cmp "$dir/g1" "$dir/g2"
check "prompt from standard input" cmp "$dir/g1" "$dir/g3"
check "another seed, another text" \
    sh -c "$infer generate '$model' 'Once upon a time' --tokens 20 --seed 6 | cmp -s - '$dir/g1' && exit 1 || exit 0"
check "top-k 1 is greedy" sh -c "$infer generate '$model' Once --tokens 9 --top-k 1 >'$dir/g4' && \
    $infer generate '$model' Once --tokens 9 --temperature 0 | cmp - '$dir/g4'"

# ---- several samples are what each seed alone writes; ends; rounded weights
for seed in 5 6 7; do
    $infer generate "$model" "Once upon a time" --tokens 20 --seed $seed 2>/dev/null
    echo '<|endoftext|>'
done >"$dir/g5"
$infer generate "$model" "Once upon a time" --tokens 20 --seed 5 --samples 3 --threads 2 >"$dir/g6" 2>"$dir/g6.err"
check "three samples are three seeds" cmp "$dir/g5" "$dir/g6"
rate='[0-9.]* s, [0-9]* tokens/s'
check "prefill and decode are timed apart" \
    grep -q "^prompt [0-9]* tokens in $rate; [0-9]* tokens generated in $rate; stopped at " "$dir/g6.err"
learned="$dir/o/model_00000150.bin"
$infer generate "$learned" --temperature 0 2>/dev/null | head -c 30 >"$dir/g7"
$infer generate "$learned" --temperature 0 --stop nothing --stop "$(tail -c 5 "$dir/g7")" 2>"$dir/g8.err" |
    head -c -1 >"$dir/g8"
check "a stop text" sh -c "head -c \$(wc -c <'$dir/g8') '$dir/g7' | cmp - '$dir/g8' && \
    [ \$(wc -c <'$dir/g8') -le 25 ] && grep -q 'stopped at a --stop text' '$dir/g8.err'"
check "beyond what it was trained for" sh -c "$infer generate '$model' Once --context 80 --endless 2>&1 >/dev/null | \
    grep 'stopped at the end of the context$'"
check "as far as it was trained for" sh -c "$infer generate '$model' Once --endless 2>&1 >/dev/null | \
    grep 'the end of the context of 32 tokens that it was trained for; --context'"
check "without end" sh -c "$train $tiny --attention hybrid --mixer linear --window 8 --steps 1 --out '$dir/w' && \
    $infer generate '$dir/w/model_00000001.bin' --endless --tokens 300 2>&1 >/dev/null | grep ' 300 tokens generated'"
check "a model with learned positions" $train $tiny --pos learned --steps 1 --out "$dir/l"
refuse "beyond learned positions" 1 "learned positions" $infer generate "$dir/l/model_00000001.bin" --context 33
refuse "an empty stop text" 2 "--stop" $infer generate "$model" --stop ""
refuse "no samples" 2 "--samples" $infer generate "$model" --samples 0
for type in bf16 int8; do
    check "quantize to $type" $infer quantize "$model" "$dir/$type.bin" --type $type
    check "generate with $type" $infer generate "$dir/$type.bin" Once --tokens 20
    $infer perplexity "$dir/$type.bin" "$dir/val.txt" >"$dir/out" 2>/dev/null
    one=$(sed -n 's/^perplexity \([0-9.]*\).*/\1/p' "$dir/ppl") other=$(sed -n 's/^perplexity \([0-9.]*\).*/\1/p' \
        "$dir/out")
    if awk "BEGIN { d = ($other + 0) / ($one + 0) - 1; exit !(d < 0.005 && d > -0.005) }"; then pass; else \
        fail "perplexity $one, in $type $other"; fi
    check "train from $type" $train --data "$dir/s_train_000000.bin" --init-from "$dir/$type.bin" --batch 4 --steps 2 \
        --sample-every 0 --out "$dir/from_$type"
    refuse "quantize twice" 1 "already" $infer quantize "$dir/$type.bin" "$dir/twice.bin" --type int8
    mkdir "$dir/resume_$type" && cp "$dir/p/state_00000006.bin" "$dir/resume_$type" && cp "$dir/$type.bin" \
        "$dir/resume_$type/model_00000006.bin"
    refuse "resume from $type" 1 "--init-from" $train --resume --out "$dir/resume_$type"
done
head -c -200 "$dir/int8.bin" >"$dir/short8.bin"
refuse "a truncated int8 model" 1 "truncated" $infer generate "$dir/short8.bin"
refuse "quantize without a type" 2 "--type" $infer quantize "$model" "$dir/x.bin"
refuse "quantize without a name" 2 "quantize" $infer quantize "$model" --type int8

# ---- golden: with the built-in matrix products and a fixed instruction set, the first losses to 6 digits and a story
# learned by heart
if [ "$(uname -m)" = x86_64 ] && [ -z "$OUT" ]; then
    check "build for golden results" make -s OUT=build/golden/ NO_DNNL=1 MARCH=x86-64-v2 build/golden/train_gsa \
        build/golden/infer
    build/golden/train_gsa --layers 2 --heads 2 --channels 64 --seq 64 --vocab 512 --batch 2 --doc-start \
        --overfit-batch --lr 3e-3 --warmup 10 --steps 150 --eval-every 0 --sample-every 0 --out "$dir/golden" >/dev/null
    sed -n 's/^s:\(1\|5\|10\) trl:\([0-9.]*\) .*/\1 \2/p' "$dir/golden/main.log" |
        awk '{ printf "step %d/150 | loss %.6f\n", $1, $2 }' >"$dir/golden.txt"
    build/golden/infer generate "$dir/golden/model_00000150.bin" --temperature 0 2>/dev/null >>"$dir/golden.txt"
    check "golden results" diff test/golden.txt "$dir/golden.txt"
else
    echo "skip golden results: they are those of a release build for x86-64"
    skipped=$((skipped + 1))
fi

# ---- wrong flags: status 2
refuse "train: unknown flag" 2 "--deapth" $train --deapth 3
refuse "train: no value" 2 "--steps" $train --steps
refuse "train: not a number" 2 "12x" $train --steps 12x
refuse "train: out of range" 2 "--beta2" $train --beta2 1.5
refuse "train: not a choice" 2 "standard|gsa|hybrid" $train --attention global
refuse "train: two choices at once" 2 "standard|gsa|hybrid" $train --attention "standard|gsa"
refuse "train: twice" 2 "twice" $train --steps 1 --steps 2
refuse "train: stray word" 2 "hello" $train hello
refuse "train: several processes on the CPU" 2 "torchrun has started 2 processes" env RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 \
    $train $tiny --out "$dir/x"
check "train: one process of torchrun's" env RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 $train $tiny --steps 1 --out "$dir/ranked"
refuse "train: heads do not divide channels" 2 "--channels 30" $train --heads 4 --channels 30 --out "$dir/x"
refuse "train: too many splats" 2 "--splats" $train --channels 32 --heads 2 --splats 9 --out "$dir/x"
refuse "train: head map of a head that is not there" 2 "--gsa-heads" $train --depth 2 --gsa-heads 0:2 --out "$dir/x"
refuse "train: head map without hybrid" 2 "hybrid" $train --attention gsa --gsa-heads 1 --out "$dir/x"
refuse "train: cosine with linear" 2 "--envelope cosine" $train --attention gsa --mixer linear --envelope cosine \
    --out "$dir/x"
refuse "train: decay with softmax" 2 "--mixer linear" $train --attention gsa --envelope raised --out "$dir/x"
refuse "train: extend with softmax" 2 "--mixer softmax" $train --attention extend --mixer softmax --out "$dir/x"
refuse "train: extend without a window" 2 "--window" $train --attention extend --window 0 --out "$dir/x"
refuse "train: extend as an encoder" 2 "--objective mlm" $train --attention extend --objective mlm --out "$dir/x"
refuse "train: a window without standard heads" 2 "--window" $train --attention gsa --window 8 --out "$dir/x"
refuse "train: too many splats for the scan" 2 "64" $train --attention gsa --mixer linear --splats 65 --out "$dir/x"
refuse "train: extra heads by a list" 2 "number of extra heads" $train --attention augment --gsa-heads 0:1 \
    --out "$dir/x"
refuse "train: no extra heads" 2 "--gsa-heads 0" $train --attention augment --gsa-heads 0 --out "$dir/x"
refuse "train: splats start from a missing file" 1 "nothere.bin" $train --splat-init "$dir/nothere.bin" --out "$dir/x"
refuse "train: an unknown bound" 2 "precision|centre" $train --unbounded precision,speed --out "$dir/x"
refuse "train: a bound without a name" 2 "precision|centre" $train --unbounded precision, --out "$dir/x"
for flags in "phase --mixer linear --phase none" phase "phase --attention extend --envelope decay" "gain --gain none" \
    "gain --attention gsa" "frequency --attention gsa --envelope none" "decay" "precision,decay" \
    "decay --mixer linear --envelope none"; do
    refuse "train: no such bound: $flags" 2 "no such bound" $train $tiny --unbounded $flags --out "$dir/x"
done
for flags in "phase --mixer linear" "gain" "frequency --envelope none" "frequency,decay --attention extend"; do
    check "train: such a bound: $flags" $train $tiny --steps 1 --unbounded $flags --out "$dir/bound"
    rm -rf "$dir/bound"
done
refuse "train: a hybrid without splats" 2 "--gsa-heads 0" $train $tiny --gsa-heads 0 --splats 4 --out "$dir/x"
refuse "train: a window in a hybrid without standard heads" 2 "--window" $train $tiny --gsa-heads 2 --window 8 \
    --out "$dir/x"
refuse "train: an end of a constant rate" 2 "--min-lr" $train $tiny --schedule constant --min-lr 1e-4 --out "$dir/x"
refuse "train: --splat-lr without scalars" 2 "--splat-lr" $train --attention standard --gain none \
    --rope-frequencies fixed --splat-lr 0.01 --out "$dir/x"
for flag in no-sphere "unbounded decay" "mixer linear" "splats 4" "envelope none" "covariance full" \
    "splat-init pca" "splat-precision 8" "splat-amplitude 0.1" "gsa-heads 1"; do
    refuse "train: --$flag without splats" 2 "--${flag%% *}" $train --attention standard --$flag --out "$dir/x"
done
refuse "train: depth and preset" 2 "--preset" $train --depth 2 --preset gpt2-124m --out "$dir/x"
refuse "train: data without tokenizer" 2 "--tokenizer" $train --data "$dir/s_train_000000.bin" --out "$dir/x"
refuse "train: val without data" 2 "--data" $train --val "$dir/s_val_000000.bin" --out "$dir/x"
refuse "infer: stray command" 2 "unknown command" sh -c "$infer tell 2>&1 >/dev/null | tail -n 1 >&2; exit 2"
refuse "infer: generate without model" 2 "model" $infer generate
refuse "infer: two prompts" 2 "one prompt" $infer generate a b c
for program in $train "$infer" "$infer generate" "$infer perplexity" "$infer score" "$infer fill" "$infer measure" \
    "$infer recall" "$infer inspect" $prepare $make_stories $make_recall $train_bpe ./${OUT}tokenizer/tokenize; do
    check "$program --help" $program --help
    [ "$program" = $train ] || refuse "$program without arguments" 2 "" \
        sh -c "$program 2>&1 >/dev/null </dev/null | tail -n 1 >&2; $program >/dev/null 2>&1 </dev/null"
done

# ---- what users start in dev/ and test/: --help is help, and an unknown flag is one sentence
config=release
case $OUT in build/debug/) config=debug ;; build/sanitize/) config=sanitize ;; esac
built=build/$config
check "build the tools" make -s config=$config $built/dev/scan_bench $built/dev/infer_bench $built/dev/logits \
    $built/test/check_stories $built/test/test_fuzz
programs="$built/dev/scan_bench $built/dev/infer_bench $built/dev/logits $built/test/check_stories"
programs="$programs $built/test/test_fuzz dev/adapt.sh"
programs="$programs dev/long_sequences.sh data/tinystories.sh data/openwebtext.sh test/soak test/fuzz/run"
if command -v python3 >/dev/null; then
    for script in compare convert.py gpt2_compare.py pytorch_bench.py tokenizer_compare.py cuda/attention_bench.py \
        pytorch/train.py ../test/pytorch.py; do
        case $(head -n 1 "dev/$script") in # documents start those by their names
            '#!'*) programs="$programs dev/$script" ;;
            *) programs="$programs python3:dev/$script" ;;
        esac
    done
else
    echo "skip --help of dev/*.py: no python3"
    skipped=$((skipped + 1))
fi
bare() { # PROGRAM ARGUMENT...: python3 without any package
    PYTHONDONTWRITEBYTECODE=1 python3 -E -S "$@"
}
if command -v python3 >/dev/null; then
    compare=dev/tokenizer_compare.py
    for script in dev/gpt2_compare.py dev/pytorch_bench.py dev/cuda/attention_bench.py "dev/pytorch/train.py a b" \
        "$compare --train 300 README.md" "dev/convert.py a b" test/pytorch.py; do
        refuse "$script: no packages" 1 "pip install" bare $script
    done
    for wrong in "dev/pytorch_bench.py --batch 0" "dev/pytorch_bench.py --steps 0" "dev/pytorch_bench.py --heads 7" \
        "dev/pytorch/train.py a b --batch 0" "dev/pytorch/train.py a b --lr nan" "$compare --train 5" \
        "$compare --train 300" "$compare --gpt2 a --repeats -1"; do
        refuse "$wrong" 2 "$(echo "$wrong" | grep -o -e "--[a-z]*")" bare $wrong
    done
    refuse "a text that is missing" 1 "cannot read $dir/nothing" bare $compare --train 300 "$dir/nothing"
    printf '\377' >"$dir/latin"
    refuse "a text that is none" 1 "latin is not UTF-8" bare $compare --train 300 "$dir/latin"
    mkfifo "$dir/wait"
    refuse "Ctrl-C" 130 "tokenizer_compare.py: interrupted" test/interrupt "$dir/wait" \
        python3 -E -S $compare --train 300 "$dir/wait"
fi
for program in $programs; do
    check "$program --help" sh -c "$(echo "$program" | tr : ' ') --help | grep -q ."
    refuse "$program: unknown flag" 2 "--help" $(echo "$program" | tr : ' ') --no-such
    case $program in *.py | build/*) continue ;; esac # Python's own --help has no word for it
    check "$program --help: a full disk" sh -c "
        timeout 20 $(echo "$program" | tr : ' ') --help >/dev/full; status=\$?; [ \$status = 1 ] || [ \$status = 4 ]"
done

# ---- wrong files: status 1, or 2 where a flag contradicts a file
: >"$dir/empty"
head -c 5000 /dev/urandom >"$dir/noise"
head -c 20000 "$model" >"$dir/short.bin"
cp "$model" "$dir/version.bin" && patch "$dir/version.bin" 4 '\011'
cp "$model" "$dir/shape.bin" && patch "$dir/shape.bin" 84 '\100'           # field C of the configuration
cp "$model" "$dir/entry.bin" && patch "$dir/entry.bin" 1024 'X'             # the first name of the directory
cp "$model" "$dir/extent.bin" && patch "$dir/extent.bin" $((1024 + 72)) '\377' # its first shape
cat "$model" "$dir/noise" >"$dir/long.bin"
for wrong in "missing.bin cannot" "empty empty" "noise not" "short.bin truncated" "version.bin version" \
    "shape.bin tensor" "entry.bin tokenizer" "extent.bin damaged" "long.bin bytes"; do
    file=$dir/${wrong%% *} word=${wrong#* }
    refuse "infer: model $wrong" 1 "$word" $infer generate "$file" x
    refuse "train: init from $wrong" 1 "$word" $train --init-from "$file" --out "$dir/x"
done
refuse "infer: a state is no model" 1 "state" $infer generate "$dir/p/state_00000006.bin" x
refuse "infer: a folder" 1 "regular" $infer generate "$dir" x
refuse "infer: empty text" 1 "$dir/empty" $infer perplexity "$model" "$dir/empty"
refuse "infer: missing text" 1 "missing" $infer perplexity "$model" "$dir/missing"
refuse "infer: prompt too long" 1 "tokens" $infer generate "$model" --file "$dir/val.txt"
refuse "train: no shards" 1 "nothing" $train --data "$dir/nothing*" --tokenizer "$dir/t.bin" --out "$dir/x"
refuse "train: not a shard" 1 "noise" $train --data "$dir/noise" --tokenizer "$dir/t.bin" --out "$dir/x"
refuse "train: not a tokenizer" 1 "noise" $train --data "$dir/s_train_000000.bin" --tokenizer "$dir/noise" \
    --out "$dir/x"
check "a smaller vocabulary" $train_bpe --vocab 300 --out "$dir/t300.bin" "$dir/train.txt"
refuse "train: tokens beyond the vocabulary" 1 "s_train_000000.bin" $train --data "$dir/s_train_000000.bin" \
    --tokenizer "$dir/t300.bin" --seq 32 --depth 1 --steps 3 --sample-every 0 --out "$dir/x"
refuse "train: another tokenizer for the same model" 1 "t300.bin" $train --data "$dir/s_train_000000.bin" \
    --tokenizer "$dir/t300.bin" --init-from "$model" --out "$dir/y"
refuse "train: other layers for the same model" 2 "--layers" $train --init-from "$model" --layers 2 --out "$dir/y"
refuse "train: more than the memory" 1 "--batch" $train --data "$dir/s_train_000000.bin" --tokenizer "$dir/t.bin" \
    --depth 12 --batch 65536 --out "$dir/y"
refuse "train: window longer than the data" 1 "--seq" $train --data "$dir/s_val_000000.bin" --tokenizer "$dir/t.bin" \
    --seq 1M --depth 1 --out "$dir/y"
refuse "train: the folder is in use" 1 "--resume" $train --out "$dir/a"
refuse "resume: nothing there" 1 "--resume" $train --resume --out "$dir/nowhere"
refuse "resume: contradiction" 1 "--lr" $train --resume --lr 0.5 --out "$dir/a"
refuse "resume: a bound" 1 "where it is not given" $train --resume --unbounded centre --out "$dir/a"
rm -rf "$dir/n" && mkdir "$dir/n" && cp "$dir"/a/*_00000010.bin "$dir/n"
check "resume: fp32 products, as they were" sh -c "$train --resume --products fp32 --out '$dir/n' &&
    cmp '$dir/a/model_00000020.bin' '$dir/n/model_00000020.bin'"
refuse "resume: other products" 1 "where it is fp32" $train --resume --products bf16 --out "$dir/a"
refuse "resume: contradiction in the shape" 1 "--layers" $train --resume --layers 3 --out "$dir/a"
rm -rf "$dir/n" && mkdir "$dir/n" && cp "$dir"/a/*_00000010.bin "$dir"/a/*_00000020.bin "$dir/n" && head -c 9000 \
    "$dir/a/state_00000020.bin" >"$dir/n/state_00000020.bin"
check "resume passes over a step that is not whole" \
    sh -c "$train --resume --out '$dir/n' 2>&1 | grep 'from step 10 of 20' && \
    cmp '$dir/n/model_00000020.bin' '$dir/a/model_00000020.bin'"

# ---- gains of standard heads: trained, resumed; files of before they were known; where they make no sense
gain="$tiny --gain head --steps 20 --eval-every 10 --save-every 10 --keep 0 --lr 1e-2"
check "train with gains" $train $gain --out "$dir/ga" --threads 2
check "gains: one thread" sh -c "$train $gain --out '$dir/gb' --threads 1 &&
    cmp '$dir/ga/model_00000020.bin' '$dir/gb/model_00000020.bin'"
mkdir "$dir/gc" && cp "$dir"/ga/*_00000010.bin "$dir/gc"
check "gains: resumed" sh -c "$train --resume --out '$dir/gc' &&
    cmp '$dir/ga/model_00000020.bin' '$dir/gc/model_00000020.bin' &&
    cmp '$dir/ga/state_00000020.bin' '$dir/gc/state_00000020.bin'"
check "gains: standard attention has a rate for them" $train $tiny --attention standard --gain head --splat-lr 0.02 \
    --steps 2 --out "$dir/gs"
"$train" $tiny --attention standard --gain head --splat-lr 0 --steps 2 --out "$dir/gz" >/dev/null
check "and learns by it" sh -c "! cmp -s '$dir/gs/model_00000002.bin' '$dir/gz/model_00000002.bin'"
check "gains: the file says so" sh -c "$train --init-from '$dir/ga/model_00000020.bin' --gain head --steps 1 \
    --sample-every 0 --out '$dir/gi'"
cp "$dir/ga/model_00000020.bin" "$dir/surplus.bin" && patch "$dir/surplus.bin" 132 '\000' # field gain
refuse "gains that the configuration does not have" 1 "a tensor log_gain" $infer generate "$dir/surplus.bin" x
refuse "gains: not those of the file" 2 "--gain" $train --init-from "$dir/ga/model_00000020.bin" --gain none \
    --out "$dir/x"
refuse "gains without unit vectors" 2 "--pos learned" $train $tiny --pos learned --gain head --out "$dir/x"
refuse "gains without standard heads" 2 "--gain" $train $tiny --attention gsa --gain head --out "$dir/x"
cp "$dir/a/model_00000020.bin" "$dir/v2.bin" && patch "$dir/v2.bin" 4 '\002'
check "a file of before gains is read" sh -c "$infer perplexity '$dir/v2.bin' README.md >'$dir/v2' 2>/dev/null &&
    $infer perplexity '$dir/a/model_00000020.bin' README.md 2>/dev/null | cmp -s - '$dir/v2'"

# ---- phases of splats: the same
phase="$tiny --phase learned --steps 20 --eval-every 10 --save-every 10 --keep 0 --lr 1e-2"
check "train with phases" $train $phase --out "$dir/ha" --threads 2
check "phases: one thread" sh -c "$train $phase --out '$dir/hb' --threads 1 &&
    cmp '$dir/ha/model_00000020.bin' '$dir/hb/model_00000020.bin'"
mkdir "$dir/hc" && cp "$dir"/ha/*_00000010.bin "$dir/hc"
check "phases: resumed" sh -c "$train --resume --out '$dir/hc' &&
    cmp '$dir/ha/model_00000020.bin' '$dir/hc/model_00000020.bin' &&
    cmp '$dir/ha/state_00000020.bin' '$dir/hc/state_00000020.bin'"
check "phases: of the linear mixer, soft, recomputed" $train $tiny --mixer linear --phase learned --recompute \
    --adapt relocate --steps 2 --out "$dir/hl"
check "phases: with a softer start" $train $tiny --phase learned --splat-amplitude 0.1 --steps 2 --out "$dir/hs"
check "train without phases" $train $tiny --phase none --steps 2 --out "$dir/h0"
check "phases: inspected" sh -c "$infer inspect '$dir/ha/model_00000020.bin' | grep phase &&
    ! $infer inspect '$dir/h0/model_00000002.bin' | grep phase"
check "phases: quantized" sh -c "$infer quantize '$dir/ha/model_00000020.bin' '$dir/hq.bin' --type int8 &&
    $infer perplexity '$dir/hq.bin' README.md"
check "splats with phases, for a model with them" $train $tiny --phase learned \
    --splat-init "$dir/ha/model_00000020.bin" --steps 1 --out "$dir/hf"
check "splats without phases, for a model with them" $train $tiny --phase learned \
    --splat-init "$dir/h0/model_00000002.bin" --steps 1 --out "$dir/hg"
refuse "splats with phases, for a model without" 1 "tensor psi" $train $tiny --phase none \
    --splat-init "$dir/ha/model_00000020.bin" --out "$dir/x"
refuse "phases: not those of the file" 2 "--phase" $train --init-from "$dir/ha/model_00000020.bin" --phase none \
    --out "$dir/x"
refuse "phases without a cosine" 2 "--envelope" $train $tiny --envelope none --phase learned --out "$dir/x"
refuse "phases of a decay" 2 "--phase" $train $tiny --mixer linear --envelope decay --phase learned --out "$dir/x"
refuse "phases without splats" 2 "--phase" $train $tiny --attention standard --phase learned --out "$dir/x"
refuse "its bound has a name" 2 "phase" $train $tiny --unbounded phases --out "$dir/x"
# ---- learned rotations and forget gates: trained, resumed, rounded; where they make no sense
forget="$run --rope-frequencies learned --forget-gate half"
check "train with learned rotations and forget gates" $train $forget --out "$dir/fa" --threads 2
check "gates: one thread" sh -c "$train $forget --out '$dir/fb' --threads 1 &&
    cmp '$dir/fa/model_00000020.bin' '$dir/fb/model_00000020.bin'"
check "gates: --recompute" sh -c "$train $forget --recompute --out '$dir/fr' &&
    cmp '$dir/fa/model_00000020.bin' '$dir/fr/model_00000020.bin'"
mkdir "$dir/fc" && cp "$dir"/fa/*_00000010.bin "$dir/fc"
check "gates: resumed" sh -c "$train --resume --out '$dir/fc' &&
    cmp '$dir/fa/model_00000020.bin' '$dir/fc/model_00000020.bin' &&
    cmp '$dir/fa/state_00000020.bin' '$dir/fc/state_00000020.bin'"
check "gates: a rounded model writes" sh -c "$infer quantize '$dir/fa/model_00000020.bin' '$dir/fq.bin' --type int8 &&
    $infer generate '$dir/fq.bin' Once --tokens 20"
check "gates: a report" $infer report "$dir/fa/model_00000020.bin" "Once upon a time" -o "$dir/fa.html"
refuse "gates: not those of the file" 2 "--forget-gate" $train --init-from "$dir/fa/model_00000020.bin" \
    --forget-gate all --out "$dir/x"
refuse "rotations: not those of the file" 2 "--rope-frequencies" $train --init-from "$dir/fa/model_00000020.bin" \
    --rope-frequencies fixed --out "$dir/x"
refuse "learned rotations without rotations" 2 "--pos learned" $train $tiny --pos learned --rope-frequencies learned \
    --out "$dir/x"
refuse "learned rotations without standard heads" 2 "--rope-frequencies" $train $tiny --attention gsa \
    --rope-frequencies learned --out "$dir/x"
refuse "gates without standard heads" 2 "--forget-gate" $train $tiny --attention gsa --forget-gate all --out "$dir/x"
refuse "gates of an encoder" 2 "--objective mlm" $train $tiny --objective mlm --forget-gate all --out "$dir/x"
refuse "gates beside far splats" 2 "--attention extend" $train $tiny --attention extend --forget-gate half \
    --out "$dir/x"
cp "$dir/a/model_00000020.bin" "$dir/v3.bin" && patch "$dir/v3.bin" 4 '\003'
check "a file of before phases and gates is read" sh -c "$infer perplexity '$dir/v3.bin' README.md >'$dir/v3' &&
    $infer perplexity '$dir/a/model_00000020.bin' README.md 2>/dev/null | cmp -s - '$dir/v3'"

# ---- what is not given: Muon, and splats in all heads of the first layer, soft; the same models bit for bit
four_heads="--layers 2 --heads 4 --channels 32 --seq 32 --batch 2 --vocab 300 --steps 3 --eval-every 0 --sample-every 0"
given_heads="--attention hybrid --gsa-heads 0:0-3 --splat-amplitude 0.1 --phase learned --gain head"
given_heads="$given_heads --rope-frequencies learned --forget-gate half"
check "without flags four heads of two layers have splats" \
    sh -c "$train $four_heads --out '$dir/default' | grep ' of 4 GSA heads (of 8 heads)'"
check "its optimiser is Muon" sh -c "$train $four_heads --optimizer muon --momentum 0.95 --out '$dir/default.muon' &&
    cmp '$dir/default/model_00000003.bin' '$dir/default.muon/model_00000003.bin'"
check "those of the first layer" sh -c "$train $four_heads $given_heads --out '$dir/default.first' &&
    cmp '$dir/default/model_00000003.bin' '$dir/default.first/model_00000003.bin'"

# ---- Muon and AdamW: trained, resumed; Muon has one moment of the blocks' matrices; a run keeps its optimiser
check "train by AdamW" $train $run --optimizer adamw --out "$dir/aw"
muon="$tiny --optimizer muon --momentum 0.9 --steps 20 --eval-every 10 --save-every 10 --keep 0"
check "train by Muon" $train $muon --out "$dir/ma" --threads 2
check "Muon: one thread" sh -c "$train $muon --out '$dir/mb' --threads 1 &&
    cmp '$dir/ma/model_00000020.bin' '$dir/mb/model_00000020.bin' &&
    ! cmp -s '$dir/ma/model_00000020.bin' '$dir/aw/model_00000020.bin'"
rate() {
    $train $tiny --optimizer "$1" --steps 1 --warmup 0 --schedule constant --eval-every 0 --out "$dir/rate_$1" |
        sed -n 's/^step 1.* lr \([^ ]*\).*/\1/p'
}
check "a rate of its own, of 32 channels" [ "$(rate adamw) $(rate muon)" = "1.20e-02 1.38e-02" ]
# its weight decay, by how often the run reads its text; "E D": the epochs that it tells, and the decay
decay() {
    rm -rf "$dir/decay"
    $train --seq 32 --batch 2 --eval-every 0 --sample-every 0 --optimizer muon --lr 0.01 "$@" --out "$dir/decay" |
        sed -n -e 's/.* \([0-9.]*\) epochs$/\1/p' -e 's/.*weight-decay \([^ ]*\).*/\1/p' | tr '\n' ' '
}
shards="--layers 1 --heads 2 --channels 32 --tokenizer $dir/t.bin --data $dir/s"
ruled() { # SHARD STEPS LEAST_EPOCHS MOST_EPOCHS: (1 + E) / (steps x lr), an E within these, of which 16 count at most
    decay ${shards}_$1_000000.bin --steps "$2" | awk -v steps="$2" -v least="$3" -v most="$4" '
        { good = $1 >= least && $1 <= most; apart = $2 * steps * 0.01 / (1 + ($1 < 16 ? $1 : 16)) - 1 }
        END { exit !(good && apart > -0.01 && apart < 0.01) }'
}
check "Muon's weight decay, a part of the text" ruled train 100 0.2 0.9
check "Muon's weight decay, some readings" ruled train 1000 2 6
check "Muon's weight decay, many readings" ruled val 3000 17 40
given() { case $1 in *" $2 ") ;; *) return 1 ;; esac; }
check "a decay that is given" given "$(decay ${shards}_train_000000.bin --steps 20 --weight-decay 0.5)" 0.5
check "a model that is trained on" sh -c "$train --init-from '$dir/ma/model_00000020.bin' --seq 32 --batch 2 --steps 2 \
    --eval-every 0 --sample-every 0 --out '$dir/on' | grep -q 'optimizer adamw' && grep -aq '^weight-decay=0.1$' \
    '$dir/on/state_00000002.bin'"
check "a model that is trained on by Muon" given "$(decay --steps 20 --init-from "$dir/ma/model_00000020.bin")" 0.1
mkdir "$dir/mc" && cp "$dir"/ma/*_00000010.bin "$dir/mc"
check "Muon: resumed" sh -c "$train --resume --optimizer muon --out '$dir/mc' &&
    cmp '$dir/ma/model_00000020.bin' '$dir/mc/model_00000020.bin' &&
    cmp '$dir/ma/state_00000020.bin' '$dir/mc/state_00000020.bin'"
check "Muon: a smaller state" sh -c "[ \$((\$(wc -c <'$dir/aw/state_00000020.bin') - \
    \$(wc -c <'$dir/ma/state_00000020.bin'))) -ge \$((4 * 2 * 12 * 32 * 32)) ]"
optimiser_memory() {
    $train --optimizer "$1" --seq 32 --batch 1 --vocab 300 --steps 1 --eval-every 0 --sample-every 0 \
        --out "$dir/mm_$1" | sed -n 's/.*optimiser \([0-9.]*\) .*/\1/p'
}
check "Muon: 1.5 MiB less of 12 x 128^2 numbers in 2 layers" sh -c \
    "echo $(optimiser_memory adamw) $(optimiser_memory muon) | awk '{ exit !(sprintf(\"%.1f\", \$1 - \$2) == 1.5) }'"
refuse "resume: another optimiser" 1 "contradicts" $train --resume --optimizer adamw --out "$dir/mc"
refuse "resume: Muon from AdamW" 1 "contradicts" $train --resume --optimizer muon --out "$dir/aw"
refuse "momentum without Muon" 2 "--momentum" $train $tiny --optimizer adamw --momentum 0.9 --out "$dir/x"
# a state of before --optimizer; two lines that say nothing keep its length
rm -rf "$dir/n" && mkdir "$dir/n" && cp "$dir"/aw/model_00000010.bin "$dir/n"
LC_ALL=C sed -e 's/^optimizer=adamw$/batch=000000002/' -e 's/^momentum=0.95$/batch=0000002/' \
    "$dir/aw/state_00000010.bin" >"$dir/n/state_00000010.bin"
check "a state of before Muon" sh -c "! grep -aq '^optimizer' '$dir/n/state_00000010.bin' &&
    grep -aqx 'batch=0000002' '$dir/n/state_00000010.bin'"
refuse "resume: Muon, where there was none" 1 "--optimizer" $train --resume --optimizer muon --out "$dir/n"
check "it is resumed by AdamW" sh -c "$train --resume --out '$dir/n' &&
    cmp '$dir/aw/model_00000020.bin' '$dir/n/model_00000020.bin' &&
    cmp '$dir/aw/state_00000020.bin' '$dir/n/state_00000020.bin'"

# ---- a full disk while saving: one sentence, and the last good checkpoint survives
rm -rf "$dir/f" && mkdir "$dir/f" && cp "$dir"/a/*_00000010.bin "$dir/f"
refuse "full disk" 1 "cannot write" sh -c "ulimit -f 100; exec $train --resume --out '$dir/f'"
check "the good checkpoint is whole and nothing half is left" \
    sh -c "cmp '$dir/f/model_00000010.bin' '$dir/a/model_00000010.bin' && [ \$(ls '$dir/f' | wc -l) = 3 ]"
printf 's:11 trl:4.0' >>"$dir/f/main.log" # a line that broke off
check "and can be resumed" $train --resume --out "$dir/f"
check "a line that broke off in the log is gone" sh -c "! grep -q 'trl:4\.0s\|trl:4\.0\$' '$dir/f/main.log' &&
    [ \$(grep -c '^s:11 trl' '$dir/f/main.log') = \$(grep -c '^s:11 trl.*clamped' '$dir/f/main.log') ]"

# ---- stopped again and again at random moments, by each signal in turn, a run ends as one that was never stopped
stopped="--depth 2 --seq 64 --batch 4 --vocab 300 --steps 120 --eval-every 0 --sample-every 0 --save-every 0"
stopped="$stopped --threads 2"
check "a run that is never stopped" $train $stopped --out "$dir/whole"
moments=$(awk 'BEGIN { srand(7); for (i = 0; i < 12; i++) printf "%.2f ", 0.3 + 0.5 * rand() }')
wrong= stops=0
for moment in $moments; do
    case $((stops % 3)) in 0) signal=INT ;; 1) signal=TERM ;; *) signal=HUP ;; esac
    resume=$(ls "$dir"/stopped/model_*.bin >/dev/null 2>&1 && echo --resume)
    $train $stopped $resume --out "$dir/stopped" >"$dir/out" 2>&1 &
    pid=$!
    sleep "$moment"
    kill -$signal $pid 2>/dev/null || { wait $pid && break; } # it came to its end
    wait $pid
    status=$?
    [ $status -eq 130 ] || [ $status -eq 0 ] || wrong="$wrong $signal:$status"
    stops=$((stops + 1))
done
if [ -z "$wrong" ] && [ $stops -gt 0 ]; then pass; else fail "stopped $stops times:$wrong $(tail -n 2 "$dir/out")"; fi
check "the stopped run's end" sh -c "$train --resume --out '$dir/stopped' &&
    cmp '$dir/stopped/model_00000120.bin' '$dir/whole/model_00000120.bin' &&
    cmp '$dir/stopped/state_00000120.bin' '$dir/whole/state_00000120.bin'"
check "a reader of the screen that goes away" sh -c "$train $tiny --steps 40 --out '$dir/gone' | head -n 3 &&
    for i in \$(seq 60); do [ -f '$dir/gone/model_00000040.bin' ] || sleep 0.5; done &&
    [ -f '$dir/gone/model_00000040.bin' ] && grep -q '^s:40 trl' '$dir/gone/main.log'"

# ---- the screen: one line of steps that is rewritten on a terminal, a line every few seconds elsewhere; all are logged
$train $tiny --steps 40 --eval-every 20 --out "$dir/piped" >"$dir/piped.txt" # waits of seconds would add lines
check "not a terminal: the first and the last step" sh -c "
    [ \$(grep -c '^step [0-9]*/40 | loss' '$dir/piped.txt') -lt 20 ] &&
    grep -q '^step 1/40 | loss' '$dir/piped.txt' && grep -q '^step 40/40 | loss' '$dir/piped.txt' &&
    [ \$(grep -c '^step [0-9]*/40 | validation' '$dir/piped.txt') = 3 ] &&
    [ \$(grep -c '^s:[0-9]* trl' '$dir/piped/main.log') = 40 ] &&
    tr -d '\r' <'$dir/piped.txt' | cmp -s - '$dir/piped.txt'"
if script --version >/dev/null 2>&1 && script -qec true /dev/null </dev/null >/dev/null 2>&1; then
    script -qec "stty cols 60; $train $tiny --steps 40 --eval-every 20 --out '$dir/tty'" "$dir/tty.txt" </dev/null \
        >/dev/null
    tr '\r' '\n' <"$dir/tty.txt" | tr -d '\033' | sed 's/^\[K//' >"$dir/all.txt"       # all that was ever to be seen
    sed "s/\r*$//; s/.*\r$(printf '\033')\[K//" "$dir/tty.txt" >"$dir/stays.txt" # and what stays
    check "a terminal: steps rewrite one line" sh -c "[ \$(grep -c '^step [0-9]*/40 | loss' '$dir/all.txt') = 40 ] &&
        [ \$(grep -c '^step [0-9]*/40 | loss' '$dir/stays.txt') = 1 ] && grep -q '^step 40/40 | loss' '$dir/stays.txt'"
    check "a terminal: evaluations stay" [ "$(grep -c '^step [0-9]*/40 | validation' "$dir/stays.txt")" = 3 ]
    check "a terminal: rewritten lines fit" \
        awk '/^step [1-9][0-9]*\/40 [|] loss/ && !/step 40/ && length > 59 { exit 1 }' "$dir/all.txt"
    check "a terminal: the same log" [ "$(grep -c '^s:[0-9]* trl' "$dir/tty/main.log")" = 40 ]
    mkdir "$dir/f2" && cp "$dir"/a/*_00000010.bin "$dir/f2"
    script -qec "ulimit -f 100; $train --resume --out '$dir/f2'" "$dir/tty.txt" >/dev/null </dev/null
    sed "s/\r*$//; s/.*\r$(printf '\033')\[K//" "$dir/tty.txt" >"$dir/stays.txt"
    check "a terminal: an error has a line of its own" grep -q '^train_gsa: cannot write' "$dir/stays.txt"
else
    echo "skip a terminal: no script(1) as in util-linux, or no pseudo-terminals (/dev/pts)"
    skipped=$((skipped + 1))
fi

# ---- folders' names are never patterns; a pattern that is a file's exact name is that file
for folder in 'run[1]' 'a*' 'b?' 'c\d'; do
    out="$dir/names/$folder"
    check "a folder called $folder" $train $tiny --steps 2 --save-every 1 --keep 1 --out "$out"
    check "$folder: one checkpoint is kept" test ! -e "$out/model_00000001.bin" -a -e "$out/model_00000002.bin"
    refuse "$folder: in use" 1 "--resume" $train $tiny --steps 2 --out "$out"
    check "$folder: goes on" $train --resume --out "$out"
done

# ---- standard streams that are closed: what is meant for them gets into no other file
check "standard output is closed" sh -c "$train $tiny --steps 2 --out '$dir/closed' >&- &&
    ! grep -v '^s:' '$dir/closed/main.log'"
check "all three are closed" sh -c "$train $tiny --steps 2 --out '$dir/closed3' <&- >&- 2>&- &&
    ! grep -v '^s:' '$dir/closed3/main.log'"

# ---- only regular files are replaced: links stay links, pipes and devices are written
$make_stories --bytes 2k --out "$dir/plain.txt" 2>/dev/null
echo old >"$dir/target" && ln -s target "$dir/link" && ln -s nowhere "$dir/hanging" && mkfifo "$dir/fifo"
check "through a symbolic link" sh -c "$make_stories --bytes 2k --out '$dir/link' && [ -L '$dir/link' ] &&
    cmp '$dir/target' '$dir/plain.txt' && [ ! -e '$dir/target.tmp' ]"
check "through a link to a new file" sh -c "$make_stories --bytes 2k --out '$dir/hanging' && [ -L '$dir/hanging' ] &&
    cmp '$dir/nowhere' '$dir/plain.txt'"
cat "$dir/fifo" >"$dir/from_fifo" &
check "into a pipe" sh -c "timeout 20 $make_stories --bytes 2k --out '$dir/fifo' && [ -p '$dir/fifo' ]"
[ -p "$dir/fifo" ] || kill $!
wait $!
check "out of the pipe" cmp "$dir/from_fifo" "$dir/plain.txt"
ln -s /dev/null "$dir/null" # where root may write /dev, a mistake would replace a link only
check "into a device" sh -c "$make_stories --bytes 2k --out '$dir/null' && [ -L '$dir/null' ] && [ -c /dev/null ]"
ln -s /dev/full "$dir/full"
refuse "a full device" 1 "cannot write" $make_stories --bytes 2k --out "$dir/full"
ln -s circle "$dir/circle"
refuse "links in a circle" 1 "symbolic links" $make_stories --bytes 2k --out "$dir/circle"

# ---- one process at a time in a folder, and for the shards of one name
$train $tiny --steps 100000 --eval-every 0 --out "$dir/busy" >"$dir/busy.txt" 2>&1 &
pid=$!
for _ in $(seq 60); do
    grep -q '^step 1/' "$dir/busy.txt" && break
    sleep 0.5
done
before=$(wc -l <"$dir/busy/main.log")
refuse "a folder that another run writes to" 1 "process $pid" $train $tiny --steps 2 --out "$dir/busy"
refuse "the same with --resume" 1 "process $pid" $train --resume --out "$dir/busy"
check "the other run's log goes on" [ "$(wc -l <"$dir/busy/main.log")" -ge "$before" ]
kill -INT $pid
wait $pid
check "and when it has ended, it is resumed" sh -c "! grep -v '^s:' '$dir/busy/main.log' &&
    ls '$dir'/busy/state_*.bin"
mkfifo "$dir/slow"
$prepare --tokenizer "$dir/t.bin" --out "$dir/pre" "$dir/slow" >"$dir/slow.txt" 2>&1 &
pid=$!
exec 9<>"$dir/slow" # waits for nobody
head -c 3000 "$dir/train.txt" >&9
for _ in $(seq 60); do [ -e "$dir/pre.lock" ] || sleep 0.5; done
refuse "shards of a name that are being made" 1 "process $pid" $prepare --tokenizer "$dir/t.bin" --out "$dir/pre" \
    "$dir/val.txt"
check "shards of another name" $prepare --tokenizer "$dir/t.bin" --out "$dir/pre2" "$dir/val.txt"
exec 9>&-
wait $pid
check "the first one's shards are whole and its lock is gone" sh -c "[ -s '$dir/pre_train_000000.bin' ] &&
    [ ! -e '$dir/pre.lock' ] && [ ! -e '$dir/pre2.lock' ]"

# ---- what a run that was killed while it saved has left is removed by the next start
rm -rf "$dir/left" && mkdir "$dir/left" && cp "$dir"/a/*_00000010.bin "$dir/left"
cp "$dir/left/state_00000010.bin" "$dir/left/state_00000007.bin"
for name in state_00000015.bin.tmp model_00000015.bin.tmp other.bin.tmp state_1.bin; do echo >"$dir/left/$name"; done
check "resume beside leftovers" $train --resume --out "$dir/left"
check "only they are removed" sh -c "[ \"\$(ls '$dir/left' | tr '\n' ' ')\" = 'main.log model_00000010.bin \
model_00000020.bin other.bin.tmp state_00000010.bin state_00000020.bin state_1.bin ' ]"
check "a program that ends early leaves no temporary file" sh -c "mkdir '$dir/early'; ulimit -f 1
    ! $make_stories --bytes 100k --out '$dir/early/s' 2>/dev/null && [ -z \"\$(ls '$dir/early')\" ]"

# ---- after a power cut: each new file, then its folder, reaches the disk before an older checkpoint is removed
if strace -o "$dir/calls" true 2>/dev/null; then
    check "train, traced" strace -f -y -e trace=fsync,/^rename,/^unlink -o "$dir/calls" $train $tiny --steps 2 \
        --save-every 1 --keep 1 --out "$dir/synced"
    check "the order of its calls" awk '
        /fsync\(.*[.]tmp>/ { written = 1; next }
        /fsync\(/ { moved = 0 }
        /rename/ { wrong = wrong || !written; written = 0; moved = 1; renames++ }
        /unlink/ { wrong = wrong || moved; removals++ }
        END { exit !(renames == 4 && removals >= 2 && !moved && !wrong) }' "$dir/calls"
else
    echo "skip the order of calls to the disk: no strace"
    skipped=$((skipped + 1))
fi

# ---- --keep counts whole checkpoints up to the present step, and holds for what a killed run had no time to remove
rm -rf "$dir/keep" && mkdir "$dir/keep" && cp "$dir"/a/*_00000010.bin "$dir/keep"
for kind in model state; do head -c 5000 "$dir/a/${kind}_00000020.bin" >"$dir/keep/${kind}_00000099.bin"; done
check "resume before a damaged checkpoint" $train --resume --keep 1 --out "$dir/keep"
check "it is not kept in place of the new one" cmp "$dir/keep/model_00000020.bin" "$dir/a/model_00000020.bin"
check "the one before is not kept" [ ! -e "$dir/keep/model_00000010.bin" ]
cp "$dir"/a/*_00000010.bin "$dir/keep" && rm "$dir"/keep/*_00000099.bin
check "too many checkpoints of a run that was killed at its end" sh -c "$train --resume --keep 1 --out '$dir/keep' &&
    [ \"\$(ls '$dir/keep' | tr '\n' ' ')\" = 'main.log model_00000020.bin state_00000020.bin ' ]"

# ---- --overfit-batch goes on with the batch that it began with
check "overfit" $train $tiny --overfit-batch --steps 6 --save-every 3 --keep 0 --out "$dir/over"
mkdir "$dir/over2" && cp "$dir"/over/*_00000003.bin "$dir/over2"
check "overfit, resumed" sh -c "$train --resume --out '$dir/over2' &&
    cmp '$dir/over/model_00000006.bin' '$dir/over2/model_00000006.bin' &&
    cmp '$dir/over/state_00000006.bin' '$dir/over2/state_00000006.bin'"

# ---- text in: the same text gives the same tokens as a text, as a shard and as a prompt
tokenize=./${OUT}tokenizer/tokenize plot=./${OUT}dev/plot
head -c 3000 "$dir/val.txt" | sed 's/$/\r/' >"$dir/crlf.txt"
check "prepare text with CR LF" $prepare --tokenizer "$dir/t.bin" --out "$dir/crlf" "$dir/crlf.txt"
check "CR LF: the same tokens as a text and as a shard" sh -c "
    $infer perplexity '$model' '$dir/crlf.txt' | grep -v tokens/s >'$dir/one' &&
    $infer perplexity '$model' '$dir/crlf_train_000000.bin' | grep -v tokens/s | cmp - '$dir/one'"
printf '\r\nOnce upon a time\r\n\n' >"$dir/crlf.txt"
check "and as a prompt" sh -c "$infer generate '$model' --file '$dir/crlf.txt' --tokens 5 2>/dev/null >'$dir/one' &&
    $infer generate '$model' 'Once upon a time' --tokens 5 2>/dev/null | cmp - '$dir/one'"
printf 'Once.\n<|endoftext|>\nUpon a time\n' >"$dir/two.txt"
check "a prompt of two documents" sh -c "
    $infer generate '$model' --file '$dir/two.txt' --tokens 2 2>'$dir/said' >'$dir/one' &&
    head -n 2 '$dir/one' >'$dir/head' && printf 'Once.\n<|endoftext|>\n' | cmp - '$dir/head' &&
    $prepare --tokenizer '$dir/t.bin' --out '$dir/two' '$dir/two.txt' |
        grep -qF \" \$(sed -n 's/^prompt \([0-9]*\) .*/\1/p' '$dir/said') tokens\""
printf '\357\273\277' | cat - "$dir/crlf.txt" >"$dir/bom.txt"
check "a byte-order mark is no text" sh -c "
    $infer perplexity '$model' '$dir/bom.txt' 2>'$dir/said' >'$dir/one' && grep -q byte-order '$dir/said' &&
    $infer perplexity '$model' '$dir/crlf.txt' 2>/dev/null | cmp - '$dir/one' &&
    $tokenize encode --tokenizer '$dir/t.bin' '$dir/bom.txt' >'$dir/one' &&
    $tokenize encode --tokenizer '$dir/t.bin' '$dir/crlf.txt' | cmp - '$dir/one'"
head -n 1 "$dir/val.txt" | tr -d '\n' | sed 's/./&\x00/g' >"$dir/utf16.txt"
printf '\377\376' | cat - "$dir/utf16.txt" >"$dir/utf16bom.txt"
for file in utf16.txt utf16bom.txt; do
    check "a warning of UTF-16: $file" sh -c "$prepare --tokenizer '$dir/t.bin' --out '$dir/u16' '$dir/$file' 2>&1 |
        grep -q UTF-16"
done
printf '\357\273\277name,value\na,1\nb,2\n' >"$dir/bom.csv"
check "a table with a byte-order mark" $plot bars "$dir/bom.csv" --label name --value value -o "$dir/bars.png"

# ---- files that are no text are refused by what they are; shards come through pipes
be() {
    for n; do
        printf "$(printf '\\%o\\%o\\%o\\%o' $((n >> 24)) $((n >> 16 & 255)) $((n >> 8 & 255)) $((n & 255)))"
    done
}
{
    be 20240520 1 100
    head -c 1212 /dev/zero
} >"$dir/big.bin"
printf '\241\331\064\001' | cat - "$dir/noise" >"$dir/llama.bin"
gzip -c "$dir/val.txt" >"$dir/val.gz"
printf '\3757zXZ\000' | cat - "$dir/noise" >"$dir/val.xz"
printf '\050\265\057\375' | cat - "$dir/noise" >"$dir/val.zst"
printf 'PK\003\004' | cat - "$dir/noise" >"$dir/val.zip"
printf '\020\000\000\000\000\000\000\000{"a":1}' >"$dir/model.safetensors"
for wrong in "big.bin big-endian" "llama.bin Llama-3" "val.gz gzip" "val.xz xz" "val.zst zstd" "val.zip zip" \
    "model.safetensors safetensors" "t.bin tokenizer"; do
    refuse "infer perplexity: $wrong" 1 "${wrong#* }" $infer perplexity "$model" "$dir/${wrong%% *}"
    refuse "prepare: $wrong" 1 "${wrong#* }" $prepare --tokenizer "$dir/t.bin" --out "$dir/x" "$dir/${wrong%% *}"
done
refuse "infer measure: a model as text" 1 "a model" $infer measure "$model" "$model"
refuse "infer generate: a prompt that is compressed" 1 "gzip" $infer generate "$model" --file "$dir/val.gz"
refuse "train_bpe: a shard as text" 1 "shard" $train_bpe --vocab 300 --out "$dir/x.bin" "$dir/s_val_000000.bin"
refuse "train: a big-endian shard" 1 "big-endian" $train --data "$dir/big.bin" --tokenizer "$dir/t.bin" --out "$dir/x"
rm -f "$dir/pipe" && mkfifo "$dir/pipe"
$infer perplexity "$model" "$dir/s_val_000000.bin" 2>/dev/null >"$dir/one"
cat "$dir/s_val_000000.bin" >"$dir/pipe" &
check "perplexity of a shard through a pipe" sh -c "timeout 60 $infer perplexity '$model' '$dir/pipe' |
    cmp - '$dir/one'"
kill $! 2>/dev/null
check "and from standard input" sh -c "$infer perplexity '$model' - <'$dir/s_val_000000.bin' | cmp - '$dir/one'"
head -c 3000 "$dir/s_val_000000.bin" >"$dir/cut.bin"
refuse "a shard that is cut" 1 "truncated" $infer perplexity "$model" "$dir/cut.bin"
refuse "the same through a pipe" 1 "truncated" sh -c "cat '$dir/cut.bin' | $infer perplexity '$model' -"
refuse "a shard with more behind it" 1 "more" sh -c "cat '$dir/s_val_000000.bin' '$dir/noise' |
    $infer perplexity '$model' -"
refuse "train: a shard through a pipe that nobody writes" 1 "regular file" timeout 20 $train --data "$dir/pipe" \
    --tokenizer "$dir/t.bin" --out "$dir/x"
refuse "train: a shard from standard input" 1 "regular file" $train --data - --tokenizer "$dir/t.bin" --out "$dir/x"
eot=$($tokenize list --tokenizer "$dir/t.bin" | sed -n 's/^\([0-9]*\).*endoftext.*/\1/p')
{
    printf '\210\330\064\001\001\000\000\000\144\000\000\000'
    head -c 1012 /dev/zero
    for _ in $(seq 100); do printf "\\$(printf %o $((eot & 255)))\\$(printf %o $((eot >> 8)))"; done
} >"$dir/eot.bin"
refuse "all of one class" 1 "of one class, 'end of text'" $infer measure "$model" "$dir/eot.bin" --classes english
check "a shard of <|endoftext|> only has no bytes to count" sh -c "
    $infer perplexity '$model' '$dir/eot.bin' >'$dir/one' && ! grep -q 'bits per byte\|inf' '$dir/one'"

# ---- JSON that would lose something, and tasks that are too long for the model
printf '{"text": "Once upon a time"}\n\n{"text": "Once upon\\u0000 a time"}\n' >"$dir/json"
refuse "a text with U+0000" 1 "line 3" $infer score "$model" "$dir/json"
printf '{"text": "Once upon\\uZZZZ a time"}\n' >"$dir/json"
refuse "an escape that is none" 1 "line 1" $infer score "$model" "$dir/json"
mkdir -p "$dir/gpt2json" && printf '{"a":0,\n"\\u0000":1}' >"$dir/gpt2json/encoder.json" && : >"$dir/gpt2json/vocab.bpe"
refuse "the same in encoder.json" 1 "line 2" $train_bpe --gpt2 "$dir/gpt2json" --out "$dir/x.bin"
long=$(awk 'BEGIN { for (i = 0; i < 200; i++) printf "ab " }')
printf '{"text":"Once upon a time"}\n{"ctx":"a","endings":["%s","b"],"label":0}\n' "$long" >"$dir/overlong"
check "one ending that is too long is left out and counted" sh -c "
    $infer score '$model' '$dir/overlong' >'$dir/one' 2>'$dir/said' && grep -q 'line 2' '$dir/said' &&
    grep -q '^last word: 1 tasks' '$dir/one' && grep -q '^left out: 1 of 2' '$dir/one'"
tail -n 1 "$dir/overlong" >"$dir/all_overlong"
check "nothing but these" sh -c "! $infer score '$model' '$dir/all_overlong' 2>'$dir/said' &&
    grep -q 'short enough' '$dir/said'"

# ---- output that cannot be written is an error, everywhere but in training
$make_recall --ask 1 --far 16 --out "$dir/ask.txt" 2>/dev/null
printf '{"text":"Once upon a time"}\n' >"$dir/word"
while read -r what command; do
    check "$what: a full disk" sh -c "! $command >/dev/full 2>'$dir/said' &&
        [ \$(grep -c 'cannot write' '$dir/said') = 1 ]"
done <<END
perplexity $infer perplexity '$model' '$dir/two.txt' --stride 1
score $infer score '$model' '$dir/word'
inspect $infer inspect '$model'
measure $infer measure '$model' '$dir/val.txt' --tokens 200
recall $infer recall '$model' '$dir/ask.txt'
fill $infer fill '$dir/u/model_00000003.bin' 'the [MASK] sat'
generate $infer generate '$model' Once --tokens 2
help-of-infer $infer --help
help-of-a-command $infer score --help
help-of-train $train --help
prepare $prepare --tokenizer '$dir/t.bin' --out '$dir/pf' '$dir/two.txt'
train_bpe $train_bpe --vocab 270 --out '$dir/x.bin' '$dir/train.txt'
tokenize $tokenize list --tokenizer '$dir/t.bin'
make_stories $make_stories --bytes 1k --out -
make_recall $make_recall --ask 1 --out -
plot $plot --help
END
check "training goes on" sh -c "$train $tiny --steps 2 --out '$dir/fullscreen' >/dev/full &&
    [ -e '$dir/fullscreen/model_00000002.bin' ]"

# ---- names and texts of unusual kinds; a log without losses
mkdir -p "$dir/lr=1e-3" "$dir/nolosses" && cp "$dir/a/main.log" "$dir/lr=1e-3"
check "plot: a name with =" sh -c "cd '$dir' && '$PWD/$plot' loss 'lr=1e-3/main.log' -o loss.png"
check "a prompt that begins with a dash" $infer generate "$model" --tokens 2 -- "- Once"
refuse "the same without --" 2 "behind --" $infer generate "$model" "- Once"
check "help tells of --" sh -c "$infer generate --help | grep -q '^  -- '"
cp "$model" "$dir/nolosses/model.bin" && echo 's:0 cfg:1 out=x' >"$dir/nolosses/main.log"
check "a report beside a log without losses" sh -c "
    $infer report '$dir/nolosses/model.bin' 'Once upon' -o '$dir/nolosses/r.html' 2>'$dir/said' &&
    grep -q 'no losses' '$dir/said' && [ -s '$dir/nolosses/r.html' ] && [ ! -e '$dir/nolosses/r.html.tmp' ]"
refuse "stacks that are too small" 1 "OMP_STACKSIZE" env OMP_STACKSIZE=16k $infer generate "$model" Once
case $OUT in *sanitize*) ;; *) # whose shadow memory takes far more
    refuse "too small an address space" 1 "out of memory" env OMP_NUM_THREADS=1 sh -c "ulimit -v 400000;
        exec $train --depth 12 --steps 1 --out '$dir/x'" ;;
esac
refuse "another unit" 1 "OMP_STACKSIZE" env "OMP_STACKSIZE=65536 B" $train --help
check "stacks that are large enough" env OMP_STACKSIZE=1m $infer generate "$model" Once --tokens 2

# ---- empty names, numbers too large, rates that are seldom meant
for flag in out data val tokenizer init-from splat-init; do
    refuse "train: --$flag of nothing" 2 "--$flag" $train $tiny --steps 1 --$flag ""
done
refuse "infer: --pictures of nothing" 2 "--pictures" $infer inspect "$model" --pictures ""
refuse "a seed that is too large" 2 "between 0 and 9000000000000000" $train --seed 99999999999999999
refuse "steps beyond all bounds" 2 "between 1 and 1000000000" $train --steps 1e999
refuse "a rate that is no number" 2 "a number" $train --lr nan
check "a warm-up longer than the run" sh -c "
    $train $tiny --steps 2 --warmup 3 --out '$dir/w1' | grep '^warning.*warm-up' &&
    ! $train $tiny --optimizer adamw --steps 2 --warmup 2 --out '$dir/w2' | grep '^warning'"
check "few tokens for an update by Muon" sh -c "
    $train $tiny --steps 1 --out '$dir/w4' | grep '^warning.*Muon takes .* of its 64 tokens' &&
    ! $train $tiny --batch 16 --steps 1 --out '$dir/w5' | grep '^warning'"
check "a rate that rises" sh -c "
    $train $tiny --steps 2 --lr 1e-3 --min-lr 2e-3 --out '$dir/w3' | grep '^warning.*--min-lr'"

echo "cli: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
