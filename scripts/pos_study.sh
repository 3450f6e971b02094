#!/usr/bin/env bash
# How poses enter, at equal parameters and steps, three seeds each (docs/results/driving.md): trains into outputs/pos, two at a
# time and one thread each, then evaluates. pos_study.sh PYTHON [seeds…] goes on where it was interrupted.
set -euo pipefail
python=$1
shift
seeds=${*:-0 1 2}
folder=outputs/pos
mkdir -p "$folder"
export OMP_NUM_THREADS=1 python folder

train() {
	run="$folder/$1-seed$2"
	[ -f "$run/last.ckpt" ] && return
	"$python" train.py task=trajectory experiment=pos_study pos="$1" seed="$2" hydra.run.dir="$run" >"$run.log" 2>&1 ||
		{ tail -n 5 "$run.log"; return 1; }
	echo "$1, seed $2: trained after $SECONDS s"
}
export -f train

for seed in $seeds; do
	for pos in rpe drope_intra drope_head drope_harmonic rope absolute none; do echo "$pos $seed"; done
done | xargs -P 2 -L 1 bash -c 'train "$@"' train

"$python" evaluate.py task=trajectory ckpt="$folder" sweep=pos results="$folder/results.csv" \
	"hydra.sweeper.params.seed='${seeds// /,}'" hydra.sweep.dir="$folder/evaluate"
