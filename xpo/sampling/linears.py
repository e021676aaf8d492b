"""Linear layers laid out for decoding on a CPU. Layer 0: torch only.

Decoding multiplies a few rows with every weight of the model, token after token. The general matrix product
reorders the weights each time, which costs more than the product: at 16 rows it reads them at 3 GB/s where memory
gives 19. oneDNN keeps weights in its own order instead; reordering them once costs as much as three or four tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from xpo.models.logprobs import replaced_forward

SMALLEST = 2**16  # weights of a layer for which it is worth while
MOST_ROWS = 128  # beyond so many rows, the plain product is as fast


@contextmanager
def packed_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """Within, large linear layers in float32 on a CPU use a reordered copy of their weights; others are as ever.

    The weights must not change within. Results differ by rounding.

    Args:
        model: any module.
        rows: of the inputs that will come most often; others are welcome.
    """
    with ExitStack() as stack:
        if rows <= MOST_ROWS and torch.backends.mkldnn.is_available() and not torch.is_autocast_enabled("cpu"):
            for module in model.modules():
                if type(module) is nn.Linear and _is_worth_it(module.weight):
                    stack.enter_context(replaced_forward(module, _packed_forward(module, rows)))
        yield


def _is_worth_it(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _packed_forward(module: nn.Linear, rows: int) -> Callable[[Tensor], Tensor]:
    weight, bias = torch.ops.mkldnn._reorder_linear_weight(module.weight.detach(), rows), module.bias
    plain, width = module.forward, module.in_features

    def forward(values: Tensor) -> Tensor:
        if values.numel() > MOST_ROWS * width:  # the prompts
            return plain(values)
        return torch.ops.mkldnn._linear_pointwise(values, weight, bias, "none", [], "")

    return forward
