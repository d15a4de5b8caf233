# make demo    fine-tune the embedded default and show the result
# make test    install what the tests need and run them
# make check   format, lint, types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# The tests marked slurm start a cluster of their own. Daemons that the installation may start do not disturb it: it uses
# sockets of its own and networks of its own, and slurmctld and slurmd do not start without /etc/slurm/slurm.conf.
APT := DEBIAN_FRONTEND=noninteractive apt-get --quiet --quiet
INSTALL_SLURM := $(APT) install --yes --no-install-recommends slurm-wlm munge iproute2

.PHONY: demo test check slurm-packages clean

demo: $(VENV)/.installed
	$(BIN)/shoal run recipes/causal_lm.yaml

test: $(VENV)/.installed-test slurm-packages
	$(BIN)/python -m pytest

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

clean:
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache
