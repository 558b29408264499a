#!/bin/sh
# The tables of dev/RESULTS.md of birth and death of splats. All models have the quick start's shape and heads. Part 1,
# on made-up stories: a good start and two bad ones (all centres in one small ball; 4 splats alive of 32), with and
# without adaptation. Part 2: a model of TinyStories goes on with web text. sweep: each threshold below and above its
# default, one seed. Prints Markdown; stopped and started again it goes on.
#
#   dev/adapt.sh STORIES.txt STORIES_VAL.txt WEB.txt WEB_VAL.txt [OUT]
#       TRAIN=./train_gsa or ./train_gsacu   JOBS=2 (runs at a time)   THREADS=1   SEEDS="1 2 3"
#       STARTS="normal ball four"   MODES="none relocate grow"   PARTS="1 2 sweep"
#       STEPS=4000   SHIFT_STEPS=2000   SWEEP_STEPS=2000
set -e
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
case $1 in
--help | -h)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit
    ;;
-*)
    echo "adapt.sh: unknown flag $1; --help says more" >&2
    exit 2
    ;;
esac
if [ $# -lt 4 ]; then
    echo "adapt.sh: name four texts: stories, some to validate with, web text and some of it; --help says more" >&2
    exit 2
fi
cd "$(dirname "$0")/.."
stories=$1 stories_val=$2 web=$3 web_val=$4 out=${5:-runs/adapt}
train=${TRAIN:-./train_gsa} seeds=${SEEDS:-1 2 3} parts=${PARTS:-1 2}
steps=${STEPS:-4000} shift=${SHIFT_STEPS:-2000} sweep=${SWEEP_STEPS:-2000}
starts=${STARTS:-normal ball four} modes=${MODES:-none relocate grow}
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
exec $train --steps "\$last" --optimizer adamw --sample-every 0 --keep 1 --threads ${THREADS:-1} "\$@" --out "\$dir" \
    >"\$dir.log" 2>&1
EOF
list=$out/list
: >"$list"
: >"$list.later"
model="--gsa-heads 1 --gain none --phase none --rope-frequencies fixed --forget-gate none"
made="--data $out/made_train_*.bin --val $out/made_val_*.bin --tokenizer $out/made.bin $model"
for seed in $seeds; do
    case " $parts " in *" 1 "*)
        for start in $starts; do
            for adapt in $modes; do
                case $start.$adapt in
                ball.*) flags="--splat-init ball" ;;
                four.relocate) continue ;; # moved, four stay four
                four.*) flags="--splats-alive 4" ;;
                *) flags= ;;
                esac
                echo "$start.$adapt.$seed $steps $made $flags --adapt $adapt --seed $seed" >>"$list"
            done
        done ;;
    esac
    case " $parts " in *" 2 "*)
        tokens="--data $out/ts_train_*.bin --val $out/ts_val_*.bin --tokenizer $out/both.bin $model"
        echo "ts.$seed $shift $tokens --seed $seed" >>"$list"
        for adapt in $modes; do
            tokens="--data $out/web_train_*.bin --val $out/web_val_*.bin"
            from=$out/ts.$seed/model_$(printf %08d "$shift").bin
            echo "web.$adapt.$seed $shift --init-from $from $tokens --adapt $adapt --eval-every 100 --seed $seed" \
                >>"$list.later"
        done ;;
    esac
done
settings="life 100, activation 0.05, activation 0.15, activation 0.6, overlap 0.98, overlap 0.999, coverage 0"
settings="$settings, density 0.1, life 25, life 400, every 20, pull 1, pull 16"
case " $parts " in *" sweep "*)
    echo "$settings" | tr ',' '\n' | while read -r flag value; do
        extra=
        [ "$flag" != density ] || extra=,coverage=0
        extra="--adapt-rules $flag=$value$extra --seed 1"
        echo "sweep.normal.$flag.$value $sweep $made --adapt grow $extra" >>"$list.later"
        echo "sweep.ball.$flag.$value $sweep $made --splat-init ball --adapt relocate $extra" >>"$list.later"
    done ;;
esac
for step in "$list" "$list.later"; do
    [ ! -s "$step" ] || xargs -P "${JOBS:-2}" -d '\n' -I{} sh -c "set -f; sh '$out/run.sh' {}" <"$step"
done

# ---- the tables, from the logs
last_of() { sed -n 's/.* tel:\([0-9.]*\).*/\1/p' "$out/$1/main.log" | tail -n 1; }
state_of() { grep ' adp:state' "$out/$1/main.log" | tail -n 1 | sed "s/.* $2:\([-0-9.]*\).*/\1/"; }
events_of() { grep -c -E ' adp:(birth|split|move|death|merge) ' "$out/$1/main.log" || true; }
mean() {
    awk '{ for (i = 1; i <= NF; i++) s[i] += $i; n = NF > n ? NF : n }
        END { for (i = 1; i <= n; i++) printf("%s%.4f", i > 1 ? " " : "", s[i] / NR) }'
}
case " $parts " in *" 1 "*)
    echo "| start | adaptation | validation loss by seed | mean | recovered | events | alive a head |"
    echo "|---|---|---|---|---|---|---|"
    normal=$(for s in $seeds; do last_of "normal.none.$s"; done | mean)
    for row in $starts; do
        bad=$(for s in $seeds; do last_of "$row.none.$s"; done | mean)
        for adapt in $modes; do
            [ -e "$out/$row.$adapt.${seeds%% *}/main.log" ] || continue
            each=$(for s in $seeds; do last_of "$row.$adapt.$s"; done)
            fewest=$(for s in $seeds; do grep -h -o 'fewest:[0-9]*' "$out/$row.$adapt.$s/main.log"; done |
                cut -d: -f2 | sort -n | head -n 1)
            most=$(for s in $seeds; do state_of "$row.$adapt.$s" alive; done | sort -n | tail -n 1)
            events=$(for s in $seeds; do events_of "$row.$adapt.$s"; done | tr '\n' ' ')
            echo "$each" | awk -v row="$row" -v adapt="$adapt" -v normal="$normal" -v bad="$bad" \
                -v events="$events" -v fewest="$fewest" -v most="$most" \
                '{ each = each (NR > 1 ? ", " : "") sprintf("%.4f", $1); sum += $1 } END { m = sum / NR
                   got = row == "normal" || adapt == "none" ? "" : sprintf("%.0f %%", 100 * (bad - m) / (bad - normal))
                   printf("| %s | %s | %s | %.4f | %s | %s| %s, in all at most %s |\n", row, adapt, each, m, got,
                          events, fewest, most) }'
        done
    done ;;
esac
case " $parts " in *" 2 "*)
    echo
    echo "| web text after stories | loss after $shift steps, by seed |" \
        "steps to the loss that \`none\` ends with | shifts | events |"
    echo "|---|---|---|---|---|"
    for adapt in $modes; do
        losses= reached= shifts= events=
        for s in $seeds; do
            goal=$(last_of "web.none.$s")
            losses="$losses $(last_of "web.$adapt.$s" | cut -c1-6)"
            reached="$reached $(sed -n 's/^s:\([0-9]*\) tel:\([0-9.]*\).*/\1 \2/p' "$out/web.$adapt.$s/main.log" |
                awk -v goal="$goal" '$2 <= goal { print $1; found = 1; exit } END { if (!found) print "-" }')"
            shifts="$shifts $(grep -c ' adp:shift' "$out/web.$adapt.$s/main.log" || true)"
            events="$events $(events_of "web.$adapt.$s")"
        done
        echo "| $adapt |$losses |$reached |$shifts |$events |"
    done ;;
esac
case " $parts " in *" sweep "*)
    echo
    echo "| threshold | normal, grow | events | ball, relocate | events |"
    echo "|---|---|---|---|---|"
    echo "$settings" | tr ',' '\n' | while read -r flag value; do
        name=$flag.$value
        [ "$name" = life.100 ] && shown=defaults || shown="$flag $value"
        normal=$(last_of "sweep.normal.$name" | cut -c1-6) ball=$(last_of "sweep.ball.$name" | cut -c1-6)
        echo "| $shown | $normal | $(events_of "sweep.normal.$name") | $ball | $(events_of "sweep.ball.$name") |"
    done ;;
esac
