#!/bin/sh
# The README's tables of kinds of attention: trains each on the same text, tokens and seed, measures the whole validation text with
# infer perplexity and prints Markdown. Stopped and started again it goes on.
#
#   dev/table.sh TRAIN.txt VAL.txt [OUT]      SEEDS="1 2 3" TOKENS=5000000 DEPTH=4 BATCH=16 VOCAB=2048 LR=1e-3 ROWS="standard.learned hybrid.rope"
set -e
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # the machine stays usable meanwhile
cd "$(dirname "$0")/.."
if [ $# -lt 2 ]; then
    sed -n '2,6p' "$0"
    exit 2
fi
train=$1 val=$2 out=${3:-runs/table} seeds=${SEEDS:-1} depth=${DEPTH:-4} vocab=${VOCAB:-2048} batch=${BATCH:-16} seq=256
steps=$((${TOKENS:-5000000} / (batch * seq)))
make -s train_gsa infer data/prepare tokenizer/train_bpe
mkdir -p "$out"
[ -e "$out/tokenizer.bin" ] || tokenizer/train_bpe --vocab "$vocab" --out "$out/tokenizer.bin" "$train"
ls "$out"/data_val_*.bin >/dev/null 2>&1 || data/prepare --tokenizer "$out/tokenizer.bin" --out "$out/data" --val "$val" "$train"

flags_of() { # a row's name is kind.positions
    case ${1%.*} in
    standard | gsa | hybrid | augment | extend) echo "--attention ${1%.*}" ;;
    gsa-no-envelope) echo "--attention gsa --envelope none" ;;
    gsa-linear) echo "--attention gsa --mixer linear" ;;
    window-linear) echo "--attention hybrid --mixer linear --window 64" ;;
    *) echo "unknown row $1" >&2; exit 2 ;;
    esac
    echo "--pos ${1#*.}"
}

table=$out/table.md
{
    echo "| attention | positions | seed | parameters | validation loss | perplexity | bits per byte |"
    echo "|---|---|---|---|---|---|---|"
} >"$table.tmp"
for seed in $seeds; do
    for row in ${ROWS:-hybrid.rope standard.learned gsa.rope hybrid.both standard.rope}; do
        flags=$(flags_of "$row")
        run=$out/$row.$seed
        model=$(printf '%s/model_%08d.bin' "$run" $steps)
        resume=$(ls "$run"/model_*.bin >/dev/null 2>&1 && echo --resume || true)
        if [ ! -e "$model" ]; then
            if [ "$resume" ]; then ./train_gsa --resume --out "$run"
            else
                ./train_gsa --data "$out/data_train_*.bin" --val "$out/data_val_*.bin" --tokenizer "$out/tokenizer.bin" $flags --depth "$depth" \
                    --seq $seq --batch "$batch" --steps $steps --lr "${LR:-1e-3}" --warmup 100 --seed "$seed" --eval-every 200 --sample-every 0 --out "$run"
            fi >>"$run.txt"
        fi
        [ -e "$run/perplexity.txt" ] || ./infer perplexity "$model" "$val" >"$run/perplexity.txt.tmp"
        [ -e "$run/perplexity.txt" ] || mv "$run/perplexity.txt.tmp" "$run/perplexity.txt"
        parameters=$(sed -n 's/^parameters *\([0-9]*\),.*/\1/p' "$run.txt" | head -n 1)
        awk -v a="${row%.*}" -v p="${row#*.}" -v s="$seed" -v n="$parameters" '/^loss/ { l = $2 } /^perplexity/ { x = $2 " ± " $4 } /^bits/ { b = $4 }
            END { printf "| %s | %s | %s | %s | %.4f | %s | %s |\n", a, p, s, n, l, x, b }' "$run/perplexity.txt" >>"$table.tmp"
    done
done
mv "$table.tmp" "$table"
cat "$table"
