#!/bin/sh
# OpenWebText (Gokaslan and Cohen, 2019), 40 GB of web pages, as token shards: downloads its 21 archives (13 GB), learns
# a tokenizer if none is given, and prepares the pages, unpacking them meanwhile: their text is never stored. Stopped
# and started again it goes on with the download. With the names of local text files nothing is downloaded.
#
#   data/openwebtext.sh [--tokenizer T.bin | --vocab N] [--out DIR] [--subsets N] [TRAIN.txt VAL.txt]
#
# Makes DIR/openwebtext_train_*.bin, DIR/openwebtext_val_*.bin and DIR/tokenizer_N.bin; DIR is data/openwebtext, --vocab
# 32768 and --subsets 21 (the first N archives only) unless given. VAL_SHARE is the share of the pages for validation,
# 0.0005 (4,000 pages). GPT-2's tokenizer comes from tokenizer/train_bpe --gpt2. HF_ENDPOINT chooses a mirror of
# https://huggingface.co. Needs curl, xz, GNU tar and sed.
set -eu
. "$(dirname "$0")/download.sh"

url=${HF_ENDPOINT:-https://huggingface.co}/datasets/Skylion007/openwebtext/resolve/main/subsets
parse_arguments data/openwebtext 32768 "$@"

# urlsf_subsetNN.tar holds about a thousand .xz files, each a compressed archive of some hundred pages, all .txt files.
unpack='folder=$(mktemp -d) && trap "rm -rf \"$folder\"" EXIT && tar -xJf - -C "$folder" &&
    find "$folder" -name "*.txt" -size +0 -print0 | LC_ALL=C sort -z | LC_ALL=C xargs -0 -r sed -s "1i <|endoftext|>"'
pages() {
    for archive; do tar -xf "$archive" --wildcards '*.xz' --to-command="$unpack" || return 1; done
}
first_pages() {
    pages "$1" 2>/dev/null | head -c 200000000
}

case $text_count in
0)
    need tar xz sed
    set --
    for number in $(seq -f %02g 0 $((subsets - 1))); do
        download "$url/urlsf_subset$number.tar" "$out/urlsf_subset$number.tar"
        set -- "$@" "$out/urlsf_subset$number.tar"
    done
    make_tokenizer first_pages "$1"
    broken=$out/broken
    rm -f "$broken"
    { pages "$@" || touch "$broken"; } |
        "$programs"data/prepare --tokenizer "$tokenizer" --out "$out/openwebtext" --val "${VAL_SHARE:-0.0005}" -
    if [ -e "$broken" ]; then # its last pages are missing then
        rm -f "$broken" "$out"/openwebtext_train_*.bin "$out"/openwebtext_val_*.bin
        fail "an archive could not be unpacked (see above); remove it and start this again"
    fi
    ;;
2)
    make_tokenizer head -c 200000000 "$text1"
    "$programs"data/prepare --tokenizer "$tokenizer" --out "$out/openwebtext" --val "$text2" "$text1"
    ;;
*) usage "name a file of training text and one of validation text, or neither" ;;
esac
next_step openwebtext
