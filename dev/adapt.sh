#!/bin/sh
# The README's table of birth and death of splats. Part 1, on made-up stories: the default run, and runs from two bad starts (all centres in one
# small ball; 4 splats alive of 32), with and without adaptation. Part 2: a model of TinyStories goes on with web text. Prints Markdown; stopped
# and started again it goes on.
#
#   dev/adapt.sh STORIES.txt STORIES_VAL.txt WEB.txt WEB_VAL.txt [OUT]
#       TRAIN=./train_gsa or ./train_gsacu   JOBS=2 (runs at a time)   THREADS=1   SEEDS="1 2 3"   STEPS=8000   SHIFT_STEPS=2000   PARTS="1 2 sweep"
set -e
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
cd "$(dirname "$0")/.."
if [ $# -lt 4 ]; then
    sed -n '2,7p' "$0"
    exit 2
fi
stories=$1 stories_val=$2 web=$3 web_val=$4 out=${5:-runs/adapt}
train=${TRAIN:-./train_gsa} seeds=${SEEDS:-1 2 3} steps=${STEPS:-8000} shift=${SHIFT_STEPS:-2000} parts=${PARTS:-1 2}
mkdir -p "$out"
[ -x data/prepare ] && [ -x "$train" ] || make -s train_gsa data/prepare data/make_stories tokenizer/train_bpe

if [ ! -e "$out/made_train_000000.bin" ]; then
    data/make_stories --bytes 34000000 --out "$out/made.txt"
    data/make_stories --bytes 300000 --seed 99 --out "$out/made_val.txt"
    head -c 2000000 "$out/made.txt" >"$out/made_part.txt"
    tokenizer/train_bpe --vocab 1024 --out "$out/made.bin" "$out/made_part.txt"
    data/prepare --tokenizer "$out/made.bin" --out "$out/made" --val "$out/made_val.txt" "$out/made.txt"
fi
case " $parts " in *" 2 "*)
    if [ ! -e "$out/web_train_000000.bin" ]; then
        head -c 2000000 "$stories" >"$out/both.txt"
        head -c 2000000 "$web" >>"$out/both.txt"
        tokenizer/train_bpe --vocab 2048 --out "$out/both.bin" "$out/both.txt"
        data/prepare --tokenizer "$out/both.bin" --out "$out/ts" --val "$stories_val" "$stories"
        data/prepare --tokenizer "$out/both.bin" --out "$out/web" --val "$web_val" "$web"
    fi ;;
esac

# one run: NAME flags; done when its last model is there
cat >"$out/run.sh" <<EOF
name=\$1 last=\$2
shift 2
dir=$out/\$name
[ -e \$(printf '%s/model_%08d.bin' "\$dir" "\$last") ] && exit 0
if ls "\$dir"/model_*.bin >/dev/null 2>&1; then exec $train --resume --out "\$dir" >>"\$dir.log"; fi
rm -rf "\$dir"
exec $train --steps "\$last" --sample-every 0 --keep 1 --threads ${THREADS:-1} "\$@" --out "\$dir" >"\$dir.log" 2>&1
EOF
list=$out/list
: >"$list"
: >"$list.later"
made="--data $out/made_train_*.bin --val $out/made_val_*.bin --tokenizer $out/made.bin"
for seed in $seeds; do
    case " $parts " in *" 1 "*)
        for row in "normal" "ball --splat-init ball" "four --splats-alive 4"; do
            for adapt in none relocate grow; do
                echo "${row%% *}.$adapt.$seed $steps $made $(echo "$row " | cut -s -d' ' -f2-) --adapt $adapt --seed $seed" >>"$list"
            done
        done
        echo "normal.eager.$seed $steps $made --adapt relocate --adapt-activation 0.5 --seed $seed" >>"$list" ;;
    esac
    case " $parts " in *" 2 "*)
        echo "ts.$seed $shift --data $out/ts_train_*.bin --val $out/ts_val_*.bin --tokenizer $out/both.bin --seed $seed" >>"$list"
        for adapt in none relocate grow; do
            echo "web.$adapt.$seed $shift --init-from $out/ts.$seed/model_$(printf %08d "$shift").bin --data $out/web_train_*.bin --val $out/web_val_*.bin --adapt $adapt --eval-every 100 --seed $seed" >>"$list.later"
        done ;;
    esac
done
case " $parts " in *" sweep "*)
    for flag in "activation 0.01" "activation 0.2" "overlap 0.98" "overlap 0.999" "coverage -1" "coverage 1" "density 0.005" "density 0.1" "life 50" "life 400" "every 25" "every 200" "pull 1" "pull 16"; do
        extra=
        case $flag in density*) extra="--adapt-coverage 1" ;; esac
        for row in "ball relocate --splat-init ball" "four grow --splats-alive 4"; do
            set -- $row
            echo "sweep.$1.$(echo "$flag" | tr ' ' '.') $steps $made --adapt $2 $3 $4 --adapt-$flag $extra --seed 1" >>"$list"
        done
    done ;;
esac
for step in "$list" "$list.later"; do
    [ ! -s "$step" ] || xargs -P "${JOBS:-2}" -d '\n' -I{} sh -c "set -f; sh '$out/run.sh' {}" <"$step"
done

# ---- the tables, from the logs
last_of() { sed -n 's/.* tel:\([0-9.]*\).*/\1/p' "$out/$1/main.log" | tail -n 1; }
state_of() { grep ' adp:state' "$out/$1/main.log" | tail -n 1 | sed "s/.* $2:\([-0-9.]*\).*/\1/"; }
events_of() { grep -c -E ' adp:(birth|split|move|death|merge) ' "$out/$1/main.log" || true; }
mean() { awk '{ for (i = 1; i <= NF; i++) s[i] += $i; n = NF > n ? NF : n } END { for (i = 1; i <= n; i++) printf("%s%.4f", i > 1 ? " " : "", s[i] / NR) }'; }
case " $parts " in *" 1 "*)
    echo "| start | adaptation | validation loss by seed | mean | recovered | events | alive a head |"
    echo "|---|---|---|---|---|---|---|"
    normal=$(for s in $seeds; do last_of "normal.none.$s"; done | mean)
    for row in normal ball four; do
        bad=$(for s in $seeds; do last_of "$row.none.$s"; done | mean)
        for adapt in none relocate grow eager; do
            [ -e "$out/$row.$adapt.${seeds%% *}/main.log" ] || continue
            each=$(for s in $seeds; do last_of "$row.$adapt.$s"; done)
            fewest=$(for s in $seeds; do grep -h -o 'fewest:[0-9]*' "$out/$row.$adapt.$s/main.log"; done | cut -d: -f2 | sort -n | head -n 1)
            most=$(for s in $seeds; do state_of "$row.$adapt.$s" alive; done | sort -n | tail -n 1)
            echo "$each" | awk -v row="$row" -v adapt="$adapt" -v normal="$normal" -v bad="$bad" -v events="$(for s in $seeds; do events_of "$row.$adapt.$s"; done | tr '\n' ' ')" -v fewest="$fewest" -v most="$most" \
                '{ each = each (NR > 1 ? ", " : "") sprintf("%.4f", $1); sum += $1 } END { m = sum / NR
                   got = row == "normal" || adapt == "none" ? "" : sprintf("%.0f %%", 100 * (bad - m) / (bad - normal))
                   printf("| %s | %s | %s | %.4f | %s | %s| %s, in all at most %s |\n", row, adapt, each, m, got, events, fewest, most) }'
        done
    done ;;
esac
case " $parts " in *" 2 "*)
    echo
    echo "| web text after stories | loss after $shift steps, by seed | steps to the loss that \`none\` ends with | shifts | events |"
    echo "|---|---|---|---|---|"
    for adapt in none relocate grow; do
        losses= reached= shifts= events=
        for s in $seeds; do
            goal=$(last_of "web.none.$s")
            losses="$losses $(last_of "web.$adapt.$s" | cut -c1-6)"
            reached="$reached $(sed -n 's/^s:\([0-9]*\) tel:\([0-9.]*\).*/\1 \2/p' "$out/web.$adapt.$s/main.log" | awk -v goal="$goal" '$2 <= goal { print $1; found = 1; exit } END { if (!found) print "-" }')"
            shifts="$shifts $(grep -c ' adp:shift' "$out/web.$adapt.$s/main.log" || true)"
            events="$events $(events_of "web.$adapt.$s")"
        done
        echo "| $adapt |$losses |$reached |$shifts |$events |"
    done ;;
esac
case " $parts " in *" sweep "*)
    echo
    echo "| threshold | ball, relocate | events | four, grow | events |"
    echo "|---|---|---|---|---|"
    for name in $(sed -n 's/^sweep\.ball\.\([^ ]*\) .*/\1/p' "$list"); do
        echo "| $(echo "$name" | sed 's/\./ /') | $(last_of "sweep.ball.$name" | cut -c1-6) | $(events_of "sweep.ball.$name") | $(last_of "sweep.four.$name" | cut -c1-6) | $(events_of "sweep.four.$name") |"
    done ;;
esac
