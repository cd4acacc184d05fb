"""Products of few rows with a large matrix: what torch's linear gives, by another library."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mara_kernels import linear as module
from mara_kernels.linear import has_onednn, linear

SIZE, INPUTS = 640, 512
# Of sums of 512 products of about 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
needs_onednn = pytest.mark.skipif(not has_onednn(), reason="needs torch with MKL and oneDNN")


def weight_and_bias(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(SIZE, INPUTS, generator=generator).to(dtype)
    return weight, torch.randn(SIZE, generator=generator).to(dtype)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Inputs that torch's own linear got."""
    seen: list[Tensor] = []

    def counted(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append(input)
        return F.linear(input, weight, bias)

    monkeypatch.setattr(module, "_torch_linear", counted)
    return seen


@needs_onednn
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 1), (1, 7), (2, 3, 5), (130,)])
@pytest.mark.parametrize("with_bias", [False, True])
@torch.inference_mode()
def test_equals_float64(shape: tuple[int, ...], with_bias: bool, calls: list[Tensor]) -> None:
    weight, bias = weight_and_bias()
    input = torch.randn(*shape, INPUTS, generator=torch.Generator().manual_seed(1))
    bias = bias if with_bias else None
    exact = F.linear(input.double(), weight.double(), None if bias is None else bias.double())
    error = (linear(input, weight, bias) - exact).norm() / exact.norm()
    assert not calls and error < 1e-6


@needs_onednn
@torch.inference_mode()
def test_strides_nan_and_infinity(calls: list[Tensor]) -> None:
    weight, _ = weight_and_bias()
    generator = torch.Generator().manual_seed(2)
    wide = torch.randn(5, 2 * INPUTS + 3, generator=generator)
    for input in (wide[:, 3 : INPUTS + 3], wide[:, : 2 * INPUTS : 2], wide[:, :INPUTS].T[:, :0].T):
        torch.testing.assert_close(linear(input, weight), F.linear(input, weight), **CLOSE)
    turned = torch.randn(INPUTS, 5, generator=generator).T
    torch.testing.assert_close(linear(turned, weight), F.linear(turned, weight), **CLOSE)
    bad = torch.zeros(3, INPUTS)
    bad[1, 4] = torch.nan
    assert linear(bad, weight).isnan().all(1).tolist() == [False, True, False]
    # 0 * inf is NaN, here as there.
    weight[7, 7] = torch.inf
    assert linear(bad[:1], weight).isnan().nonzero().tolist() == [[0, 7]]
    # Of no rows there is no product.
    assert len(calls) == 1 and not calls[0].numel()


@torch.inference_mode()
def test_what_is_left_to_torch(calls: list[Tensor]) -> None:
    weight, bias = weight_and_bias()
    input = torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(3))
    small = weight[:16].contiguous()
    cases = [
        (input, small, None),
        (input.double(), weight.double(), None),
        (input.bfloat16(), weight.bfloat16(), None),
        (input, weight.T.contiguous().T, None),
        (input, weight, torch.cat((bias, bias))[::2]),
    ]
    for case in cases:
        torch.testing.assert_close(linear(*case), F.linear(*case))
    assert len(calls) == len(cases)
    for other in (bias[:1], bias[None], torch.tensor(2.0)):
        torch.testing.assert_close(linear(input, weight, other), F.linear(input, weight, other))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(input, weight).dtype == torch.bfloat16
    torch._C._set_mkldnn_enabled(False)
    try:
        linear(input, weight)
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert len(calls) == len(cases) + 5
    with pytest.raises(RuntimeError):
        linear(input[:, :-1], weight)


def test_a_gradient_passes() -> None:
    weight, bias = (tensor.requires_grad_() for tensor in weight_and_bias())
    input = torch.randn(2, INPUTS, generator=torch.Generator().manual_seed(4)).requires_grad_()
    linear(input, weight, bias).sum().backward()
    assert all(tensor.grad is not None for tensor in (input, weight, bias))
