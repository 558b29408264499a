#!/bin/sh
# TinyStories (Eldan and Li, 2023; CDLA-Sharing-1.0), 2.2 GB of text, as token shards: downloads it, learns a tokenizer
# from it and prepares it. Stopped and started again it goes on. With the names of local files nothing is downloaded.
#
#   data/tinystories.sh [--tokenizer T.bin | --vocab N] [--out DIR] [TRAIN.txt VAL.txt]
#
# Makes DIR/tinystories_train_*.bin, DIR/tinystories_val_*.bin and DIR/tokenizer_N.bin; DIR is data/tinystories and N is
# 4096 unless given. HF_ENDPOINT chooses a mirror of https://huggingface.co. Needs curl.
set -eu
. "$(dirname "$0")/download.sh"

url=${HF_ENDPOINT:-https://huggingface.co}/datasets/roneneldan/TinyStories/resolve/main
parse_arguments data/tinystories 4096 "$@"
case $text_count in
0)
    train=$out/TinyStoriesV2-GPT4-train.txt val=$out/TinyStoriesV2-GPT4-valid.txt
    download "$url/TinyStoriesV2-GPT4-valid.txt" "$val"
    download "$url/TinyStoriesV2-GPT4-train.txt" "$train"
    ;;
2) train=$text1 val=$text2 ;;
*) usage "name a file of training text and one of validation text, or neither" ;;
esac
make_tokenizer head -c 100000000 "$train" # as good as from all of it for some thousand entries
"$programs"data/prepare --tokenizer "$tokenizer" --out "$out/tinystories" --val "$val" "$train"
next_step tinystories
