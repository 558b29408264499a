#!/bin/sh
# The Makefile as a user meets it; nothing is built. Ends with "make: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
passed=0 failed=0
unset MAKEFLAGS MAKEOVERRIDES MFLAGS CFLAGS CPPFLAGS config # those of the make that runs the tests
dry="make -n NO_CUDA=1"
check() { # NAME COMMAND...
    name=$1
    shift
    if "$@" >"$dir/out" 2>&1; then passed=$((passed + 1)); else
        failed=$((failed + 1))
        echo "FAIL $name (status $?): $(tail -n 2 "$dir/out")"
    fi
}
contains() { # TEXT COMMAND...: the command prints it
    text=$1
    shift
    "$@" 2>&1 | tee "$dir/said" | grep -q -e "$text" || { tail -n 2 "$dir/said" && false; }
}

# a user's flags are added to the project's, not put in their place (a program 14 times slower), and win over them
check "CFLAGS keep the optimiser and come last" contains '-O3 .*-O1' $dry -B CFLAGS=-O1 train_gsa
check "other CFLAGS, other objects" contains 'gsa/util.c' $dry CFLAGS=-DTEST_MAKE_NOT_SEEN train_gsa
check "CPPFLAGS leave the page's folder" contains '-DMINE .*-Ibuild.*report.c' $dry -B CPPFLAGS=-DMINE infer
check "an unknown config" contains 'config=fast is not known' $dry config=fast

# a machine without the libraries: a sentence that says what helps, not the compiler's
printf '#!/bin/sh\ncase "$*" in *-x*) grep -q utf8proc && exit 1; exit 0 ;; esac\nexit 1\n' >"$dir/bare-cc"
chmod +x "$dir/bare-cc"
check "a library is missing" contains "missing: libutf8proc-dev; 'make deps'" make NO_CUDA=1 CC="$dir/bare-cc" train_gsa
check "no compiler" contains "missing: no-such-cc; 'make deps'" make NO_CUDA=1 CC=no-such-cc train_gsa

# every line of code that is too long is named
check "the list of sources" contains './gsa/cuda/splat.cuh' make -n format-check

echo "make: $passed passed, $failed failed, 0 skipped"
[ "$failed" -eq 0 ]
