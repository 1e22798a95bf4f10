# `make lab` opens JupyterLab on the first notebook; `make test` runs everything that CI runs. Nothing before them.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11 python,\
  $(if $(shell $(p) -c 'import sys; sys.version_info >= (3, 11) and print("yes")' 2>/dev/null),$(p))))
NOTEBOOK ?= notebooks/00_start_here.ipynb
# More for JupyterLab, as in: make lab JUPYTER_ARGS="--no-browser --port=9999"
JUPYTER_ARGS ?=
OPENED = --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/$(NOTEBOOK)
AS_ROOT = $(if $(filter 0,$(shell id -u)),--allow-root)
LOADERS = test_load test_load_refusals test_load_chat test_engine_parts test_per_layer_table test_packed
ON_COLAB = test_widgets test_picker test_chat_panel test_chat_session test_bit_explorer test_quantize_panel test_memory_panel \
	test_memory_chart test_out_of_memory_panel test_training_panel test_finetune_panel test_set_up_cell test_notebooks
# An activated environment would come before the overlays: IPython 7 puts it first on the path.
unexport VIRTUAL_ENV

.PHONY: lab test clean python

lab: python
	@$(PYTHON) scripts/setup.py lab
	.venv/bin/python -m jupyterlab $(OPENED) $(AS_ROOT) $(JUPYTER_ARGS)

test: python
	@$(PYTHON) scripts/setup.py test
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder --durations=25
	@$(MAKE) --jobs=2 --output-sync=target overlay/colab overlay/transformers-5.15.0 overlay/transformers-5.24.0

# Two test processes at a time, each on one core: threads that wait for each other on the same core make all slower.
# The same tests with other releases installed over the usual ones:
overlay/transformers-%: FILES = $(LOADERS)
overlay/transformers-5.15.0: FILES = $(LOADERS) test_load_built_in
overlay/transformers-5.24.0: FILES = $(LOADERS) test_drafting test_notebooks
overlay/colab: FILES = $(ON_COLAB)
overlay/%:
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.overlays/$* GQK_OVERLAY=$* .venv/bin/python -m pytest tests/test_overlays.py $(FILES:%=tests/%.py)

# Back to a fresh clone: removes what the two commands above installed.
clean:
	rm -rf .venv .overlays build *.egg-info .pytest_cache .ruff_cache .hypothesis

python:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer on PATH. Install one, or name it: make lab PYTHON=/path/to/python3"; exit 1; }
