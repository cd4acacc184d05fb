"""What the Triton bodies can be tested on here."""

import torch

HAS_GPU = torch.cuda.is_available()

# The interpreter multiplies the bits of bfloat16 as if they were integers.
HALF_DTYPES = [torch.float16, torch.bfloat16] if HAS_GPU else [torch.float16]
