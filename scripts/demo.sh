#!/usr/bin/env bash
# Trains APE, axial and mixed tiny ViTs on the embedded letters at 32 pixels, two at a time on one thread each, and draws
# their accuracy at eight resolutions. make demo calls it with the environment's python.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python}
folder=outputs/demo
rm -rf "$folder"
mkdir -p "$folder"
started=$SECONDS

one() {
	"$python" train.py task=imagenet trainer=cpu position="$1" hydra.run.dir="$folder/$1" >"$folder/$1.log" 2>&1 ||
		{ tail -n 20 "$folder/$1.log" >&2; exit 1; }
	"$python" evaluate.py task=imagenet ckpt="$folder/$1/last.ckpt" results="$folder/results.csv" \
		sweep=resolution_demo trainer=cpu fused_attention=true hydra.sweep.dir="$folder/$1/evaluate" >"$folder/$1.evaluate.log" 2>&1 ||
		{ tail -n 20 "$folder/$1.evaluate.log" >&2; exit 1; }
	echo "$1: trained and evaluated after $((SECONDS - started)) s"
}

echo "fetching fonts and photographs (25 MB, once), drawing the letters, then training; logs: $folder/*.log"
pids=()
for position in mixed axial; do
	one "$position" &
	pids+=($!)
done
wait -n || { kill "${pids[@]}" 2>/dev/null; exit 1; }
one ape &
pids+=($!)
for pid in "${pids[@]}"; do wait "$pid" || exit 1; done
"$python" -m results "$folder/results.csv"
