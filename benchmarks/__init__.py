"""Benchmarks: `python -m benchmarks.kernels` measures every job and writes `docs/benchmarks/kernels.{json,md}`."""
