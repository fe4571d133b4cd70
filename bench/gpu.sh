#!/usr/bin/env bash
# Everything that waits for a GPU, in the order of age; each result is stored as soon as it exists.
#
#   bench/gpu.sh [--rehearse] [--minutes N] [--python PYTHON]
#
# --rehearse runs the same commands on the CPU with tiny sizes and writes to a scratch folder.
# A step whose result is there already is not run again, so a second call goes on where the first was cut off.
set -u
cd "$(dirname "$0")/.."
minutes=10 python=python3 device=cuda out=results/gpu rehearse=
while [ $# -gt 0 ]; do case "$1" in
  --rehearse) rehearse=1 device=cpu; out=$(mktemp -d);;
  --minutes) minutes=$2; shift;;
  --python) python=$2; shift;;
  *) echo "usage: bench/gpu.sh [--rehearse] [--minutes N] [--python PYTHON]" >&2; exit 2;;
esac; shift; done
end=$((SECONDS + 60*minutes)); failed=0
mkdir -p "$out"; out=$(cd "$out" && pwd)
[ -n "$rehearse" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "PyTorch finds no GPU: --rehearse runs the same on the CPU." >&2; exit 2; }

step() { # result file, command ...: runs once, keeps the log beside the result
  local result=$1; shift
  [ -s "$out/$result" ] && { echo "kept     $result"; return; }
  local left=$((end - SECONDS)); [ $left -lt 20 ] && { echo "no time  $result"; failed=1; return; }
  if timeout "$left" "$@" > "$out/$result.log" 2>&1 && [ -s "$out/$result" ]; then rm -f "$out/$result.log"; echo "done     $result"
  else echo "FAILED   $result: $(tail -n 1 "$out/$result.log")"; failed=1; fi
}

# 1. the tests that need a GPU (fp16 and bf16 through a Learner); the record says what ran
marks=cuda; [ -n "$rehearse" ] && marks='not cuda and not slow'
step tests.xml "$python" -m pytest tests/test_invariants.py -q -m "$marks" ${rehearse:+-k task_loss} --junitxml "$out/tests.xml"
# 2. the notebook cells that need a GPU
flags=cuda; [ -n "$rehearse" ] && flags=
step cells.txt bash -c "cd nbs && $python -c \"import nbdev.test as t; t.nbdev_test('06_callback.ipynb', flags='$flags', n_workers=1, do_print=True)\" && echo '06_callback.ipynb, flags: $flags' > '$out/cells.txt'"
# 3. time of a tap against the authors' module (RELEASED names a checkout of it) or alone
sizes=(--batches 16 128 --maps 4 7 --rounds 20 --compile); [ -n "$rehearse" ] && sizes=(--batches 4 --maps 4 --rounds 1)
if [ -n "${RELEASED:-}" ]; then step distiller.json "$python" bench/distiller.py --released "$RELEASED" "${sizes[@]}" --device $device --out "$out/distiller.json"
else echo "skipped  distiller.json: set RELEASED to the folder of the authors' modules"; fi
exit $failed
