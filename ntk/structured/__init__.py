"""The fast exact kernel: forward and backward passes of the model itself, and no Jacobian.

A batch goes through :mod:`.kernels` (batches, tiles), :mod:`.passes`, :mod:`.capture` and :mod:`.rules` (uses become
features), :mod:`.gram` (features become numbers) and :mod:`.targets` (numbers go into kernels).
"""
