# make demo      fine-tune the embedded default and show the result
# make test      install what the tests need and run them
# make test-xla  install torch_xla in an environment of its own and run the tests that need it
# make check     format, lint, types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
XLA_VENV := .venv-xla
XLA_BIN := $(XLA_VENV)/bin

# The tests marked slurm start a cluster of their own. Daemons that the installation may start do not disturb it: it uses
# sockets of its own and networks of its own, and slurmctld and slurmd do not start without /etc/slurm/slurm.conf.
APT := DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet
INSTALL_SLURM := $(APT) install --yes --no-install-recommends slurm-wlm munge iproute2

INSTALL_BROWSER := $(APT) install --yes --no-install-recommends chromium

# A C compiler, with readelf: tests/xla/cuda_stand_ins.py.
INSTALL_COMPILER := $(APT) install --yes --no-install-recommends gcc libc6-dev binutils

.PHONY: demo test test-xla check slurm-packages browser compiler clean

demo: $(VENV)/.installed
	$(BIN)/shoal run recipes/causal_lm.yaml

test: $(VENV)/.installed-test slurm-packages browser
	$(BIN)/python -m pytest -n logical --dist loadgroup --no-loadscope-reorder

# An install that fails fails the tests; pytest fails where it finds none.
test-xla: $(XLA_VENV)/.installed
	PJRT_DEVICE=CPU $(XLA_BIN)/python -m pytest -m xla tests/xla

check: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# constraints.txt pins every package to the version that was really run.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

$(XLA_VENV)/.installed: pyproject.toml constraints.txt tests/xla/install.py tests/xla/cuda_stand_ins.py | compiler
	test -x $(XLA_BIN)/python || $(PYTHON) -m venv $(XLA_VENV)
	$(XLA_BIN)/python -m tests.xla.install
	touch $@

compiler:
	@for program in gcc readelf; do command -v $$program >/dev/null || missing=$$program; done; \
	if test -z "$$missing"; then :; \
	elif test "$$(id -u)" != 0 || ! command -v apt-get >/dev/null; then \
	    echo "the tests of XLA need $$missing: install gcc and binutils" >&2; exit 1; \
	else $(INSTALL_COMPILER) >/dev/null || { $(APT) update && $(INSTALL_COMPILER); } >/dev/null; \
	fi

slurm-packages:
	@missing=; for program in slurmctld munged ip; do \
	    PATH="$$PATH:/usr/sbin:/sbin" command -v $$program >/dev/null || missing=$$program; \
	done; \
	if test -z "$$missing"; then :; \
	elif test "$$(id -u)" != 0; then echo "tests of SLURM are skipped: not root, and $$missing is not installed"; \
	elif ! command -v apt-get >/dev/null; then echo "tests of SLURM are skipped: no $$missing, and no apt-get"; \
	elif ! { $(INSTALL_SLURM) || { $(APT) update && $(INSTALL_SLURM); }; } >/dev/null 2>&1; then \
	    echo "tests of SLURM are skipped: apt-get does not install slurm-wlm and munge"; \
	fi

browser:
	@if command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null; \
	then :; \
	elif test "$$(id -u)" != 0; then echo "tests of pages are skipped: not root, and there is no chromium"; \
	elif ! command -v apt-get >/dev/null; then echo "tests of pages are skipped: no chromium, and no apt-get"; \
	elif ! { $(INSTALL_BROWSER) || { $(APT) update && $(INSTALL_BROWSER); }; } >/dev/null 2>&1; then \
	    echo "tests of pages are skipped: apt-get does not install chromium"; \
	fi

clean:
	rm -rf $(VENV) $(XLA_VENV) dist build .pytest_cache .mypy_cache .ruff_cache
