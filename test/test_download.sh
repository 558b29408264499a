# data/tinystories.sh and data/openwebtext.sh: local files, and downloads from a "server" that is a folder (file://).
cd "$(dirname "$0")/.." || exit 1
passed=0 failed=0 skipped=0
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export HF_ENDPOINT="file://$folder/server" TRIES=1 VAL_SHARE=0.2

# check WHAT COMMAND...
check() {
    what=$1
    shift
    if "$@" >"$folder/said" 2>&1; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAIL $what"
        cat "$folder/said"
    fi
}
refused() { # refused STATUS WORDS COMMAND...
    expected=$1 words=$2
    shift 2
    status=0
    "$@" >"$folder/refusal" 2>&1 || status=$?
    cat "$folder/refusal"
    [ $status = "$expected" ] && grep -q -- "$words" "$folder/refusal"
}
same_shards() { # same_shards A B: every A*.bin is the same as B*.bin
    for f in "$1"*.bin; do cmp "$f" "$2${f#"$1"}" || return 1; done
}

make=./${OUT:-}data/make_stories
$make --bytes 300k --seed 1 --out "$folder/train.txt" 2>/dev/null
$make --bytes 30k --seed 2 --out "$folder/val.txt" 2>/dev/null

check "local files" data/tinystories.sh --vocab 400 --out "$folder/local" "$folder/train.txt" "$folder/val.txt"
check "shards and tokenizer are there" test -s "$folder/local/tinystories_train_000000.bin" \
    -a -s "$folder/local/tinystories_val_000000.bin" -a -s "$folder/local/tokenizer_400.bin"
spaced="$folder/a folder's" # names that a shell would take apart
check "a name in quotes" data/tinystories.sh --vocab 400 --out "$spaced" "$folder/train.txt" "$folder/val.txt"
sed -n 's/^train with: //p' "$folder/said" >"$folder/pasted"
check "what is printed can be pasted" sh -c "eval \"\$(cat '$folder/pasted') --depth 1 --seq 32 --steps 1 --batch 2 \
    --eval-every 0 --sample-every 0 --out '$folder/pasted_run'\" && ls '$folder/pasted_run'/model_*.bin"
check "a given tokenizer" data/openwebtext.sh --tokenizer "$folder/local/tokenizer_400.bin" --out "$folder/given" \
    "$folder/train.txt" "$folder/val.txt"
check "gives the same shards" same_shards "$folder/local/tinystories_" "$folder/given/openwebtext_"
check "help" data/tinystories.sh --help
check "a missing file" \
    refused 1 nothing.txt data/tinystories.sh --out "$folder/x" "$folder/nothing.txt" "$folder/val.txt"
check "one file only" refused 2 "validation text" data/tinystories.sh --out "$folder/x" "$folder/train.txt"
check "an unknown flag" refused 2 "--no-such" data/openwebtext.sh --no-such
check "a flag without value" refused 2 "--vocab" data/openwebtext.sh --vocab
check "a bad number" refused 2 "22" data/openwebtext.sh --subsets 22

if command -v curl >/dev/null; then
    server=$folder/server/datasets/roneneldan/TinyStories/resolve/main
    mkdir -p "$server" "$folder/net"
    check "nothing to download" refused 1 "could not download" data/tinystories.sh --vocab 400 --out "$folder/net"
    check "leaves no shards" test ! -e "$folder/net/tinystories_train_000000.bin"
    cp "$folder/train.txt" "$server/TinyStoriesV2-GPT4-train.txt"
    cp "$folder/val.txt" "$server/TinyStoriesV2-GPT4-valid.txt"
    head -c 100000 "$folder/train.txt" >"$folder/net/TinyStoriesV2-GPT4-train.txt.part" # interrupted in the middle
    (cat "$folder/val.txt" && echo more) >"$folder/net/TinyStoriesV2-GPT4-valid.txt.part" # longer than it should be
    check "downloads, and goes on with a part" data/tinystories.sh --vocab 400 --out "$folder/net"
    check "the text is whole" cmp "$folder/net/TinyStoriesV2-GPT4-train.txt" "$folder/train.txt"
    check "a part that was too long is fetched again" cmp "$folder/net/TinyStoriesV2-GPT4-valid.txt" "$folder/val.txt"
    check "and gives the same shards" same_shards "$folder/local/tinystories_" "$folder/net/tinystories_"
    rm -r "$server"
    check "a second time nothing is downloaded" data/tinystories.sh --vocab 400 --out "$folder/net"
else
    skipped=$((skipped + 1))
    echo "skip downloads: curl is not installed"
fi

if command -v curl >/dev/null && command -v xz >/dev/null && tar --version 2>/dev/null | grep -q GNU &&
    sed --version 2>/dev/null | grep -q GNU; then
    # two archives of compressed archives of pages, as OpenWebText's; the pages in order are expected.txt
    server=$folder/server/datasets/Skylion007/openwebtext/resolve/main/subsets
    mkdir -p "$server" "$folder/pages"
    page=0
    for subset in 00 01; do
        mkdir -p "$folder/openwebtext"
        for part in 1 2 3; do
            for i in 1 2 3 4; do
                page=$((page + 1))
                name=$folder/pages/$(printf %04d-page.txt $page)
                printf 'Page %d of the web.\n\nIt has more than one line%s' $page "$([ $i = 2 ] || echo .)" >"$name"
                printf '\n<|endoftext|>\n' | cat "$name" - >>"$folder/expected.txt"
            done
            tar -cJf "$folder/openwebtext/urlsf_subset$subset-${part}_data.xz" -C "$folder/pages" .
            rm "$folder/pages/"*
        done
        tar -cf "$server/urlsf_subset$subset.tar" -C "$folder" --sort=name openwebtext
        rm -r "$folder/openwebtext"
    done
    tokenizer=$folder/local/tokenizer_400.bin
    check "OpenWebText from archives" data/openwebtext.sh --tokenizer "$tokenizer" --out "$folder/web" --subsets 2
    check "the same from a file" ./${OUT:-}data/prepare --tokenizer "$tokenizer" --out "$folder/expected" --val 0.2 \
        "$folder/expected.txt"
    check "every page is there" same_shards "$folder/expected_" "$folder/web/openwebtext_"
    # within the data of the first .xz
    printf broken | dd of="$folder/web/urlsf_subset01.tar" bs=1 seek=1200 conv=notrunc 2>/dev/null
    check "a broken archive is refused" refused 1 "could not be unpacked" \
        data/openwebtext.sh --tokenizer "$tokenizer" --out "$folder/web" --subsets 2
    check "and leaves no shards" test ! -e "$folder/web/openwebtext_train_000000.bin"
else
    skipped=$((skipped + 1))
    echo "skip OpenWebText's archives: curl, xz, GNU tar and sed are needed"
fi
echo "test_download: $passed passed, $failed failed, $skipped skipped"
[ $failed -eq 0 ]
