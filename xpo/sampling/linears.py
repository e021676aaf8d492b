"""Linear layers laid out for decoding. Layer 0: torch only.

Decoding multiplies a few rows with every weight of the model, token after token, so what is done to the weights each
time counts more than the product:

- The general matrix product on a CPU reorders them, which costs more than the product: at 16 rows it reads them at
  3 GB/s where memory gives 19. oneDNN keeps weights in its own order instead; reordering them once costs as much as
  three or four tokens.
- Autocast rounds them, and remembers the result only of weights that have gradients: not of a reference's, nor of those
  below adapters.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xpo.models.logprobs import replaced_forward

SMALLEST = 2**16  # weights of a layer for which it is worth while
MOST_ROWS = 128  # beyond so many rows, the plain product is as fast


@contextmanager
def decoding_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Within, large linear layers in float32 use copies of their weights: on a CPU reordered ones; under autocast, and
    frozen, rounded ones. Others are as ever.

    The weights must not change within. Reordered ones give results that differ by rounding, rounded ones the same.

    Args:
        model: any module.
        rows: of the inputs that will come most often; others are welcome.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype == torch.float32 and module.weight.numel() >= SMALLEST:
                device = module.weight.device.type
                if torch.is_autocast_enabled(device):
                    if not module.weight.requires_grad:
                        forward = _rounded_forward(module, torch.get_autocast_dtype(device))
                        stack.enter_context(replaced_forward(module, forward))
                elif device == "cpu" and rows <= MOST_ROWS and torch.backends.mkldnn.is_available():
                    stack.enter_context(replaced_forward(module, _packed_forward(module, rows)))
        yield


def _packed_forward(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows), module.bias
    plain, width = module.forward, module.in_features

    def forward(values: Tensor) -> Tensor:
        if values.numel() > MOST_ROWS * width:  # the prompts
            return plain(values)
        return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")

    return forward


def _rounded_forward(module: nn.Linear, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    weight, bias = (None if part is None else part.detach().to(dtype) for part in (module.weight, module.bias))
    return lambda values: F.linear(values, weight, bias)
