#!/usr/bin/env bash
# Trains APE, axial and mixed tiny ViTs on the embedded letters at 32 pixels, two at a time on one thread each, and draws
# their accuracy at eight resolutions. make demo calls it with the environment's python; more seeds: demo.sh PYTHON 0 1 2
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} folder=outputs/demo
seeds=("${@:2}")
[ ${#seeds[@]} -gt 0 ] || seeds=(0)
export OMP_NUM_THREADS=1

one() { # position, seed
	local run="$folder/$1-seed$2"
	"$python" train.py task=imagenet trainer=cpu position="$1" seed="$2" hydra.run.dir="$run" >"$run.log" 2>&1 &&
		"$python" evaluate.py task=imagenet ckpt="$run/last.ckpt" label="$1" results="$folder/results.csv" sweep=resolution_demo \
			trainer=cpu fused_attention=true hydra.sweep.dir="$run/evaluate" >"$run.evaluate.log" 2>&1 ||
		{ tail -n 20 "$run".*log >&2; return 255; }
	echo "$1, seed $2: trained and evaluated after $SECONDS s"
}
export -f one

rm -rf "$folder"
mkdir -p "$folder"
echo "fetching fonts and photographs (25 MB, once), drawing the letters, then training; logs: $folder/*.log"
for seed in "${seeds[@]}"; do printf '%s\n' "mixed $seed" "axial $seed" "ape $seed"; done |
	xargs -P 2 -L 1 bash -c 'one "$@"' one
"$python" -m results "$folder/results.csv"
