#!/bin/sh
# dev/pytorch beside the C programs: test/pytorch.py, where PYTHON (python3) has torch, transformers and tokenizers.
# OUT is the folder of the programs (empty: the top). Ends with "name: N passed, M failed, K skipped".
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
if [ -n "$OUT" ]; then # another build's programs say nothing new about these files, and take minutes to do so
    echo "skip test_pytorch: it is run with the release programs"
elif ! "$python" -c 'import numpy, tokenizers, torch, transformers' 2>/dev/null; then
    echo "skip test_pytorch: $python has not all of numpy, torch, transformers, tokenizers (PYTHON=... names another)"
else
    exec "$python" test/pytorch.py
fi
echo "test_pytorch: 0 passed, 0 failed, 1 skipped"
