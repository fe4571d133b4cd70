#!/usr/bin/env bash
# What waits for a GPU, for one that is lent for half an hour: three calls of nine minutes, the most important first.
#
#   bench/gpu.sh [--rehearse [--slower 6]] [--device cuda] [--minutes 9] [--steps tests times study imagenette cells variants] [--python PYTHON]
#                [--wheels DIR] [--results DIR] [--archive FILE]
#
# --rehearse runs the same commands with tiny sizes and writes to a scratch folder, on the CPU or on the --device that is named. It has
#            six times the seconds, since a machine without a GPU may be slow; `--slower 1` keeps the plan's.
# --steps    which, in this order (seconds of a call at most, of all calls in brackets):
#            tests 180, times 240, study 480 (1800) a question, imagenette 240 (300), cells 60, variants 120; also table9, not for half an hour
# --wheels   install these for this call, without dependencies: what bench/wheels.txt names, where a machine has PyTorch and no fastai
# --results  where results stand (results and teachers by default). For another folder, what those hold is copied there first.
# --archive  pack what is there, without checkpoints, into one .tar.gz, after every step and once a minute: to be unpacked over
#            the repository. A machine that is taken back leaves the last archive.
# A step whose result is there is not run again, so a second call goes on where the first was cut off; queues go on run by run.
# What a step had written when it was stopped stays under its own name. `state.txt` says of each step how it ended.
# The environment may name
#   RELEASED    a checkout of hunto/image_classification_sota: its times beside ours
#   DATA        cifar100:FOLDER, for the study and table 9
#   QUESTIONS   of the study, in this order: '1 2 methods' by default
#   TEACHER     NAME@FILE, a trained teacher of the study's STUDENT (resnet8_s): none is trained in half an hour
#   IMAGENETTE  'folder:FOLDER?size=128', and IMAGENETTE_TEACHER, NAME@FILE, a teacher of torchvision's ResNet-18 on it
# CIFAR-100 may be too large to be sent at once: tests and times need no data, so a first call goes without it.
set -u
cd "$(dirname "$0")/.."
minutes=9 python=python3 device= results=results teachers=teachers rehearse= archive= wheels= slower= steps='tests times study imagenette cells variants'
usage() { echo "usage: bench/gpu.sh [--rehearse] [--slower N] [--device DEVICE] [--minutes N] [--steps STEP ...] [--python PYTHON] [--wheels DIR] [--results DIR] [--archive FILE]" >&2; exit 2; }
while [ $# -gt 0 ]; do case "$1" in
  --rehearse) rehearse=1;;
  --steps) steps=; while [ $# -gt 1 ] && [ "${2#--}" = "$2" ]; do steps="$steps $2"; shift; done;;
  --device|--slower|--minutes|--python|--wheels|--results|--archive) [ $# -gt 1 ] || usage; printf -v "${1#--}" %s "$2"; shift;;
  *) usage;;
esac; shift; done
for s in $steps; do case " tests times study imagenette cells variants table9 " in *" $s "*) ;; *) echo "there is no step named $s" >&2; usage;; esac; done
[ -n "$device" ] || { [ -n "$rehearse" ] && device=cpu || device=cuda; }
if [ -n "$rehearse" ]; then [ "$results" != results ] || results=$(mktemp -d); teachers=$results/teachers
elif [ "$results" != results ]; then
  teachers=$results/teachers; mkdir -p "$teachers"
  cp -Rn results/gpu results/table9 results/study results/imagenette "$results" 2>/dev/null; cp -Rn teachers/. "$teachers" 2>/dev/null
fi
case "$python" in */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python");; esac
case "$archive" in ''|/*) ;; *) archive=$PWD/$archive;; esac
mkdir -p "$results/gpu" && results=$(cd "$results" && pwd) && out=$results/gpu || exit 2
[ -n "$slower" ] || { [ -n "$rehearse" ] && slower=6 || slower=1; }
end=$((SECONDS + $(awk "BEGIN { printf \"%d\", 60*$minutes*$slower }"))) failed=0 child=
last() { tr '\r' '\n' < "$1" | grep -v '^ *$' | tail -n 1 | cut -c1-160; }

pack() { # whole or not at all: the name changes when the file is complete
  [ -n "$archive" ] || return 0
  tar -czf "$archive.part" -C "$results" --exclude checkpoint.pt --exclude .lock --exclude '*.err' . 2>/dev/null
  mv "$archive.part" "$archive"; packed=$SECONDS
}
note() { # step, how it ended
  touch "$out/state.txt"; { grep -v "^$1 " "$out/state.txt"; echo "$1 $2"; } > "$out/state.part"; mv "$out/state.part" "$out/state.txt"
  printf '%-24s %s\n' "$1" "$2"; pack
}
stop() { trap - TERM INT; [ -z "$child" ] || kill -- -"$child" 2>/dev/null; note "${current:-gpu.sh}" 'stopped from outside'; exit 143; }
trap stop TERM INT

limited() { # seconds, name, command ...: its output goes to NAME.log; what it has used is added up in NAME.spent
  local limit=$1 name=$2 begin=$SECONDS rc; shift 2; current=$name
  [ $limit -le $((end - SECONDS)) ] || limit=$((end - SECONDS))
  set -m; timeout -k 5 "$limit" "$@" > "$out/$name.log" 2>&1 & child=$!; set +m
  while kill -0 $child 2>/dev/null; do sleep .5; [ $((SECONDS - packed)) -lt 60 ] || pack; done
  wait $child; rc=$?; child=
  echo $(($(cat "$out/$name.spent" 2>/dev/null || echo 0) + SECONDS - begin)) > "$out/$name.spent"
  return $rc
}
step() { # seconds, result file, command ...: runs until there is a result
  local limit=$(($1*slower)) result=$2 rc; shift 2
  [ -s "$out/$result" ] && ! grep -q "^$result stopped" "$out/state.txt" 2>/dev/null && { echo "kept     $result"; return 0; }
  [ $((end - SECONDS)) -ge 20 ] || { echo "no time  $result"; failed=1; return 1; }
  limited "$limit" "$result" "$@"; rc=$?
  case $rc in
    0) note "$result" "done in $(cat "$out/$result.spent") s";;
    124|137) note "$result" "stopped after $limit s; what it had is there, the next call begins it again"; failed=1;;
    *) note "$result" "failed: $(last "$out/$result.log")"; failed=1;;
  esac
  return $rc
}
queue() { # seconds of a call, of all calls, name, command ...: goes on from where it stopped; told how many minutes it has by MINUTES
  local limit=$(($1*slower)) all=$(($2*slower)) name=$3 left; shift 3
  left=$((all - $(cat "$out/$name.spent" 2>/dev/null || echo 0)))
  [ $left -ge 20 ] || { echo "used up  $name: its $all s"; return 0; }
  [ $left -ge $limit ] || limit=$left
  [ $limit -le $((end - SECONDS - 10)) ] || limit=$((end - SECONDS - 10))
  [ $limit -ge 20 ] || { echo "no time  $name"; failed=1; return 1; }
  limited $((limit + 10)) "$name" "${@//MINUTES/$(awk "BEGIN { print ($limit - 5)/60 }")}" || failed=1
  note "$name" "$(last "$out/$name.log") ($(cat "$out/$name.spent") s)"
}
packed=$SECONDS

if [ -n "$wheels" ]; then
  site=$(mktemp -d); "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" "$wheels"/*.whl || exit 2
  export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
case $device in cuda*) "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "PyTorch finds no GPU: --rehearse without --device cuda runs the same on the CPU." >&2; exit 2; };; esac
on_gpu= marks='not cuda and not slow' flags=
case $device in cuda*) on_gpu=1 marks=cuda flags=cuda;; esac

do_tests() { # mixed precision through a Learner, recorded steps against plain ones
  local few=(); [ -n "$rehearse" ] && [ -z "$on_gpu" ] && few=(-k 'task_loss or host')
  step 180 tests.xml "$python" -m pytest tests/test_fast.py tests/test_invariants.py -v -p no:cacheprovider -m "$marks" ${few[@]+"${few[@]}"} --junitxml "$out/tests.xml"
}
do_times() { # a tap and a step against the authors' program, pair by pair; then ImageNet's size
  local tap=(--batches 16 128 --maps 4 7 --rounds 20) pair=(--steps 100) images=(--pairs resnet34-resnet18 --steps 20 --rounds 2) p
  local pairs='wrn_40_2-wrn_40_1 resnet56-resnet20 resnet32x4-resnet8x4'
  [ -z "$rehearse" ] || { tap=(--batches 4 --maps 4 --rounds 1) pair=(--steps 8 --rounds 1 --batch 8) images=(--pairs resnet34-resnet18 --steps 8 --rounds 1 --batch 2 --size 64); pairs=wrn_40_2-wrn_40_1; }
  for p in $pairs; do
    step 60 "step_$p.json" "$python" bench/step.py --pairs "$p" ${RELEASED:+--released "$RELEASED"} "${pair[@]}" --device "$device" --out "$out/step_$p.json"
    "$python" - "$out" <<'P'
import json, pathlib, sys
out = pathlib.Path(sys.argv[1]); parts = [json.loads(f.read_text()) for f in sorted(out.glob('step_*.json')) if f.stat().st_size]
if parts: (out/'step.json').write_text(json.dumps({**parts[0], 'rows': [r for p in parts for r in p['rows']]}, indent=1))
P
    pack
  done
  if [ -n "${RELEASED:-}" ]; then step 45 distiller.json "$python" bench/distiller.py --released "$RELEASED/lib/models/losses" "${tap[@]}" --device "$device" --out "$out/distiller.json"
  else echo "skipped  distiller.json: set RELEASED to a checkout of hunto/image_classification_sota"; fi
  step 120 imagenet.json "$python" bench/imagenet.py ${RELEASED:+--released "$RELEASED"} "${images[@]}" --device "$device" --out "$out/imagenet.json"
}
do_study() { # questions of the study: does the denoiser add anything, where does a gain come from, which method is best
  [ -n "${DATA:-}" ] && [ -n "${TEACHER:-}" ] || { echo "skipped  study: set DATA to cifar100:FOLDER and TEACHER to NAME@FILE"; return 0; }
  if [ -z "$rehearse" ]; then
    local q
    for q in ${QUESTIONS:-1 2 methods}; do
      queue 480 1800 "study-$q" "$python" -m diffkd_nb.study "$q" --data "${DATA#*:}" --teacher "${TEACHER#*@}" \
        --device "$device" --jobs 12 --minutes MINUTES --out "$results/study/$q"
    done
    return
  fi
  queue 480 1800 study "$python" -c '
import sys
from diffkd_nb.experiment import compare
from diffkd_nb.recipes import get_recipe
data, teacher, student, out, minutes, device = sys.argv[1:]
gpu = dict(precision="bf16", graph=True, eval_batch=2000, executor="streams") if device.startswith("cuda") else {}
c = compare([(teacher, student)], ["alone", "kd", "diffkd"], 2, get_recipe("small").scaled(1).replace(batch_size=16, lr=.1), data, out, minutes=float(minutes),
            progress=False, device=device, keep_student=False, **gpu)
print(len(c.manifests), "of", len(c.grid["cells"]), "runs are finished")
sys.exit(bool(c.failed))' "$DATA" "$TEACHER" "${STUDENT:-resnet8_s}" "$results/study" MINUTES "$device"
}
do_imagenette() { # table 2 in small
  [ -n "${IMAGENETTE:-}" ] && [ -n "${IMAGENETTE_TEACHER:-}" ] || { echo "skipped  imagenette: set IMAGENETTE to 'folder:FOLDER?size=128' and IMAGENETTE_TEACHER to NAME@FILE"; return 0; }
  local size=(--epochs 30 --seeds 2 --workers 12 --jobs 1); [ -z "$rehearse" ] || size=(--epochs 1 --batch 4 --seeds 1 --workers 2 --methods alone diffkd)
  queue 240 300 imagenette "$python" bench/imagenette.py --data "$IMAGENETTE" --teacher "$IMAGENETTE_TEACHER" torchvision:resnet18 --out "$results/imagenette" --device "$device" --minutes MINUTES "${size[@]}"
}
do_cells() { # the notebook cells that need a GPU
  step 60 cells.txt "$python" bench/cells.py nbs/09_callback.ipynb nbs/21_fast.ipynb --flags $flags --out "$out/cells.txt"
}
do_variants() { # the same steps in TF32, and with a compiled distiller
  local few=(--pairs resnet34-resnet18 --methods kd diffkd --steps 20 --rounds 2); [ -z "$rehearse" ] || few=(--pairs resnet34-resnet18 --methods kd diffkd --steps 8 --rounds 1 --batch 2 --size 64)
  step 60 imagenet_tf32.json "$python" bench/imagenet.py "${few[@]}" --precision tf32 --device "$device" --out "$out/imagenet_tf32.json"
  step 60 imagenet_compiled.json "$python" bench/imagenet.py "${few[@]}" --compile --device "$device" --out "$out/imagenet_compiled.json"
}
do_table9() { # teachers, rates, grid, controls, as far as the time goes
  [ -n "${DATA:-}" ] || { echo "skipped  table9: set DATA to cifar100:FOLDER"; return 0; }
  local size=(); [ -z "$rehearse" ] || size=(--epochs 2 --limit 4 --seeds 2 --holdout 2 --pairs resnet56-resnet20 resnet32x4-shufflenetv1 --stages teachers rates grid)
  queue 864000 864000 table9 "$python" bench/table9.py --data "$DATA" --out "$results/table9" --teachers "$teachers" --device "$device" --minutes MINUTES ${size[@]+"${size[@]}"}
}
for s in $steps; do "do_$s"; done
pack
[ -z "$rehearse" ] || echo "rehearsed in $results"
exit $failed
