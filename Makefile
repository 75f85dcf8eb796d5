# make setup: .venv with edgepress in it.
# make demo: an int8 model, compiled, run and verified on this machine.
# make test: all tests. Both set up .venv first; so does make lint.
# make fuzz: breaks weights files for FUZZ_SECONDS, 600 by default, per program that reads them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLE := examples/fashion_mnist
FUZZ_SECONDS ?= 600
CROSS_TOOLS := aarch64-linux-gnu-gcc arm-linux-gnueabihf-gcc arm-linux-gnueabi-gcc qemu-aarch64 qemu-arm
CROSS_PACKAGES := gcc-aarch64-linux-gnu libc6-dev-arm64-cross gcc-arm-linux-gnueabihf \
	libc6-dev-armhf-cross gcc-arm-linux-gnueabi libc6-dev-armel-cross qemu-user
LOOPBACK_PACKAGES := openssh-server openssh-client libnss-wrapper busybox-static

.PHONY: help setup demo test fuzz lint docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# //p' Makefile

setup: $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/edgepress run $(EXAMPLE)/fashion_mnist.onnx -t native \
		--calib $(EXAMPLE)/calib_256.npz --eval $(EXAMPLE)/test_2000.npz \
		-o demo/fashion_mnist --overwrite

test: $(VENV)/.installed
	@for tool in $(CROSS_TOOLS); do command -v $$tool >/dev/null || { \
		echo "$$tool is missing: tests for Arm boards will be skipped. To run them:"; \
		echo "    sudo apt-get install -y $(CROSS_PACKAGES)"; break; }; done
	@command -v g++ >/dev/null || { \
		echo "g++ is missing: tests that emulate a GPU cannot run. To run them:"; \
		echo "    sudo apt-get install -y g++"; }
	@test -x /usr/sbin/sshd || { \
		echo "sshd is missing: tests of boards on loopback will be skipped. To run them:"; \
		echo "    sudo apt-get install -y $(LOOPBACK_PACKAGES)"; }
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

fuzz: $(VENV)/.installed
	@command -v clang >/dev/null || { \
		echo "clang is missing: fuzzing without libFuzzer, which finds less. To install it:"; \
		echo "    sudo apt-get install -y clang libclang-rt-dev"; }
	$(BIN)/python -m tests.fuzz.run --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

clean:
	rm -rf $(VENV) demo build

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null && $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		&& command -v gcc >/dev/null || { \
		echo "Python's venv module or gcc is missing. Install them with:"; \
		echo "    sudo apt-get install -y python3-venv gcc libc6-dev"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is older than 3.11. Name a newer one: make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@
