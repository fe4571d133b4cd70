#!/bin/sh
# The stranger's test: a fresh clone and the lines of the front page, to the first verdict. Prints the seconds of each step.
#   tools/stranger.sh [REPOSITORY] [LIMIT]      by default this one, 300 seconds; PIP_FLAGS goes to pip
# It runs what README.md says, in this order: git clone, cd, make demo (which installs). Exit status 1 where that takes longer.
set -eu
from=$(cd "${1:-$(dirname "$0")/..}" && pwd); limit=${2:-300}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
for line in 'git clone' 'make demo'; do
  grep -q "^$line" "$from/README.md" || { echo "README.md does not say: $line"; exit 1; }
done
start=$(date +%s); step() { now=$(date +%s); printf '%4d s  %s\n' $((now - start)) "$1"; }
git clone --quiet "$from" "$work/diffkd_nb"; cd "$work/diffkd_nb"; step 'cloned'
make install PIP_FLAGS="${PIP_FLAGS:-}" >"$work/install.log" 2>&1 || { tail -5 "$work/install.log"; exit 1; }; step 'installed'
make demo >"$work/demo.log" 2>&1 || { tail -5 "$work/demo.log"; exit 1; }; step 'first verdict:'
grep -E '(better|worse|not distinguishable)\.$' "$work/demo.log"
[ $((now - start)) -le "$limit" ] || { echo "more than $limit seconds"; exit 1; }
