#!/usr/bin/env bash
# Trains a tiny byte model with a memory on Shakespeare's plays, then tells text in windows longer than it was trained with
# and looks for hidden numbers, one sweep a core, and writes on from a line. make demo-language calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python} folder=outputs/demo-language
export OMP_NUM_THREADS=1

rm -rf "$folder"
mkdir -p "$folder"
"$python" train.py task=lm hydra.run.dir="$folder"
ckpt="$folder/last.ckpt"
"$python" evaluate.py task=lm ckpt="$ckpt" sweep=needle "hydra.sweeper.params.context='512,1024,2048,4096'" datamodule.eval_batches=2 results="$folder/needle.csv" \
	hydra.sweep.dir="$folder/needle" >"$folder/needle.log" 2>&1 &
needle=$!
"$python" evaluate.py task=lm ckpt="$ckpt" sweep=context datamodule.limit_tokens=131072 results="$folder/context.csv" \
	hydra.sweep.dir="$folder/context" >"$folder/context.log" 2>&1 || { tail -n 5 "$folder/context.log" >&2; exit 1; }
wait "$needle" || { tail -n 5 "$folder/needle.log" >&2; exit 1; }
"$python" -m results "$folder/context.csv" "$folder/needle.csv"
"$python" -m tools.generate "$ckpt" --text "KING. " --tokens 400 --top-p 0.9 --seed 0
