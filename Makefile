# make demo: set everything up, and see fusebd work.  make test: set everything up, and check it.
VENV := .venv
# mkfs, fsck and losetup are where only root looks
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean

help:
	@echo "make demo   install what is needed, mount the stacks of mountpoints.example and use them"
	@echo "make test   install what is needed, run the checkers and all tests"
	@echo "make lint   the checkers alone"
	@echo "make clean  remove the virtual environment and all caches"

demo:
	@scripts/setup demo $(VENV)
	@scripts/demo

test: lint
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile

lint:
	@scripts/setup test $(VENV)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
