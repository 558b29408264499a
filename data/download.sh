# For data/tinystories.sh and data/openwebtext.sh: arguments, downloads, the tokenizer. Sourced, not run.

script=$(basename "$0")
root=$(cd "$(dirname "$0")/.." && pwd)
programs=$root/${OUT:-}

fail() {
    echo "$script: $*" >&2
    exit 1
}

usage() {
    echo "$script: $*; --help says more" >&2
    exit 2
}

need() {
    for program; do
        command -v "$program" >/dev/null || fail "$program is not installed; install it with this system's packages"
    done
}

# parse_arguments DEFAULT_OUT DEFAULT_VOCAB ARGUMENT...: sets out, vocab, tokenizer, subsets, text1, text2, text_count
parse_arguments() {
    out=$root/$1 vocab=$2 tokenizer= subsets=21 text1= text2= text_count=0
    shift 2
    while [ $# -gt 0 ]; do
        case $1 in
        --help | -h)
            sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
            exit
            ;;
        --tokenizer | --vocab | --out | --subsets)
            [ $# -gt 1 ] || usage "$1 needs a value"
            case $1 in
            --tokenizer) tokenizer=$2 ;;
            --vocab) vocab=$2 ;;
            --out) out=$2 ;;
            --subsets) subsets=$2 ;;
            esac
            shift
            ;;
        -*) usage "unknown flag $1" ;;
        *)
            text_count=$((text_count + 1))
            [ $text_count = 1 ] && text1=$1 || text2=$1
            [ -f "$1" ] || fail "there is no file $1"
            ;;
        esac
        shift
    done
    case $vocab in '' | *[!0-9]*) usage "--vocab needs a whole number, not '$vocab'" ;; esac
    case $subsets in [1-9] | 1[0-9] | 2[01]) ;; *) usage "--subsets must be between 1 and 21, not '$subsets'" ;; esac
    [ -z "$tokenizer" ] || [ -f "$tokenizer" ] || fail "there is no tokenizer $tokenizer"
    for program in data/prepare tokenizer/train_bpe; do
        [ -x "$programs$program" ] || fail "$program is not built yet; run make in $root"
    done
    mkdir -p "$out"
}

# download URL FILE: FILE appears when all of it is there; FILE.part holds what has come so far and is gone on with. The
# size that the server tells is compared with what came.
download() {
    [ -f "$2" ] && return
    need curl
    part=$2.part try=0
    while :; do
        # the last answer counts: the first ones may be redirections
        size=$(curl -fsSIL --connect-timeout 30 "$1" | tr -d '\r' |
            awk 'tolower($1) == "content-length:" { n = $2 } END { print n }') || size=
        have=0
        [ -f "$part" ] && have=$(wc -c <"$part" | tr -d ' ')
        if [ -n "$size" ]; then
            [ "$have" -gt "$size" ] && rm "$part"
            [ "$have" = "$size" ] && break
        fi
        status=0
        curl -fL --connect-timeout 30 --speed-limit 1000 --speed-time 60 -C - -o "$part" "$1" || status=$?
        have=0
        [ -f "$part" ] && have=$(wc -c <"$part" | tr -d ' ')
        [ $status = 0 ] && [ "$have" -gt 0 ] && [ "$have" = "${size:-$have}" ] && break
        [ $status = 33 ] && rm -f "$part" # this server cannot go on in the middle
        try=$((try + 1))
        [ $try -lt "${TRIES:-8}" ] ||
            fail "could not download $1 ($have of ${size:-unknown} bytes came); start this again to go on"
        sleep $((try * 2))
    done
    [ -n "$size" ] || echo "$script: the server did not tell the size of $1, so it could not be checked" >&2
    mv "$part" "$2"
}

# make_tokenizer COMMAND...: learns one from what COMMAND writes, unless it was given or is there from before
make_tokenizer() {
    [ -z "$tokenizer" ] || return 0
    tokenizer=$out/tokenizer_$vocab.bin
    [ -f "$tokenizer" ] || "$@" | "$programs"tokenizer/train_bpe --vocab "$vocab" --out "$tokenizer" -
}

# quoted TEXT: as it can be pasted into a shell
quoted() {
    case $1 in
    '' | *[!A-Za-z0-9_./:=,+@%-]*) printf "'%s'" "$(printf '%s' "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf '%s' "$1" ;;
    esac
}

# next_step NAME
next_step() {
    echo "train with: $(quoted "${programs}train_gsa") --tokenizer $(quoted "$tokenizer")" \
        "--data $(quoted "$out/$1_train_*.bin") --val $(quoted "$out/$1_val_*.bin")"
}
