#!/bin/sh
# gate.sh MODEL PATCH PUBLISH...: judges a patch of MODEL by unforget.toml, and runs the command PUBLISH if it passes.
set -eu
[ $# -gt 2 ] || { echo "usage: gate.sh MODEL PATCH PUBLISH [ARGUMENT...]" >&2; exit 2; }
model=$1 patch=$2
shift 2

code=0
unforget verify --no-cache --model "$model" --patch "$patch" --policy unforget.toml --report report.json --junit junit.xml --html report.html || code=$?

case $code in
    0) echo "passed: publishing" ;;
    1) echo "failed: a target is still reproduced, or too much was lost; see report.html" >&2 ;;
    2) echo "usage: an option, a file or unforget.toml is wrong; nothing was judged" >&2 ;;
    3) echo "could not run: try again on a machine that can load the model" >&2 ;;
    4) echo "inconclusive: too little evidence; a person has to look at report.html" >&2 ;;
    *) echo "unforget ended with $code" >&2 ;;
esac
[ "$code" -eq 0 ] || exit "$code"
exec "$@"
