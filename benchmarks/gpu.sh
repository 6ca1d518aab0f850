#!/bin/sh
# Real memory and time on a GPU: run it in the repository's root on a machine that has one, and commit
# benchmarks/results/memory_gpu.json and .md. Takes about ten minutes; PYTHON chooses the interpreter.
#   sh benchmarks/gpu.sh
set -eu
exec "${PYTHON:-.venv/bin/python}" -W ignore benchmarks/memory_gpu.py "$@"
