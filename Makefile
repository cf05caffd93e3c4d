# make demo | test | check | fix | test-gpu | test-browser
# PYTHON=... uses an interpreter of your own, which must already have what it needs.
# JOBS=n runs the tests in n processes. One test alone: $(PYTHON) -m pytest tests/unit/test_x.py -k y
ifdef PYTHON
RUN_READY =
DEV_READY =
else
PYTHON = .venv/bin/python
RUN_READY = .venv/.run-ready
DEV_READY = .venv/.dev-ready
endif

JOBS = 2
DEMO_PROMPT = a pink heart moving down and to the left quickly behind a red star moving up and to the right on a dark gradient background
START_PROMPT = a small orange circle moving down behind a striped blue heart moving up and to the left quickly on a light background

.PHONY: demo test check fix test-gpu test-browser

.venv/bin/python:
	python3 -m venv .venv

# PyTorch first and by its exact version: a looser requirement would take the newest CUDA build.
.venv/.run-ready: .venv/bin/python requirements.txt requirements-standalone.txt
	.venv/bin/python -c "import torch" 2>/dev/null || .venv/bin/pip install -q torch==2.13.0
	.venv/bin/pip install -q -r requirements-standalone.txt
	touch $@

.venv/.dev-ready: .venv/.run-ready requirements-dev.txt requirements-service.txt
	.venv/bin/pip install -q -r requirements-dev.txt
	touch $@

demo: $(RUN_READY)
	$(PYTHON) -m lightx2v_core generate --task t2v --model demo --prompt "$(DEMO_PROMPT)" \
		--seed 1 --output out/demo_t2v.mp4 --contact-sheet out/demo_t2v.png --beside lightx2v_core/demo/base_t2v.mp4
	$(PYTHON) -m lightx2v_core generate --task i2v --model demo --prompt "$(START_PROMPT)" \
		--image lightx2v_core/demo/start.png \
		--seed 1 --output out/demo_i2v.mp4 --contact-sheet out/demo_i2v.png --beside lightx2v_core/demo/base_i2v.mp4

# loadscope: the groups that tests/conftest.py makes; in order, so that the slow host tests go first.
test: $(DEV_READY)
	$(PYTHON) -m pytest -m "not gpu and not browser" -n $(JOBS) --dist loadscope --no-loadscope-reorder

test-gpu: $(DEV_READY)
	$(PYTHON) -m pytest -m gpu tests/gpu

# ComfyUI's frontend in the system's Chromium; SHOTS=docs/screenshots keeps pictures of it.
tests/browser/node_modules: tests/browser/package.json
	npm --prefix tests/browser install --no-audit --no-fund

test-browser: $(DEV_READY) tests/browser/node_modules
	$(PYTHON) -m pytest -m browser tests/browser

check: $(DEV_READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m basedpyright

fix: $(DEV_READY)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
