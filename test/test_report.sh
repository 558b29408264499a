#!/bin/sh
# infer report and dev/plot as a user meets them: every kind of model, every kind of mistake; the page in headless
# Chromium, looked at and clicked on.
# OUT is the folder of the programs (empty: the top). Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
train=./${OUT}train_gsa infer=./${OUT}infer plot=./${OUT}dev/plot
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0 skipped=0
pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); echo "FAIL $1"; }
check() {
    name=$1
    shift
    if "$@" >"$dir/out" 2>"$dir/err"; then pass; else fail "$name (status $?): $(tail -n 2 "$dir/err")"; fi
}
refuse() { # NAME STATUS WORD COMMAND...: ends with STATUS and one sentence on stderr that holds WORD
    name=$1 status=$2 word=$3
    shift 3
    ASAN_OPTIONS=detect_leaks=0 "$@" >"$dir/out" 2>"$dir/err" </dev/null
    got=$?
    if [ $got -ne "$status" ]; then fail "$name: status $got, not $status: $(tail -n 2 "$dir/err")"
    elif [ "$(wc -l <"$dir/err")" -ne 1 ]; then fail "$name: not one sentence: $(cat "$dir/err")"
    elif ! grep -qF -e "$word" "$dir/err"; then fail "$name: '$word' is not in: $(cat "$dir/err")"
    else pass; fi
}

tiny="--layers 2 --heads 2 --channels 32 --seq 32 --batch 2 --vocab 300 --eval-tokens 256 --sample-every 0 --steps 3"
text="Once there was a girl"
for mode in "--attention standard --pos learned" "--attention hybrid" \
    "--attention gsa --mixer linear --covariance full" \
    "--attention augment --window 4 --mixer linear --envelope none" \
    "--attention extend --window 5 --pos both" "--objective mlm --mixer linear"; do
    rm -rf "$dir/m"
    check "train $mode" $train $tiny $mode --out "$dir/m"
    check "report of $mode" $infer report "$dir/m/model_00000003.bin" "$text [MASK]" -o "$dir/r.html" \
        --pictures "$dir/p"
    check "it is a page with the training's curves: $mode" sh -c "grep -q '</html>' '$dir/r.html' && \
        grep -q '\"training\":\\[\"data:' '$dir/r.html' && [ -s '$dir/p/heads.png' ] && \
        [ -s '$dir/p/attention_1_1.png' ]"
done
encoder=$dir/m/model_00000003.bin
check "train hybrid" $train $tiny --gsa-heads 1 --out "$dir/a"
model=$dir/a/model_00000003.bin
long=$(printf 'word %.0s' $(seq 40))
check "a text longer than the context is cut, and the page says so" \
    sh -c "$infer report '$model' '$long' -o '$dir/r.html' 2>'$dir/note' && \
    grep -q 'the first 32 are shown' '$dir/note' && grep -q 'the first 32 are shown' '$dir/r.html'"
check "--tokens cuts earlier" sh -c "$infer report '$model' '$long' --tokens 7 -o '$dir/r.html' 2>'$dir/note' && \
    grep -q 'the first 7 are shown (--tokens' '$dir/note'"
printf '%s\n' "$text" >"$dir/text"
check "text from a file" $infer report "$model" --file "$dir/text" -o "$dir/r.html"
check "pictures of chosen heads" \
    sh -c "$infer report '$model' '$text' -o '$dir/r.html' --pictures '$dir/q' --heads 0:1,1:0-1 && \
    [ \$(ls '$dir/q' | wc -l) = 11 ] && [ ! -e '$dir/q/attention_0_0.png' ]"
for type in bf16 int8; do # rounded weights: nearly the same page
    check "quantize to $type" $infer quantize "$model" "$dir/$type.bin" --type $type
    check "report of $type" $infer report "$dir/$type.bin" "$text" -o "$dir/$type.html"
    loss() { sed -n 's/^"loss":\[null,\([^]]*\)\].*/\1/p' "$1" | tr ',' ' '; }
    check "its losses are near those of fp32: $type" \
        sh -c "echo \"$(loss "$dir/r.html")\" \"$(loss "$dir/$type.html")\" | \
        awk '{ n = NF / 2; for (i = 1; i <= n; i++) if ((\$i - \$(n + i)) ^ 2 > 0.0025) exit 1; exit n < 5 }'"
done
mkdir "$dir/alone" && cp "$model" "$dir/alone/m.bin"
check "a model without a log beside it" sh -c "$infer report '$dir/alone/m.bin' '$text' -o '$dir/alone/r.html' && \
    grep -q '\"training\":\\[\\]' '$dir/alone/r.html'"
check "names and snippets of a longer text" sh -c "$infer report '$model' '$text' --examples '$dir/text' \
    -o '$dir/r.html' && grep -q '\"means\":\[{\"name\":' '$dir/r.html'"
refuse "report: no examples" 1 "$dir/none" $infer report "$model" "$text" --examples "$dir/none"
refuse "report: no text" 2 "text" $infer report "$model"
refuse "report: empty text" 1 "empty" $infer report "$model" ""
refuse "report: empty file" 1 "empty" $infer report "$model" --file /dev/null
refuse "report: two texts" 2 "quotes" $infer report "$model" a b
refuse "report: text twice" 2 "not both" $infer report "$model" a --file "$dir/text"
refuse "report: no such folder" 1 "$dir/none/r.html" $infer report "$model" a -o "$dir/none/r.html"
refuse "report: no model" 1 "$dir/text" $infer report "$dir/text" a
refuse "report: --heads alone" 2 "--pictures" $infer report "$model" a --heads 0:0
refuse "report: a head that is not there" 2 "heads 0 to 1" $infer report "$model" a --pictures "$dir/q" --heads 0:2
refuse "report: a map that is none" 2 "0:3,2:1-4" $infer report "$model" a --pictures "$dir/q" --heads x
refuse "report: rest behind a map" 2 "commas" $infer report "$model" a --pictures "$dir/q" --heads 0:0-1x
refuse "report: --tokens" 2 "--tokens" $infer report "$model" a --tokens 1

# ---- plots
printf 'name,loss,"deviation, of 3"\n"a, b",2.5,0.1\nc,2.25,\n\n"say ""x""",nan,1\n' >"$dir/t.csv"
check "loss" $plot loss "$dir/a/main.log" "other=$dir/m/main.log" -o "$dir/loss.png"
check "loss in a range" $plot loss "$dir/a/main.log" --low 1 --high 8 --title "A title" --out "$dir/loss.png"
check "bars" $plot bars "$dir/t.csv" -o "$dir/bars.png"
printf 'kind,x,y\n"a, b",1,2\nc,1,3\n"a, b",2,4\nc,2,2.5\nc,3,none\n' >"$dir/l.csv"
check "lines" $plot lines "$dir/l.csv" -o "$dir/lines.png"
check "lines, named" $plot lines "$dir/l.csv" --by kind --x y --y x --low 0 --high 3 --title "A title" -o \
    "$dir/lines.png"
check "lines, doubling" $plot lines "$dir/l.csv" --by kind --x x --y y --doubling -o "$dir/lines.png"
printf 'kind,x,y\na,0,2\n' >"$dir/z.csv"
refuse "lines: doubling from 0" 1 "above 0" $plot lines "$dir/z.csv" --doubling
refuse "lines: no numbers" 1 "no numbers" $plot lines "$dir/l.csv" --y kind
refuse "lines: no such column" 1 "no column 'z'" $plot lines "$dir/l.csv" --y z
refuse "lines: no table" 2 "table" $plot lines
check "bars with errors" $plot bars "$dir/t.csv" --value loss --error "deviation, of 3" --label name -o "$dir/bars.png"
check "pictures are PNG" sh -c "head -c 4 '$dir/bars.png' | grep -q PNG && head -c 4 '$dir/loss.png' | grep -q PNG"
check "plot: an unknown command is refused" \
    sh -c "$plot bar 2>'$dir/err' >/dev/null; [ \$? = 2 ] && grep -q 'unknown command' '$dir/err'"
refuse "loss: no log" 2 "main.log" $plot loss
refuse "loss: no such log" 1 "$dir/none" $plot loss "$dir/none"
refuse "loss: not a log" 1 "holds no losses" $plot loss "$dir/t.csv"
refuse "loss: half a range" 2 "--high" $plot loss "$dir/a/main.log" --low 1
refuse "adapt: nothing adapted" 1 "adp" $plot adapt "$dir/text"
printf 's:10 adp:birth l:0 h:1 slot:3 act:0.1\ns:20 adp:state alive:9 fewest:4 coverage:-1.5\n' >"$dir/adapt.log"
check "adapt" $plot adapt "$dir/adapt.log" -o "$dir/adapt.png"
refuse "bars: no such column" 1 "no column 'x'" $plot bars "$dir/t.csv" --value x
refuse "bars: no numbers" 1 "no number" $plot bars "$dir/t.csv" --value name
printf 'a,b\n' >"$dir/u.csv"
refuse "bars: names only" 1 "no rows" $plot bars "$dir/u.csv"
refuse "bars: one column" 1 "one column" $plot bars "$dir/text"
printf 'a,b\n1\n' >"$dir/u.csv"
refuse "bars: a short row" 1 "row 1 has 1 cells" $plot bars "$dir/u.csv"
refuse "bars: cannot be written" 1 "$dir/none/b.png" $plot bars "$dir/t.csv" -o "$dir/none/b.png"

# ---- in a browser: the page as it opens with a head and a token chosen, then after a pointer has entered a token and a
# click on the picture of all heads
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome)
if [ -z "$browser" ]; then
    echo "skip the page in a browser: no chromium"
    skipped=$((skipped + 1))
else
    look() { # with a profile of its own
        timeout 120 "$browser" --headless --no-sandbox --disable-gpu --user-data-dir="$dir/profile" "$@" 2>"$dir/err"
    }
    check "report for the browser" $infer report "$model" "$text called Lily" -o "$dir/r.html"
    look --dump-dom "file://$dir/r.html#l=1&h=1&t=3" >"$dir/dom"
    check "the chosen token is shown" grep -q '<span id="name">3: ' "$dir/dom"
    check "whom it attends to is shown" grep -q '<caption>attends to</caption><tr><td>[0-9]*: ' "$dir/dom"
    check "its splats are shown" grep -q '<caption>splats of its query</caption><tr><td>splat [0-9]*' "$dir/dom"
    check "the splats are drawn" grep -q '<ellipse ' "$dir/dom"
    # a copy of the page that acts as a user does, and writes what it sees at its end
    sed '/<\/body>/d; /<\/html>/d' "$dir/r.html" >"$dir/act.html"
    cat >>"$dir/act.html" <<'PAGE'
<pre id="seen"></pre><script>
const seen = [], span = n => document.querySelectorAll("#text span")[n];
span(2).dispatchEvent(new PointerEvent("pointerenter"));
seen.push("hover " + $("name").textContent.split(":")[0]);
span(4).click();
span(1).dispatchEvent(new PointerEvent("pointerenter"));
seen.push("held " + $("name").textContent.split(":")[0]);
span(4).click();
span(1).dispatchEvent(new PointerEvent("pointerenter"));
seen.push("free " + $("name").textContent.split(":")[0]);
$("overview").decode().then(() => {
  const zoom = $("overview").naturalWidth / $("overview").clientWidth;
  const box = $("overview").getBoundingClientRect(), [left, top, pitch] = D.grid;
  const x = box.left + (left + 0.4 * pitch) / zoom, y = box.top + (top + 1.4 * pitch) / zoom;
  $("overview").dispatchEvent(new MouseEvent("click", {clientX: x, clientY: y}));
  seen.push("head " + $("layer").value + ":" + $("number").value + " " + $("kind").textContent.split(";")[0]);
  seen.push("no splats " + ($("splats").closest(".gsa").style.display === "none"));
  $("on").click();
  seen.push("next " + $("layer").value + ":" + $("number").value + " " + $("splats").rows.length);
  const w = weights()[3], sum = Array.from(w, share).reduce((a, b) => a + b);
  seen.push("sum " + (Math.abs(sum - 1) < 0.03));
  const own = splats().means.findIndex(e => e.k.length > 0);
  $("splats").rows[1 + own].click();
  seen.push("chosen " + (state.s === own && $("chosen-name").textContent.startsWith("Splat ")));
  seen.push("snippets " + (document.querySelectorAll("#owned b").length >= splats().means[own].k.length));
  const dotted = Array.from(document.querySelectorAll("#owned td + td")).some(e => e.textContent.includes("\u00b7"));
  seen.push("spaces " + (!dotted && fixed(-0.0003, 2) === "0.00" && fixed(-0.02, 2) === "-0.02"));
  seen.push("painted " + $("painted").textContent.includes("queries") + " " + location.hash.includes("&s="));
  seen.push("partners " + (document.querySelectorAll("#partners button").length === splats().means[own].with.length));
  $("side").value = "k";
  $("side").dispatchEvent(new Event("change"));
  seen.push("keys " + $("painted").textContent.includes("share of keys"));
  const adds = $("adds").getBoundingClientRect(), other = own ? 0 : 1;
  const middle = adds.top + 20 + (other + 0.5) * add_high;
  $("adds").dispatchEvent(new MouseEvent("click", {clientX: adds.left + 9, clientY: middle}));
  seen.push("row " + (state.s === other));
  const square = Array.from(document.querySelectorAll("#plane rect")).find(e => e.textContent.startsWith("splat "));
  const slot = +square.textContent.match(/\d+/)[0];
  square.dispatchEvent(new MouseEvent("click"));
  seen.push("square " + (splats().splats[state.s][0] === slot));
  const circles = document.querySelectorAll("#plane ellipse").length;
  seen.push("few circles " + (circles >= Math.min(6, splats().splats.length) && circles <= 7));
  seen.push("fits " + (document.documentElement.scrollWidth <= window.innerWidth));
  $("leave").click();
  seen.push("left " + ($("chosen").style.display === "none" && $("painted").textContent === ""));
  $("seen").textContent = seen.join("|");
});
</script></body></html>
PAGE
    for width in 1400 400; do # nothing but what scrolls by itself is wider than the window (which may be 500 at least)
        look --virtual-time-budget=4000 --window-size=$width,900 --dump-dom "file://$dir/act.html" >"$dir/dom"
        want='<pre id="seen">hover 2|held 4|free 1|head 1:0 standard|no splats true|next 1:1 9|sum true|'
        want="${want}chosen true|snippets true|spaces true|painted true true|partners true|keys true|row true|"
        want="${want}square true|few circles true|fits true|left true</pre>"
        check "pointer and clicks do what they should, $width pixels: $(grep -o '<pre id="seen">[^<]*' "$dir/dom")" \
            grep -qF "$want" "$dir/dom"
    done
    check "train twelve layers" $train ${tiny#--layers 2} --layers 12 --gsa-heads 1 --out "$dir/deep"
    check "report of twelve layers" $infer report "$dir/deep/model_00000003.bin" "$text" -o "$dir/deep.html"
    look --dump-dom "file://$dir/deep.html#l=11&h=1&t=2&s=0" >"$dir/dom"
    check "the last of twelve layers, and its splat" sh -c "grep -q 'layer 11<' '$dir/dom' &&
        grep -q '<h2 id=\"chosen-name\">Splat 0: ' '$dir/dom' && grep -q '<p id=\"partners\">Its queries' '$dir/dom'"
    look --screenshot="$dir/page.png" --window-size=1300,1600 "file://$dir/r.html" >/dev/null
    check "a picture of the page" sh -c "[ \$(wc -c <'$dir/page.png') -gt 50000 ]"
fi

echo "report: $passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
