#!/usr/bin/env bash
# The runs behind docs/results/language.md, two at a time on one thread each; finished ones are kept, so it may be started again.
#   bash scripts/language_study.sh PYTHON bytes text:0 text:1 text:2 passkey recall eviction      python -m tools.language_results prints the tables
set -euo pipefail
cd "$(dirname "$0")/.."
export python=${1:-python} folder=outputs/language
export OMP_NUM_THREADS=1

one() { # results file, run, then training's overrides; "--" and evaluation's
	local results="$folder/$1.csv" run="$folder/$1/$2" train=() evaluate=()
	local into=train argument
	for argument in "${@:3}"; do
		if [ "$argument" = -- ]; then into=evaluate; elif [ $into = train ]; then train+=("$argument"); else evaluate+=("$argument"); fi
	done
	[ ! -e "$run/done" ] || return 0
	mkdir -p "$run"
	"$python" train.py task=lm trainer=cpu "label=${2%-*}" "seed=${2##*-}" "${train[@]}" hydra.run.dir="$run" >"$run/train.log" 2>&1 &&
		"$python" evaluate.py task=lm trainer=cpu "label=${2%-*}" "ckpt=$run/last.ckpt" "results=$results" \
			"hydra.run.dir=$run/evaluate" "hydra.sweep.dir=$run/evaluate" ${evaluate[@]+"${evaluate[@]}"} >"$run/evaluate.log" 2>&1 ||
		{ tail -n 5 "$run"/*.log >&2; return 255; }
	touch "$run/done"
	echo "$1 $2: trained and evaluated after $SECONDS s"
}
export -f one

text() { # held-out plays at equal parameters and tokens; $1 is the seed
	local model
	for model in memory: xl:_xl transformer:_transformer local:_local delta:_delta; do
		echo "text ${model%:*}-$1 model=lm_tiny${model#*:} steps=300 +trainer.limit_val_batches=8"
	done
}

adamw="optimizer@task.optimizer=adamw task.optimizer.lr=2e-3 task.optimizer.betas=[0.9,0.95] task.weight_decay=0.01 trainer.precision=32-true"
passkey_recipe="datamodule=chunk_passkey model=lm_ci $adamw"
passkey_lengths="-- datamodule.eval_seed=\${seed} sweep=context task.mutes=false evaluation.callbacks.frequencies=null datamodule.eval_batches=4 hydra.sweeper.params.context=\\'128,256,512,1024,2048\\'"

passkey() { # a value told in the first two of eight chunks, asked for at the end
	local seed eight="datamodule.length=128 datamodule.batch_size=64 datamodule.steps=250 $passkey_recipe"
	for seed in 0 1 2; do
		echo "passkey memory-$seed $eight $passkey_lengths"
		echo "passkey without-$seed $eight model=lm_ci_xl $passkey_lengths"
		echo "passkey k1-$seed $eight task.backward_chunks=1 $passkey_lengths"
		echo "passkey open_gate-$seed $eight model.bank.gate_bias=1 $passkey_lengths"
		echo "passkey scalar_fusion-$seed $eight model.fusion._target_=models.fusion.ScalarFusion $passkey_lengths"
		echo "passkey mean_pool-$seed $eight model.bank.pool._target_=models.fifo_bank.MeanPool $passkey_lengths"
		echo "passkey delta-$seed $eight model=lm_ci_delta $passkey_lengths"
	done
}

eviction() { # streams of random length, up to four times what the bank holds; at a constant rate, the gates' too
	local seed random="datamodule.length=[48,256] datamodule.batch_size=32 datamodule.steps=600 $passkey_recipe"
	random+=" task.schedule.floor=2e-3 task.gate_rate=1"
	for seed in 0 1 2; do
		echo "eviction newest-$seed $random $passkey_lengths"
		echo "eviction evicted-$seed $random model.bank.chained=false $passkey_lengths"
		echo "eviction delta-$seed $random model=lm_ci_delta $passkey_lengths"
		echo "eviction open_gate-$seed $random model.bank.gate_bias=1 $passkey_lengths"
		echo "eviction cosine-$seed $random task.schedule.floor=1e-5 task.gate_rate=10 $passkey_lengths"
	done
}

recall() { # eight pairs told in one chunk, asked for in the seven after it, nothing between
	local seed problem="datamodule=mqar datamodule.vocabulary=64 datamodule.family.pairs=8 datamodule.family.alpha=1.0 datamodule.family.noise=false"
	problem+=" datamodule.length=128 datamodule.steps=600 $adamw"
	local sweep="datamodule.eval_seed=\${seed} sweep=context task.mutes=false evaluation.callbacks.frequencies=null datamodule.eval_batches=4 hydra.sweeper.params.context=\\'128,256,512\\'"
	for seed in 0 1 2; do
		echo "recall delta-$seed model=lm_ci_delta $problem -- $sweep"
		echo "recall unconvolved-$seed model=lm_ci_delta model.bank.taps=1 $problem -- $sweep"
		echo "recall memory-$seed model=lm_ci $problem -- $sweep"
		echo "recall xl-$seed model=lm_ci_xl $problem -- $sweep"
		echo "recall transformer-$seed model=lm_tiny_transformer model.width=64 model.layers=2 model.hidden=512 segment=128 $problem -- $sweep"
	done
}

bytes() { # the best that half an hour makes
	echo "bytes wide-0 model=lm_tiny model.width=192 model.heads=6 model.hidden=768 model.bank.gate_bias=1 epochs=2"
}

for study in "${@:2}"; do ${study//:/ }; done | xargs -P 2 -L 1 bash -c 'one "$@"' one
