"""Kernels on disk: computed tile by tile, by as many processes as there are, and resumed after any interruption."""

from ntk.store.kernel_store import KernelStore, Status, kernel_store

__all__ = ["KernelStore", "Status", "kernel_store"]
