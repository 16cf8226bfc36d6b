# `make demo` and `make test` set everything up by themselves; `make` alone lists the targets.
# Options: ARGS='…' for dvla demo or pytest, PYTHON=/path/to/python3.12 for the interpreter of .venv.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help venv system vulkan demo test test-fresh slurm lint fuzz docs site pins licenses audit wheel gpu-check gpu-bundle clean-venv

VENV := .venv
STAMP := $(VENV)/.dvla-installed
IS_311 := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(IS_311)' 2>/dev/null && echo $$p && break; done)
PINS = $$($(VENV)/bin/python -c 'import sys; print("constraints.txt" if sys.version_info < (3, 12) else "constraints-py312.txt")')
UV = $(shell if uv --version >/dev/null 2>&1; then echo uv; else echo $(VENV)/bin/uv; fi)

define NEED_PYTHON
[ -n "$(PYTHON)" ] || { echo "error: no Python 3.11 or newer found; install python3.11, or name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
endef

# apt WHY PACKAGE [FALLBACK]: installs as root or through sudo, or prints in one line what to type
define APT
apt() {
  local why=$$1 sudo=; shift
  if [ "$$(id -u)" != 0 ]; then sudo=sudo; fi
  if command -v apt-get >/dev/null && { [ -z "$$sudo" ] || command -v sudo >/dev/null; }; then
    echo "$$why: installing $$1"
    $$sudo apt-get update -qq || true
    for package in "$$@"; do
      if $$sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$package" >/dev/null; then return 0; fi
    done
  fi
  echo "error: $$why; as root, run: apt-get install $$1, then rerun make" >&2
  exit 1
}
endef

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

venv: $(STAMP)  ## create or update .venv (pinned by constraints.txt for Python 3.11, constraints-py312.txt for 3.12 and 3.13)

$(STAMP): constraints.txt constraints-py312.txt pyproject.toml
	@$(NEED_PYTHON)
	$(APT)
	uv=$(UV)
	if ! $(VENV)/bin/python -c '$(IS_311)' 2>/dev/null; then
	  rm -rf $(VENV)
	  if [ "$$uv" = uv ]; then
	    uv venv --quiet --python "$(PYTHON)" $(VENV)
	  else
	    if ! "$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null; then
	      apt "$(PYTHON) cannot make a virtual environment" "$$("$(PYTHON)" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
	    fi
	    "$(PYTHON)" -m venv $(VENV)
	  fi
	fi
	if [ "$$uv" != uv ] && ! "$$uv" --version >/dev/null 2>&1; then
	  $(VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(VENV)/bin/python -m ensurepip >/dev/null
	  $(VENV)/bin/python -m pip install --quiet uv
	fi
	echo "installing dvla and its dependencies into $(VENV) (about 8 GB with torch's CUDA libraries)"
	"$$uv" pip install --python $(VENV)/bin/python -e ".[lerobot,sim,dev]" -c "$(PINS)"
	touch $@

system:  ## install a headless rendering library (OSMesa or EGL) with apt-get if missing
	@if [ "$$(uname -s)" != Linux ] || [ -n "$${MUJOCO_GL:-}" ]; then exit 0; fi
	$(NEED_PYTHON)
	$(APT)
	found='import sys, ctypes.util as c; sys.exit(not (c.find_library("OSMesa") or c.find_library("EGL")))'
	if ! "$(PYTHON)" -c "$$found"; then apt "no libOSMesa or libEGL for headless rendering" libosmesa6 libegl1; fi

vulkan:  ## install the software Vulkan driver that ManiSkill needs with apt-get (Debian 12: from backports)
	@if [ "$$(uname -s)" != Linux ] || [ -n "$${VK_ICD_FILENAMES:-}" ]; then exit 0; fi
	$(APT)
	package=mesa-vulkan-drivers
	if grep -q '^VERSION_CODENAME=bookworm' /etc/os-release; then
	  package=mesa-vulkan-drivers/bookworm-backports
	  list=/etc/apt/sources.list.d/bookworm-backports.list
	  mirror=$$(apt-get indextargets --format '$$(REPO_URI)' 'Codename: bookworm' 'Created-By: Packages' | sort -u | head -n 1)
	  line="deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $$mirror bookworm-backports main"
	  if [ ! -e $$list ]; then
	    if [ "$$(id -u)" = 0 ]; then echo "$$line" > $$list; else echo "$$line" | sudo tee $$list > /dev/null; fi
	  fi
	fi
	apt "a Vulkan driver for ManiSkill" $$package

demo: system $(STAMP)  ## run all three stages on two simulated tasks, on a CPU, in 8 to 12 minutes
	@$(VENV)/bin/dvla demo $(ARGS)

test: system $(STAMP)  ## run every test, in two processes (ARGS='-n 0 tests/drifting': some, in one)
	@OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-fresh:  ## run the tests of the last commit with the other set of versions, in a bare Debian (as root; 12 GB; DIR=, ARGS=)
	@.ci/test-fresh

slurm: $(STAMP)  ## run dvla's jobs on a Slurm of this machine alone, as root (Debian's packages, 4 minutes or more)
	@$(APT)
	{ command -v slurmctld && command -v slurmd && command -v sinfo; } >/dev/null || apt "no Slurm" slurm-wlm
	$(UV) pip install --quiet --python $(VENV)/bin/python -e ".[slurm]" -c "$(PINS)"
	tests/support/one_node_slurm.sh $(VENV)/bin/python -m pytest -n 0 -v tests/stages/experiments/test_slurm.py

lint: $(STAMP)  ## run ruff (rules and format), and mypy over the package
	@$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	mkdir -p $(VENV)/mypy
	ln -sfn "$(CURDIR)" $(VENV)/mypy/dvla     # the root folder is the package dvla
	ln -sfn "$(CURDIR)/client/dvla_client" $(VENV)/mypy/dvla_client
	MYPYPATH=$(VENV)/mypy $(VENV)/bin/mypy --cache-dir $(VENV)/mypy/cache -p dvla -p dvla_client

docs: $(STAMP)  ## regenerate docs/cli.md from the commands' help
	@$(VENV)/bin/python -m typer dvla.cli utils docs --name dvla --title "Command line" --output docs/cli.md

site: $(STAMP)  ## build the documentation site in build/site, offline; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	echo build/site/index.html

fuzz: $(STAMP)  ## damage datasets of every format, 2000 times each, and caches, and read them (over an hour)
	@$(VENV)/bin/python tests/fuzz/fuzz_readers.py --count 2000
	@$(VENV)/bin/python tests/fuzz/fuzz_caches.py --count 500
	@$(VENV)/bin/python tests/fuzz/fuzz_runs.py --count 500
	@$(VENV)/bin/python tests/fuzz/fuzz_server.py --count 5000
	@$(VENV)/bin/python tests/fuzz/fuzz_options.py --count 2000

pins: $(STAMP)  ## resolve both sets of versions anew from pyproject.toml; what is pinned stays (ARGS=--upgrade: the newest of all)
	@resolve() {
	  local file=$$1 python=$$2 all=()
	  for extra in $$3; do all+=(--extra "$$extra"); done
	  $(UV) pip compile --quiet pyproject.toml "$${all[@]}" --python-version "$$python" --no-header --no-annotate $(ARGS) -o "$$file"
	  sed -i "1i # Known-good versions for Python $$4 on Linux: all that dvla[$${3// /,}] installs. Made by: make pins" "$$file"
	}
	resolve constraints.txt 3.11.5 "lerobot sim maniskill aloha robosuite gs slurm rerun tensorboard dev" 3.11
	resolve constraints-py312.txt 3.12 "lerobot sim aloha robosuite gs slurm rerun tensorboard trackio dev" "3.12 and 3.13"

licenses: $(STAMP)  ## write docs/licenses.md: the license of every pinned package, as its metadata says
	@$(VENV)/bin/python tests/project/test_licenses.py

audit: $(STAMP)  ## check both sets of versions for known vulnerabilities (asks PyPI); what was not checked is an error, code 2
	@found=0
	for pins in constraints.txt constraints-py312.txt; do
	  answer=$$($(UV)x pip-audit -r "$$pins" --no-deps --disable-pip 2>&1) && code=0 || code=$$?
	  skipped=$$(grep -c 'could not be audited' <<< "$$answer" || true)
	  if [ "$$skipped" != 0 ] || { [ "$$code" != 0 ] && ! grep -q 'known vulnerabilit' <<< "$$answer"; }; then
	    echo "error: $$pins was not audited ($$skipped packages without advisories); run make audit where pypi.org can be reached" >&2
	    exit 2
	  fi
	  echo "$$pins: $$answer"
	  [ "$$code" = 0 ] || found=1
	done
	exit $$found

wheel: $(STAMP)  ## build dist/dvla-*.whl
	@rm -rf build
	$(UV) build --quiet --wheel --python $(VENV)/bin/python --out-dir dist
	rm -rf build
	ls dist/*.whl

gpu-check: $(STAMP)  ## check and measure everything on this machine's GPU, 8 minutes (DRY=1: toy size on a CPU; SECTIONS="core steps")
	@PY=$(CURDIR)/$(VENV)/bin/python OUT=$(CURDIR)/build/gpu-check WORK=$(CURDIR)/build/gpu-check/work benchmarks/gpu_check.sh

gpu-bundle: $(STAMP)  ## make build/gpu-bundle.tar: the last commit's gpu-check for a machine without a network, below 60 MB
	@benchmarks/gpu_check/bundle.sh build/gpu-bundle $(CURDIR)/$(VENV)/bin/python $(UV)

clean-venv:  ## remove .venv
	@rm -rf $(VENV)
