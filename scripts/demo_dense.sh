#!/usr/bin/env bash
# Trains a tiny detector and a tiny segmenter, a core each, on scenes of real cut-outs, evaluates both at the size they were
# trained for and at others, and draws what they see. make demo-dense calls it with the environment's python.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} folder=outputs/demo-dense
export OMP_NUM_THREADS=1

one() { # task, sizes to test at, overrides
	local run="$folder/$1" task="$1" sizes="$2"
	shift 2
	mkdir -p "$run"
	"$python" train.py task="$task" "$@" hydra.run.dir="$run" >"$run/train.log" 2>&1 &&
		"$python" evaluate.py task="$task" ckpt="$run/last.ckpt" "$@" results="$run/point.csv" hydra.run.dir="$run/evaluate" \
			>"$run/evaluate.log" 2>&1 &&
		"$python" evaluate.py task="$task" ckpt="$run/last.ckpt" "$@" results="$run/results.csv" sweep=resolution \
			hydra.sweeper.params.resolution="'$sizes'" evaluation.callbacks.pictures=null evaluation.callbacks.classes=null \
			hydra.sweep.dir="$run/sweep" >"$run/sweep.log" 2>&1 ||
		{ tail -n 20 "$run"/*.log >&2; return 255; }
	echo "$task: trained and evaluated after $SECONDS s; pictures and scores of classes: $run/evaluate"
}
export -f one

rm -rf "$folder"
mkdir -p "$folder"
echo "fetching drawings and photographs (50 MB, once), writing the scenes, then training; logs: $folder/*/*.log"
printf '%s\n' "coco 64,96,128,160,192 threads=1" "ade20k 96,128,160,192,256 trainer=cpu" |
	xargs -P 2 -L 1 bash -c 'one "$@"' one
for task in coco ade20k; do "$python" -m results "$folder/$task/results.csv"; done
