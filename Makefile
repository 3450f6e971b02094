# make demo and make test set everything up by themselves, in .venv.
PYTHON ?= python3
VENV := .venv
ORACLE := .oracle
BIN := $(VENV)/bin
TORCH := torch==2.13.0
export OMP_NUM_THREADS = 1

.PHONY: demo demo-driving demo-language demo-dense test test-slow lint bench oracle clean

demo: $(VENV)/train.stamp
	bash scripts/demo.sh $(BIN)/python

# agents trained on three real recordings and made-up traffic, rolled out, scored and drawn
demo-driving: $(VENV)/train.stamp
	rm -rf outputs/demo-driving
	$(BIN)/python train.py task=trajectory threads=1 hydra.run.dir=outputs/demo-driving
	$(BIN)/python evaluate.py task=trajectory ckpt=outputs/demo-driving/last.ckpt threads=1 \
		hydra.run.dir=outputs/demo-driving/evaluate results=outputs/demo-driving/results.csv

# a byte model with a memory, trained on plays; then text in longer windows and hidden numbers, a core each
demo-language: $(VENV)/train.stamp
	bash scripts/demo_language.sh $(BIN)/python

# a detector and a segmenter on scenes of real cut-outs, tested at other sizes and drawn, a core each
demo-dense: $(VENV)/coco.stamp
	bash scripts/demo_dense.sh $(BIN)/python

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m "slow or gpu"

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/dev.stamp
	$(BIN)/python -m bench.rotary --json outputs/bench/rotary.json
	$(BIN)/python -m bench.vit --json outputs/bench/vit.json
	$(BIN)/python -m bench.data --json outputs/bench/data.json
	$(BIN)/python -m bench.agents --json outputs/bench/agents.json
	$(BIN)/python -m bench.sim_agents --json outputs/bench/sim_agents.json
	$(BIN)/python -m bench.language --json outputs/bench/language.json
	$(BIN)/python -m bench.deformable --json outputs/bench/deformable.json

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip $(TORCH)
	touch $@

$(VENV)/train.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train]'
	touch $@

$(VENV)/coco.stamp: $(VENV)/train.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,coco]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/coco.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,waymo,coco,mmdet,dev]'
	touch $@

# Waymo's own metrics, on a TensorFlow of their own beside our environment: 1.7 GB, optional
oracle: $(ORACLE)/oracle.stamp

$(ORACLE)/oracle.stamp: $(VENV)/dev.stamp
	$(PYTHON) -m venv $(ORACLE)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > $$(ls -d $(ORACLE)/lib/python*/site-packages)/beside.pth
	$(ORACLE)/bin/python -m pip install --quiet --constraint constraints.txt tensorflow-cpu==2.21.0 tensorflow-probability==0.25.0 scikit-learn
	$(ORACLE)/bin/python -m pip install --quiet --no-deps tf-keras==2.21.0 waymo-open-dataset-tf-2-12-0==1.6.7
	touch $@

clean:
	rm -rf $(VENV) $(ORACLE) outputs build *.egg-info
