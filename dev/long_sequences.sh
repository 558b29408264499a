#!/bin/sh
# The table of long sequences in dev/SPEED.md: four training steps of GPT-2's 124M shape at batch 1 for each length,
# memory as the program says it and the last step's speed, as Markdown. A length that does not fit shows the program's
# own sentence instead.
#
#   dev/long_sequences.sh SHARDS TOKENIZER
#       PROGRAM=./train_gsacu   FLAGS="--optimizer adamw --attention hybrid --mixer linear --window 1024"
#       ROWS="65536 131072 131072:--recompute 262144:--recompute 1048576:--recompute"
case $1 in
--help | -h)
    sed -n '2,/^case/s/^# \{0,1\}//p' "$0"
    exit
    ;;
-*)
    echo "long_sequences.sh: unknown flag $1; --help says more" >&2
    exit 2
    ;;
esac
if [ $# -lt 2 ]; then
    echo "long_sequences.sh: name the shards and their tokenizer; --help says more" >&2
    exit 2
fi
cd "$(dirname "$0")/.." || exit 1
program=${PROGRAM:-./train_gsacu} flags=${FLAGS:---optimizer adamw --attention hybrid --mixer linear --window 1024}
rows=${ROWS:-65536 131072 131072:--recompute 262144:--recompute 1048576:--recompute}
log=$(mktemp) out=$(mktemp -d)
trap 'rm -rf "$log" "$out"' EXIT
echo "| T | flags | memory, GiB | of it residual stream | ms a step | tokens/s |"
echo "|---|---|---|---|---|---|"
for row in $rows; do
    T=${row%%:*} more=${row#"$T"}
    rm -rf "$out/run"
    # shellcheck disable=SC2086
    if "$program" --preset gpt2-124m --seq "$T" --batch 1 $flags ${more#:} --data "$1" --tokenizer "$2" --steps 4 \
        --eval-every 0 --sample-every 0 --save-every 0 --out "$out/run" >"$log" 2>&1; then
        awk -v T="$T" -v flags="${more#:}" '
            /^memory, MiB/ { memory = 1 } /^parameters / { memory = 0 }
            memory {
                for (i = 2; i <= NF; i++) {
                    if ($(i - 1) == "sum") sum = $i
                    if ($(i - 1) == "stream") stream = $i
                }
            }
            /^step 4\// { ms = $0; sub(/ ms .*/, "", ms); sub(/.*\| /, "", ms) }
            END {
                printf "| %d | %s | %.1f | %.1f | %d | %d |\n", T, flags, sum / 1024, stream / 1024, ms, 1000 * T / ms
            }' "$log"
    else
        echo "| $T | ${more#:} | $(tail -n 1 "$log") | | | |"
    fi
done
