#!/usr/bin/env bash
# Trains tiny detectors and segmenters that differ in nothing but their positions, two at a time on one thread each, and draws AP
# and mIoU against the test size: dense_study.sh PYTHON SEED …; what is trained already is left as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} folder=outputs/dense-study
seeds=("${@:2}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
export OMP_NUM_THREADS=1

one() { # task, position, seed
	local run="$folder/$1-$2-seed$3" quick=(threads=1)
	[ "$1" = coco ] || quick=(trainer=cpu) # bfloat16 is faster for the segmenter alone
	[ -e "$run/done" ] && return 0
	"$python" train.py task="$1" position="$2" seed="$3" "${quick[@]}" hydra.run.dir="$run" >"$run.log" 2>&1 &&
		"$python" evaluate.py task="$1" ckpt="$run/last.ckpt" label="$2" results="$folder/$1.csv" sweep=resolution "${quick[@]}" \
			evaluation.callbacks.pictures=null evaluation.callbacks.classes=null hydra.sweep.dir="$run/evaluate" >"$run.evaluate.log" 2>&1 ||
		{ tail -n 20 "$run".*log >&2; return 255; }
	touch "$run/done"
	echo "$1, $2, seed $3: trained and evaluated after $SECONDS s"
}
export -f one

mkdir -p "$folder"
for seed in "${seeds[@]}"; do
	for position in mixed axial ape; do printf '%s\n' "coco $position $seed" "ade20k $position $seed"; done
done | xargs -P 2 -L 1 bash -c 'one "$@"' one
mkdir -p "$folder/coco" "$folder/ade20k"
for task in coco ade20k; do
	cp "$folder/$task.csv" "$folder/$task/results.csv"
	"$python" -m results "$folder/$task/results.csv"
done
