#!/usr/bin/env bash
# Everything that waits for a GPU, in the order of age; each result is stored as soon as it exists.
#
#   bench/gpu.sh [--rehearse] [--minutes N] [--python PYTHON] [--results DIR] [--archive FILE]
#
# --rehearse runs the same commands on the CPU with tiny sizes and writes to a scratch folder.
# --results  where results stand (results and teachers by default). For another folder, what those two hold is copied there first.
# --archive  pack what is finished, without checkpoints, into one .tar.gz, to be unpacked over the repository elsewhere.
# A step whose result is there already is not run again, so a second call goes on where the first was cut off.
# The environment may name DATA, such as cifar100:FOLDER, IMAGENETTE, such as 'folder:FOLDER?size=128', and RELEASED, a checkout of hunto/image_classification_sota.
set -u
cd "$(dirname "$0")/.."
minutes=10 python=python3 device=cuda results=results teachers=teachers rehearse= archive=
while [ $# -gt 0 ]; do case "$1" in
  --rehearse) rehearse=1 device=cpu; results=$(mktemp -d); teachers=$results/teachers;;
  --minutes) minutes=$2; shift;;
  --python) python=$2; shift;;
  --results) results=$2 teachers=$2/teachers; shift; mkdir -p "$teachers"; cp -Rn results/gpu results/table9 results/imagenette "$results" 2>/dev/null; cp -Rn teachers/. "$teachers" 2>/dev/null;;
  --archive) archive=$2; shift;;
  *) echo "usage: bench/gpu.sh [--rehearse] [--minutes N] [--python PYTHON] [--results DIR] [--archive FILE]" >&2; exit 2;;
esac; shift; done
case "$python" in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python");; esac      # one step changes the folder
end=$((SECONDS + 60*minutes)); failed=0; out=$results/gpu
mkdir -p "$out"; out=$(cd "$out" && pwd)
[ -n "$rehearse" ] || "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "PyTorch finds no GPU: --rehearse runs the same on the CPU." >&2; exit 2; }

step() { # result file, command ...: runs once, keeps the log beside the result
  local result=$1; shift
  [ -s "$out/$result" ] && { echo "kept     $result"; return; }
  local left=$((end - SECONDS)); [ $left -lt 20 ] && { echo "no time  $result"; failed=1; return; }
  if timeout "$left" "$@" > "$out/$result.log" 2>&1 && [ -s "$out/$result" ]; then rm -f "$out/$result.log"; echo "done     $result"
  else
    [ ! -e "$out/$result" ] || mv "$out/$result" "$out/$result.failed"      # a report of failures is no result: the next call tries again
    echo "FAILED   $result: $(tail -n 1 "$out/$result.log")"; failed=1; return 1
  fi
}

# 1. the tests that need a GPU: fp16 and bf16 through a Learner, a recorded step against plain ones
marks=cuda; [ -n "$rehearse" ] && marks='not cuda and not slow'
step tests.xml "$python" -m pytest tests/test_invariants.py -q -m "$marks" ${rehearse:+-k task_loss} --junitxml "$out/tests.xml"
graph=; step graph.xml "$python" -m pytest tests/test_fast.py -q -m "$marks" ${rehearse:+-k host} --junitxml "$out/graph.xml" || graph=--plain
# 2. the notebook cells that need a GPU
rm -f "$out/cells.part"
flags=cuda; [ -n "$rehearse" ] && flags=
step cells.txt bash -c "cd nbs && for n in 09_callback 21_fast; do $python -c \"import nbdev.test as t; t.nbdev_test('\$n.ipynb', flags='$flags', n_workers=1, do_print=True)\" && echo \"\$n.ipynb, flags: $flags\" >> '$out/cells.part' || exit 1; done && mv '$out/cells.part' '$out/cells.txt'"
# 3. time of a tap and of a step against the authors' program
taps=(--batches 16 128 --maps 4 7 --rounds 20 --compile) steps=(); [ -n "$rehearse" ] && taps=(--batches 4 --maps 4 --rounds 1) steps=(--pairs wrn_40_2-wrn_40_1 --steps 2 --rounds 1 --batch 8)
if [ -n "${RELEASED:-}" ]; then step distiller.json "$python" bench/distiller.py --released "$RELEASED/lib/models/losses" "${taps[@]}" --device $device --out "$out/distiller.json"
else echo "skipped  distiller.json: set RELEASED to a checkout of hunto/image_classification_sota"; fi
step step.json "$python" bench/step.py ${RELEASED:+--released "$RELEASED"} "${steps[@]}" --device $device --out "$out/step.json"
images=(); [ -n "$rehearse" ] && images=(--pairs resnet34-resnet18 --steps 1 --rounds 1 --batch 2 --size 64)
step imagenet.json "$python" bench/imagenet.py ${RELEASED:+--released "$RELEASED"} "${images[@]}" ${graph:+--plain} --device $device --out "$out/imagenet.json"
# 4. table 9: teachers, rates, grid, controls, as far as the time goes
size=(); [ -n "$rehearse" ] && size=(--epochs 2 --limit 4 --seeds 2 --holdout 2 --pairs resnet56-resnet20 resnet32x4-shufflenetv1 --stages teachers rates grid)
left=$((end - SECONDS - 15))
if [ -z "${DATA:-}" ]; then echo "skipped  table9: set DATA to cifar100:FOLDER"
elif [ $left -lt 60 ]; then echo "no time  table9"; failed=1
else
  "$python" bench/table9.py --data "$DATA" --out "$results/table9" --teachers "$teachers" --device $device --minutes $((left/60)) $graph "${size[@]}" > "$out/table9.log" 2>&1 || failed=1
  echo "table9   $(tail -n 1 "$out/table9.log")"
fi
# 5. table 2 in small
left=$((end - SECONDS - 15)); few=(--epochs 100 --workers 12 --jobs 2); [ -n "$rehearse" ] && few=(--epochs 1 --batch 4 --seeds 1 --workers 0 --methods alone diffkd)
if [ -z "${IMAGENETTE:-}" ]; then echo "skipped  imagenette: set IMAGENETTE to 'folder:FOLDER?size=128'"
elif [ $left -lt 60 ]; then echo "no time  imagenette"; failed=1
else
  timeout "$left" "$python" bench/imagenette.py --data "$IMAGENETTE" --out "$results/imagenette" --device $device --minutes $((left/60)) "${few[@]}" > "$out/imagenette.log" 2>&1 || failed=1
  echo "imagenette $(tail -n 1 "$out/imagenette.log")"
fi
[ -z "$archive" ] || tar -czf "$archive" -C "$results" --exclude checkpoint.pt --exclude .lock --exclude '*.err' .
[ -z "$rehearse" ] || echo "rehearsed in $results"
exit $failed
