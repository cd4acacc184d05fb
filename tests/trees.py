"""Trees of candidates to test with."""

import itertools

import torch

from mara_kernels.attention import Tree, tree


def small_trees(num_rows: int) -> list[Tree]:
    """All trees of a few rows: every row's parent is an earlier row or the prefix."""
    found = []
    for parents in itertools.product(*[range(-1, row) for row in range(num_rows)]):
        ancestors, depths = torch.eye(num_rows, dtype=torch.bool), []
        for row, parent in enumerate(parents):
            if parent >= 0:
                ancestors[row] |= ancestors[parent]
            depths.append(0 if parent < 0 else depths[parent] + 1)
        found.append(tree(ancestors, torch.tensor(depths)))
    return found
