"""The fast exact kernel: forward and backward passes of the model itself, and no Jacobian.

A batch goes from :mod:`.kernels` (batches, tiles) to :mod:`.passes`, where :mod:`.capture` notes by :mod:`.dependence`
which operations use a parameter and :mod:`.rules` turns these uses into features; :mod:`.targets` says which kernels a
feature enters, and :mod:`.gram` contracts it. Beside this path, :mod:`.verification` and :mod:`.independence` prove
that the features are right, :mod:`.memory` and :mod:`.merging` keep them in bounds, :mod:`.calls` finds the uses that
are layers' calls, and :mod:`.layer_calls` is the reference for adapters. It is here since it contracts features too.
"""
