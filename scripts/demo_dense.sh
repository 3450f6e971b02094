#!/usr/bin/env bash
# Trains a tiny detector and a tiny segmenter, a core each, on scenes of real cut-outs at 128 pixels, evaluates both at other
# sizes, and draws what they see. make demo-dense calls it with the environment's python.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} folder=outputs/demo-dense
export OMP_NUM_THREADS=1

one() { # task
	local run="$folder/$1"
	"$python" train.py task="$1" trainer=cpu hydra.run.dir="$run" >"$run.log" 2>&1 &&
		"$python" evaluate.py task="$1" ckpt="$run/last.ckpt" trainer=cpu results="$folder/results.csv" hydra.run.dir="$run/evaluate" \
			>"$run.evaluate.log" 2>&1 &&
		"$python" evaluate.py task="$1" ckpt="$run/last.ckpt" trainer=cpu results="$folder/$1.csv" sweep=resolution \
			hydra.sweep.dir="$run/sweep" hydra.sweeper.params.resolution="'96,128,160,192'" \
			>"$run.sweep.log" 2>&1 ||
		{ tail -n 20 "$run".*log >&2; return 255; }
	echo "$1: trained and evaluated after $SECONDS s; pictures and scores of classes: $run/evaluate"
}
export -f one

rm -rf "$folder"
mkdir -p "$folder"
printf '%s\n' coco ade20k | xargs -P 2 -L 1 bash -c 'one "$@"' one
"$python" -m results "$folder/coco.csv"
"$python" -m results "$folder/ade20k.csv"
