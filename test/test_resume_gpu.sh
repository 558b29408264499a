#!/bin/sh
# train_gsacu as a user meets it: a run that is killed and goes on ends as an unbroken one, bit for bit, whatever the
# file of remembered algorithms holds: the same as then, nothing, those of another day, or none can be kept; and two
# runs that fill an empty one at the same time agree. Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
train=./${OUT}train_gsacu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
end() {
    echo "resume_gpu: $passed passed, $failed failed, $skipped skipped"
    exit $((failed > 0))
}
if [ ! -x "$train" ] || ! $train --steps 1 --eval-every 0 --sample-every 0 --out "$dir/first" >"$dir/log" 2>&1; then
    echo "skip train_gsacu: $(if [ -x "$train" ]; then tail -n 1 "$dir/log"; else echo "it was not built"; fi)"
    skipped=1
    end
fi
export XDG_CACHE_HOME
run="--layers 4 --heads 8 --channels 512 --seq 512 --batch 16 --steps 20 --save-every 10 --keep 0 --eval-every 5"
run="$run --sample-every 10 --eval-tokens 16384"
# runs NAME CACHE FLAGS...: a run in $dir/NAME
runs() {
    name=$1 XDG_CACHE_HOME=$dir/$2
    shift 2
    $train --out "$dir/$name" "$@" >"$dir/$name.txt" 2>&1 || fail "$name: $(tail -n 1 "$dir/$name.txt")"
}
# same NAME WHAT: that run's last files are those of the unbroken one
same() {
    for kind in model state; do
        if cmp -s "$dir/whole/${kind}_00000020.bin" "$dir/$1/${kind}_00000020.bin"; then pass
        else fail "$2: another $kind than without a break"; fi
    done
}
half() { mkdir "$dir/$1" && cp "$dir/whole/"*_00000010.bin "$dir/$1"; } # a run that stopped at step 10

runs whole cold $run
runs again cold $run
same again "a second run, the cache filled by the first"
half warm
runs warm cold --resume
same warm "resumed, the same cache"
half empty
runs empty emptied --resume
same empty "resumed, an empty cache"
half other
runs filled other $run # times on its own: some choices may differ
cmp -s "$dir"/cold/gsa.c/* "$dir"/other/gsa.c/* && echo "both caches hold the same choices: that test shows little"
runs other other --resume
same other "resumed, another machine's cache"
half none
(unset XDG_CACHE_HOME HOME && $train --resume --out "$dir/none" >"$dir/none.txt" 2>&1) ||
    fail "without a cache: $(tail -n 1 "$dir/none.txt")"
same none "resumed, no cache at all"

# killed as soon as step 10 is there
XDG_CACHE_HOME=$dir/cold
$train $run --out "$dir/killed" >"$dir/killed.txt" 2>&1 &
pid=$!
while [ ! -e "$dir/killed/model_00000010.bin" ] && kill -0 $pid 2>/dev/null; do :; done
kill -9 $pid 2>/dev/null
wait $pid 2>/dev/null
if [ -e "$dir/killed/model_00000010.bin" ] && [ ! -e "$dir/killed/model_00000020.bin" ]; then pass
else fail "it could not be killed between steps 10 and 20: $(tail -n 1 "$dir/killed.txt")"; fi
runs killed emptied2 --resume
same killed "killed, resumed with an empty cache"
if [ "$(ls "$dir/killed" | tr '\n' ' ')" = "main.log model_00000010.bin model_00000020.bin state_00000010.bin \
state_00000020.bin " ]; then pass; else fail "killed: files are left over: $(ls "$dir/killed")"; fi

# two at once, on an empty cache
runs one both $run &
pid=$!
runs two both $run
wait $pid
for kind in model state; do
    if cmp -s "$dir/one/${kind}_00000020.bin" "$dir/two/${kind}_00000020.bin"; then pass
    else fail "two runs at once on an empty cache: the $kind differs"; fi
done
if sort "$dir"/both/gsa.c/* | cut -d ' ' -f 1-6 | uniq -d | grep -q .; then
    fail "two runs at once: the cache holds a shape twice"; else pass; fi

# a state of another machine: a warning, and the run goes on
half strange
LC_ALL=C sed -i 's/cuBLASLt \([0-9]\)/cuBLASLt X/' "$dir/strange/state_00000010.bin"
runs strange cold --resume
if grep -q 'last digits' "$dir/strange.txt"; then pass; else fail "no word about another machine"; fi
end
