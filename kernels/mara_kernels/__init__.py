"""Tensor kernels of MARA decoding, with torch references.

Operations, each a folder with its definition in torch: :mod:`truncate` (logits to an ordered
candidate set), :mod:`score` (hidden states to accept logits), :mod:`cascade` (accept logits to a
decision), :mod:`attention` (candidate rows over a shared prefix), :mod:`bookkeeping` (what
happens to the slots of a batch in between) and :mod:`layers` (norms and rotations of the language
model). They know tensors only. On a CPU, :mod:`linear` is what large layers multiply with.
"""
