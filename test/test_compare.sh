#!/bin/sh
# dev/compare from end to end, tiny: two kinds of attention, two seeds; stopped and started again; its table, and that
# of a page like dev/RESULTS.md. And whether the tables there are the ones that dev/compare last wrote. Ends with
# "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
export OUT
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
check() {
    name=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then pass; else fail "$name (status $?): $(tail -n 2 "$dir/err")"; fi
}
refuse() { # NAME STATUS WORD COMMAND...: it ends with STATUS and, behind what it has said of runs, a sentence with WORD
    name=$1 status=$2 word=$3
    shift 3
    "$@" >"$dir/out" 2>"$dir/err" </dev/null
    got=$?
    if [ $got -ne "$status" ]; then fail "$name: status $got, not $status: $(tail -n 2 "$dir/err")"
    elif ! tail -n 1 "$dir/err" | grep -qF -e "$word"; then fail "$name: '$word' is not in: $(cat "$dir/err")"
    elif grep -q '^Traceback' "$dir/err"; then fail "$name: $(cat "$dir/err")"
    else pass; fi
}
if ! command -v python3 >/dev/null; then
    echo "skip dev/compare: no python3"
    echo "compare: 0 passed, 0 failed, 1 skipped"
    exit 0
fi

tiny="--seeds 1,2 --depth 1 --seq 32 --batch 2 --vocab 300 --measure-tokens 512 --threads 1"
two="modes --tokens 6400 $tiny"
compare() { dev/compare $two --rows "standard.rope gsa-linear.rope" "$@"; }
one() { dev/compare $two --rows standard.rope "$@"; }
all_but_speed() {
    python3 - "$1/results.csv" <<'PYTHON'
import csv, sys
for r in csv.DictReader(line for line in open(sys.argv[1]) if line[0] != "#"):
    print({k: v for k, v in r.items() if k != "tokens_per_s"})
PYTHON
}
same() { all_but_speed "$1" | cmp - "$2"; }

check "two kinds, two seeds" compare --out "$dir/a"
all_but_speed "$dir/a" >"$dir/expected"
check "a line a run" [ "$(grep -c '^\(standard\|gsa-linear\).rope,' "$dir/a/results.csv")" = 4 ]
check "its pictures" sh -c "head -c 8 '$dir/a/bars.png' '$dir/a/loss.png' | grep -ac PNG | grep -q 2"
check "a page a row, and one that leads to them" sh -c "grep -q '</html>' '$dir/a/standard.rope.html' && \
    grep -q 'href=\"gsa-linear.rope.html\"' '$dir/a/report.html' && \
    grep -q '<td>gsa, linear</td>' '$dir/a/report.html' && \
    [ \$(grep -c 'data:image/png;base64,iVBOR' '$dir/a/report.html') = 3 ]"
check "every measure of a run" python3 - "$dir/a/results.csv" <<'PYTHON'
import csv, math, sys
rows = list(csv.DictReader(line for line in open(sys.argv[1]) if not line.startswith("# ")))
for r in rows:
    for column in ("parameters mflop memory_mib tokens tokens_per_s loss bits_per_byte entropy distance reach "
                   "effective_context").split():
        assert math.isfinite(float(r[column])) and float(r[column]) > 0, (r["row"], column, r[column])
    assert (r["loss_without_gsa"] == "") == (r["row"] == "standard.rope"), r
    assert r["tokens"] == "6400" and r["status"] == "done", r
assert len({r["loss"] for r in rows}) == 4, "seeds and kinds differ"
PYTHON
check "mean and deviation in the table" python3 - "$dir/a/results.csv" "$dir/a/table.md" <<'PYTHON'
import csv, sys
rows = list(csv.DictReader(line for line in open(sys.argv[1]) if not line.startswith("# ")))
for label, row in (("standard", "standard.rope"), ("gsa, linear", "gsa-linear.rope")):
    a, b = (float(r["loss"]) for r in rows if r["row"] == row)
    line = [x for x in open(sys.argv[2]) if x.startswith(f"| {label} |")][0].replace("**", "")
    assert f"| {(a + b) / 2:.3f} ± {abs(a - b) / 2 ** 0.5:.3f} |" in line, (a, b, line)
PYTHON
ls -l --time-style=full-iso "$dir"/a/*/model_*.bin >"$dir/times"
check "once more: nothing is repeated" compare --out "$dir/a"
check "the same models" sh -c "ls -l --time-style=full-iso '$dir'/a/*/model_*.bin | cmp - '$dir/times'"
refuse "another description in the same folder" 1 "command.txt" compare --lr 1e-3 --out "$dir/a"

# ---- a folder belongs to what is in its texts, wherever they lie
head -c 150000 "$dir/a/train.txt" >"$dir/A.txt"
tail -c 150000 "$dir/a/train.txt" >"$dir/C.txt"
head -c 30000 "$dir/a/val.txt" >"$dir/Av.txt"
check "texts of one's own" one --train "$dir/A.txt" --val "$dir/Av.txt" --out "$dir/t"
check "the data's hash in every row and in the heading" sh -c "hash=\$(sed -n 's/.*, data \([0-9a-f]*\)\$/\1/p' \
    '$dir/t/results.csv') && [ \${#hash} = 12 ] && [ \$(grep -c \$hash '$dir/t/results.csv') = 3 ] && \
    grep -q \$hash '$dir/t/table.md'"
refuse "another text, the same folder" 1 "training text" one --train "$dir/C.txt" --val "$dir/Av.txt" --out "$dir/t"
refuse "another text to measure on" 1 "validation text" one --train "$dir/A.txt" --val "$dir/C.txt" --out "$dir/t"
cp "$dir/A.txt" "$dir/moved.txt"
check "the same text in another place" one --train "$dir/moved.txt" --val "$dir/Av.txt" --out "$dir/t"
cp "$dir/C.txt" "$dir/A.txt"
refuse "another text under the same name" 1 "training text" one --train "$dir/A.txt" --val "$dir/Av.txt" --out "$dir/t"
refuse "a tokenizer where one was learned" 1 "tokenizer" \
    one --train "$dir/moved.txt" --val "$dir/Av.txt" --tokenizer "$dir/t/tokenizer.bin" --out "$dir/t"

check "a folder whose name is a pattern" dev/compare $two --seeds 1 --rows standard.rope --out "$dir/cmp[1]"
check "its results are there" sh -c "ls '$dir/cmp[1]/results.csv' '$dir'/cmp\[1\]/standard.rope.1/model_*.bin"

# ---- stopped in the middle of a training by a signal; it goes on and ends where the other did
python3 dev/compare $two --rows "standard.rope gsa-linear.rope" --out "$dir/b" >"$dir/out" 2>&1 &
pid=$!
n=0
while ! grep -qs '^s:2[0-9] trl' "$dir/b/standard.rope.1/main.log" && [ $n -lt 600 ]; do
    sleep 0.05 2>/dev/null || sleep 1
    n=$((n + 1))
done
kill -TERM $pid
wait $pid
stopped=$?
check "stopped by a signal: status 130, not $stopped" [ $stopped = 130 ]
check "stopped before its end" sh -c "! [ -e '$dir/b/results.csv' ] && ls '$dir'/b/standard.rope.1/model_*.bin"
check "two at a time, it goes on" compare --jobs 2 --out "$dir/b"
check "and ends where the unbroken one did" same "$dir/b" "$dir/expected"
check "by going on, not by starting again" grep -q 'going on from step' "$dir/b/standard.rope.1/train.txt"

# ---- a run that diverges is a result; one that cannot be is an error
check "a training that diverges" one --flags "--lr 10 --clip 0 --warmup 0 --weight-decay 10" --out "$dir/d"
grep -q 'diverged' "$dir/d/table.md" && pass ||
    fail "divergence is in the table: $(cat "$dir/d/table.md" 2>/dev/null || tail -n 1 "$dir/err")"
refuse "a training that is refused" 1 "--channels 30" one --flags "--heads 4 --channels 30" --out "$dir/e"
refuse "an unknown row" 2 "standard" dev/compare $two --rows sideways.rope --out "$dir/e"
refuse "an unknown set" 2 "choose from" dev/compare fashions
refuse "half a text" 2 "--val" compare --train "$0"
for set in fair cost modes splats adapt stability init covariance ratio context recall; do
    check "the set $set" dev/compare $set --dry-run --out "$dir/f"
    sed 's/ --out [^ ]*//' "$dir/out" >"$dir/set"
    check "its rows differ: $set" [ $(sort -u "$dir/set" | grep -c .) = $(grep -c . "$dir/set") ]
    check "some rows: $set" [ $(grep -c . "$dir/set") -ge 6 ]
    check "no flag twice: $set" awk '{ for (i = 1; i <= NF; i++) if ($i ~ /^--/ && seen[NR, $i]++) exit 1 }' "$dir/set"
done

# ---- each row at its own best rate; shards; an archive that goes to another machine
rates() { # on shards: their own loss, nothing else
    dev/compare fair $tiny --tokens 3200 --rows "standard no-gain" --rates 1e-3,1e-2 --train "$dir/a/data_train_*.bin" \
        --val "$dir/a/data_val_*.bin" --tokenizer "$dir/a/tokenizer.bin" --archive "$dir/runs.tar.xz" "$@"
}
check "rates" rates --out "$dir/g"
check "the second seed has the best rate alone, which lies within those tried" python3 - "$dir/g" <<'PYTHON'
import csv, re, sys
rows = list(csv.DictReader(line for line in open(sys.argv[1] + "/results.csv") if line[0] != "#"))
table = open(sys.argv[1] + "/table.md").read()
chosen, losses = {}, {}
for name in {r["row"] for r in rows}:
    first = {float(r["rate"]): float(r["loss"]) for r in rows if r["row"] == name and r["seed"] == "1"}
    second = [float(r["rate"]) for r in rows if r["row"] == name and r["seed"] == "2"]
    best = min(first, key=first.get)
    assert second == [best] and min(first) < best < max(first), (name, first, second)
    losses[name] = [float(r["loss"]) for r in rows if r["row"] == name and float(r["rate"]) == best]
    label = next(r["label"] for r in rows if r["row"] == name)
    line = next(line for line in table.split("\n") if line.startswith(f"| {label} |"))
    assert f"**{best:g}**" in line and f"{sum(losses[name]) / 2:.3f}" in line, line
difference = [a - b for a, b in zip(losses["no-gain"], losses["standard"])]
mean, error = sum(difference) / 2, abs(difference[0] - difference[1]) / 2
if mean < 0:
    mean = -mean
assert re.search(rf"\| [+-]{mean:.3f} ± {error:.3f} \|", table), (mean, error, table)
PYTHON
sort "$dir/g/results.csv" >"$dir/all"
check "what is done is shown" rates --out "$dir/g" --show
check "all of it" sh -c "sort '$dir/g/results.csv' | cmp - '$dir/all'"
check "a run that outlived the comparison" sh -c "rm '$dir'/g/no-gain.*.2/trained.txt"
check "is in the archive" sh -c "mv '$dir/runs.tar.xz' '$dir/whole' && dev/compare fair $tiny --tokens 3200 \
    --rows 'standard no-gain' --rates 1e-3,1e-2 --train '$dir/a/data_train_*.bin' --val '$dir/a/data_val_*.bin' \
    --tokenizer '$dir/a/tokenizer.bin' --out '$dir/g' --archive '$dir/runs.tar.xz' &&
    tar -tJf '$dir/runs.tar.xz' | grep -q 'no-gain.*[.]2/trained.txt'"
rm "$dir"/g/no-gain.*.2/trained.txt "$dir"/g/no-gain.*.2/model_*.bin
check "and no more" sh -c "mv '$dir/runs.tar.xz' '$dir/whole' && dev/compare fair $tiny --tokens 3200 --show \
    --rows 'standard no-gain' --train '$dir/a/data_train_*.bin' --val '$dir/a/data_val_*.bin' \
    --tokenizer '$dir/a/tokenizer.bin' --out '$dir/g' && mv '$dir/whole' '$dir/runs.tar.xz' &&
    grep -q 'no gain (1 of 2 seeds)' '$dir/g/table.md'"
check "elsewhere nothing is trained again" rates --out "$dir/h"
check "the same results" sh -c "sort '$dir/h/results.csv' | cmp - '$dir/all'"
check "no model came along" sh -c "! ls '$dir'/h/*/model_*.bin"
check "curves with bands, and of differences" sh -c "
    grep -al PNG '$dir/h/curves.png' '$dir/h/against.png' | grep -c . | grep -q 2"
full_disk() { "$@" >/dev/full; }
for what in --help --dry-run --show; do
    refuse "a full disk: $what" 1 "cannot write standard output" full_disk rates --out "$dir/h" $what
done
refuse "a file that is no archive" 1 "cannot read" rates --out "$dir/i" --archive "$0"
refuse "shards without their tokenizer" 2 "--tokenizer" dev/compare $two --train "$dir/a/data_train_*.bin" \
    --val "$dir/a/data_val_*.bin"
for wrong in "--rates 0" "--rates -1" "--rates nan" "--rates 20" "--rates 1e-3,1e-3" "--rates=" "--seeds 1,1" \
    "--seeds=-1"; do
    refuse "$wrong" 2 "different" dev/compare fair $wrong --dry-run --out "$dir/x"
done
for wrong in "--depth 0" "--seq 0" "--batch -1" "--jobs 0" --keep= "--keep a/b" "--keep ../x" --archive= \
    "--archive $dir" "--archive $dir/none/x.tar.xz" --rows= "--lr nan" "--lr inf" "--lr -1" "--lr 0" "--lr 20" \
    "--lr fast" "--warmup -1" "--threads -1" "--flags '"; do
    option=${wrong%%[ =]*}
    refuse "$wrong" 2 "$option" dev/compare fair $wrong --dry-run --out "$dir/x"
done
for row in gsa.sideways gsa.rope.both; do
    refuse "the row $row" 2 "unknown row" dev/compare modes --rows $row --dry-run --out "$dir/x"
done
check "a row's positions may be left out" dev/compare modes --rows gsa --dry-run --out "$dir/x"

# ---- what is in the way: one sentence
refuse "a folder that is a file" 1 "cannot use $dir/moved.txt" dev/compare $two --out "$dir/moved.txt"
refuse "no room for its files" 1 "cannot write $dir/x/sources.txt" \
    sh -c "said=\$(ulimit -f 0; dev/compare $two --out '$dir/x' 2>&1); status=\$?; echo \"\$said\" >&2; exit \$status"
check "nothing half is left" [ -z "$(ls "$dir/x")" ]
mkfifo "$dir/fifo"
refuse "Ctrl-C before the first training" 130 "goes on" test/interrupt "$dir/fifo" dev/compare $two \
    --train "$dir/fifo" --val "$dir/fifo" --out "$dir/x"
refuse "one rate and several" 2 "--rates" dev/compare $two --lr 1e-3 --rates 1e-3

# ---- recall
check "the probe of memory" dev/compare recall --rows "standard.rope" --seeds 1 --depth 1 --seq 128 --batch 2 \
    --tokens 3200 --threads 1 --measure-tokens 512 --out "$dir/r"
check "its pictures of recall" \
    sh -c "head -c 8 '$dir/r/recall_pairs.png' '$dir/r/recall_facts.png' | grep -ac PNG | grep -q 2"
check "accuracies by distance" grep -q 'pairs, up to 24.*facts, 24 to 96' "$dir/r/table.md"

# ---- the tables of dev/RESULTS.md
printf 'Before.\n\n<!-- compare two -->\nold\n<!-- /compare -->\n\nAfter.\n' >"$dir/tables.md"
check "a result is kept and shown" compare --out "$dir/a" --keep two --results "$dir/results" \
    --tables-file "$dir/tables.md"
check "the page has the table" sh -c "grep -q '^| gsa, linear |' '$dir/tables.md' && \
    grep -q '^Before' '$dir/tables.md' && grep -q '^After' '$dir/tables.md' && ! grep -q '^old' '$dir/tables.md'"
check "it is the one that was written" dev/compare tables --check --results "$dir/results" \
    --tables-file "$dir/tables.md"
sed '/^| gsa, linear/y/0123456789/1234567890/' "$dir/tables.md" >"$dir/other.md"
refuse "a table with other digits" 1 "not those" dev/compare tables --check --results "$dir/results" \
    --tables-file "$dir/other.md"
refuse "no page for the tables" 1 "cannot read" dev/compare tables --tables-file "$dir/none.md"
refuse "a table without its result" 1 "no " dev/compare tables --check --results "$dir/nothing" \
    --tables-file "$dir/tables.md"
refuse "a result without its table" 1 "no place" dev/compare tables --check --results "$dir/results" \
    --tables-file "$dir/a/table.md"
check "the tables of dev/RESULTS.md are those that dev/compare last wrote" dev/compare tables --check

echo "compare: $passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
