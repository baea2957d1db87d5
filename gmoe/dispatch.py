"""Tokens to experts and back: the one place where tokens move, and the one choice of kernel.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out features; U = H, or 2 H before a gate.

A layer calls :func:`routed_linear`, :func:`routed_mlp`, or the halves :func:`dispatch` and :func:`combine` around
:func:`grouped_linear`. The kernels are operators of torch (``torch.ops.gmoe``), which ``torch.compile`` does not look into.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._checks import check_choice
from gmoe.routing import Routing

Backend: TypeAlias = Literal["auto", "grouped", "padded", "loop"]
Elementwise: TypeAlias = Callable[[Tensor], Tensor]
Derivative: TypeAlias = Callable[[Tensor, Tensor], Tensor]

aten = torch.ops.aten

FUSED: dict[str, tuple[Elementwise, Derivative]] = {
    "gelu": (F.gelu, lambda grad, u: aten.gelu_backward(grad, u)),
    "gelu_tanh": (
        lambda u: F.gelu(u, approximate="tanh"),
        lambda grad, u: aten.gelu_backward(grad, u, approximate="tanh"),
    ),
    "identity": (torch.positive, lambda grad, u: grad),
    "relu": (F.relu, lambda grad, u: aten.threshold_backward(grad, u, 0)),
    "silu": (F.silu, lambda grad, u: aten.silu_backward(grad, u)),
    "tanh": (torch.tanh, lambda grad, u: aten.tanh_backward(grad, u.tanh())),
}
"""Activations that :func:`routed_mlp` can run expert by expert: the function, and ``(grad of output, input) -> grad``."""

FUSING = frozenset({"auto", "loop"})
"""Backends with which, on a CPU, gather, products and scatter are one step an expert."""


def dispatch(x_TI: Tensor, routing: Routing) -> Tensor:
    """(P, I) the token of each pair, expert by expert."""
    return x_TI.index_select(0, routing.token)


def combine(y_PO: Tensor, routing: Routing) -> Tensor:
    r"""(T, O) the weighted sum of the experts' outputs over each token's pairs; zero where a token has none.

    .. math:: y_t = \sum_{e} w_{te} f_e(x_t)
    """
    weighted_PO = y_PO * routing.weight.to(y_PO.dtype)[:, None]
    return weighted_PO.new_zeros(routing.num_tokens, y_PO.size(1)).index_add(0, routing.token, weighted_PO)


def resolve_backend(backend: Backend, x: Tensor) -> str:
    """What ``"auto"`` stands for on this device, and what stands in for ``"grouped"`` where torch has no kernel.

    Raises:
        ValueError: an unknown backend.
    """
    if backend not in get_args(Backend):
        check_choice("backend", backend, get_args(Backend))
    if backend == "auto":
        backend = "grouped" if x.is_cuda else "loop"
    return "loop" if backend == "grouped" and x.dtype == torch.float64 else backend


def grouped_linear(
    x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, backend: Backend = "auto"
) -> Tensor:
    """(P, O) a linear layer whose weight depends on the row: rows ``offsets[e - 1]:offsets[e]`` meet expert ``e``'s.

    Args:
        x_PI: rows sorted by expert.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        offsets_E: (E,) int32 cumulative ends; the last is P.
        backend: all give the same result and gradients.

            - ``"loop"``: one matmul per expert, written in place. One host sync.
            - ``"padded"``: one ``bmm`` over all experts, padded to the largest load. One host sync.
            - ``"grouped"``: ``torch.nn.functional.grouped_mm``; no host sync where torch has a kernel for it (bfloat16
              on recent CUDA devices), a loop of torch's own elsewhere. float64, which it refuses, runs as ``"loop"``;
              widths that its alignment rule refuses are padded with zeros.
            - ``"auto"`` (default): ``"grouped"`` on CUDA, else ``"loop"``.

    Follows autocast as ``nn.Linear`` does. Can be differentiated once.

    Raises:
        ValueError: an unknown backend.
    """
    kernel = resolve_backend(backend, x_PI)
    if torch.is_autocast_enabled(x_PI.device.type):
        x_PI, weight_EIO, bias_EO = _cast(x_PI, weight_EIO, bias_EO)
    with torch.autocast(x_PI.device.type, enabled=False):
        return torch.ops.gmoe.grouped_linear(x_PI, weight_EIO, bias_EO, offsets_E, kernel)


def routed_linear(
    parts: Sequence[Tensor],
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    routing: Routing,
    backend: Backend = "auto",
) -> Tensor:
    r"""(T, O) :math:`y_t = \sum_e w_{te} (x_t W_e + b_e)`: gather, grouped product and weighted scatter.

    With the loop backend all in one step, one expert after the other, without a (P, I) or (P, O) tensor. Neither is
    needed for the gradients: that of a weight is :math:`\bar y_t \cdot (x_t W_e + b_e) = (\bar y_t W_e^\top) \cdot
    x_t + \bar y_t \cdot b_e`. Follows autocast. Can be differentiated once.

    Args:
        parts: x in parts, each (T, I_i), whose widths add up to I: with the loop backend they are not joined.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        routing: who goes where.
        backend: see :func:`grouped_linear`.
    """
    if backend not in FUSING or parts[0].is_cuda:
        x_TI = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
        return combine(grouped_linear(dispatch(x_TI, routing), weight_EIO, bias_EO, routing.offsets, backend), routing)
    device = parts[0].device.type
    if torch.is_autocast_enabled(device) and parts[0].dtype != torch.float64:
        weight_EIO = weight_EIO.to(torch.get_autocast_dtype(device))
    parts = [part.to(weight_EIO.dtype) for part in parts]
    token_P, offsets_E, gate_P = routing.token, routing.offsets, routing.weight.to(weight_EIO.dtype)
    if weight_EIO.dtype == torch.bfloat16 and device == "cpu":
        token_P, offsets_E, gate_P = rounded(token_P, offsets_E, gate_P)
    bias_EO = None if bias_EO is None else bias_EO.to(weight_EIO.dtype)
    with torch.autocast(device, enabled=False):
        return torch.ops.gmoe.routed_linear(
            gate_P, weight_EIO, bias_EO, parts, token_P, offsets_E, routing.num_tokens
        )


def routed_mlp(
    x_TI: Tensor,
    up_EIU: Tensor,
    up_bias_EU: Tensor | None,
    down_EHO: Tensor,
    down_bias_EO: Tensor | None,
    activation: str,
    glu: bool,
    routing: Routing,
) -> Tensor:
    r"""(T, O) :math:`y_t = \sum_e w_{te} (\phi(x_t W_e + b_e) V_e + c_e)`, one expert after the other.

    An expert's slice of the hidden layer is small enough to stay in cache, and the only large tensor that is kept for
    the backward pass is the hidden layer before its activation, which is applied again there. The gradient of a weight
    needs no output either: :math:`\bar y_t \cdot (h V_e + c_e) = (\bar y_t V_e^\top) \cdot h + \bar y_t \cdot c_e`.
    Follows autocast. Can be differentiated once. One host sync.

    Args:
        x_TI: tokens.
        up_EIU, up_bias_EU: the first layers, stacked.
        down_EHO, down_bias_EO: the second layers, stacked.
        activation: a name of :data:`FUSED`.
        glu: the first half of U, activated, gates the second half.
        routing: who goes where.
    """
    device = x_TI.device.type
    if torch.is_autocast_enabled(device):
        x_TI, up_EIU, up_bias_EU, down_EHO, down_bias_EO = _cast(x_TI, up_EIU, up_bias_EU, down_EHO, down_bias_EO)
    token_P, offsets_E, gate_P = routing.token, routing.offsets, routing.weight.to(x_TI.dtype)
    if x_TI.dtype == torch.bfloat16 and device == "cpu":
        token_P, offsets_E, gate_P = rounded(token_P, offsets_E, gate_P)
    with torch.autocast(device, enabled=False):
        out_TO, _ = torch.ops.gmoe.routed_mlp(
            x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO, token_P, offsets_E, activation, glu
        )
    return out_TO


def rounded(token_P: Tensor, offsets_E: Tensor, gate_P: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs with loads rounded up, by pairs of weight zero, to few values.

    In bfloat16 on the CPU, oneDNN compiles a kernel for each size that it has not kept, which takes longer than the
    product itself (1,000 rows, 96 to 192). Loads of tokens that choose are new in each step. Rounding adds at most a
    16th of the rows. Where all loads are the same, and under ``torch.compile``, the pairs stay as they are.
    """
    pairs, num_experts = token_P.numel(), offsets_E.numel()
    multiple = 1 << max(pairs // (16 * num_experts), 1).bit_length() - 1
    if torch.compiler.is_compiling() or multiple == 1:
        return token_P, offsets_E, gate_P
    load_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()
    if bool((load_E == load_E[0]).all()):
        return token_P, offsets_E, gate_P
    rounded_E = (load_E + multiple - 1) // multiple * multiple
    expert_R = torch.arange(num_experts).repeat_interleave(rounded_E)
    slot_R = torch.arange(expert_R.numel()) - (rounded_E.cumsum(0) - rounded_E)[expert_R]
    real_R = slot_R < load_E[expert_R]
    source_R = (offsets_E.long() - load_E)[expert_R] + slot_R * real_R  # else the expert's first pair
    gate_R = torch.where(real_R, gate_P.index_select(0, source_R), 0.0)
    return token_P.index_select(0, source_R), rounded_E.cumsum(0).to(torch.int32), gate_R


def _cast(x: Tensor, *others: Tensor | None) -> Any:
    """To autocast's type, as it would for a product."""
    if x.dtype == torch.float64:
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), *(None if other is None else other.to(dtype) for other in others)


# rows sorted by expert ------------------------------------------------------------------------------------------------


@torch.library.custom_op("gmoe::grouped_linear", mutates_args=())
def _grouped_linear(
    x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, kernel: str
) -> Tensor:
    if kernel == "loop":
        y_PO = x_PI.new_empty(x_PI.size(0), weight_EIO.size(2))
        ends = offsets_E.tolist()  # one host sync
        for expert, rows in enumerate(map(slice, [0, *ends], ends)):
            if bias_EO is None:
                torch.mm(x_PI[rows], weight_EIO[expert], out=y_PO[rows])
            else:
                torch.addmm(bias_EO[expert], x_PI[rows], weight_EIO[expert], out=y_PO[rows])
        return y_PO
    multiply = _padded_mm if kernel == "padded" else _grouped_mm
    y_PO = multiply(x_PI, weight_EIO, offsets_E)
    if bias_EO is None:
        return y_PO
    return y_PO.add_(bias_EO.repeat_interleave(_load(offsets_E), dim=0, output_size=x_PI.size(0)))


@_grouped_linear.register_fake
def _(x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, offsets_E: Tensor, kernel: str) -> Tensor:
    return x_PI.new_empty(x_PI.size(0), weight_EIO.size(2))


@torch.library.custom_op("gmoe::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_PO: Tensor, x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor, kernel: str, needs: Sequence[bool]
) -> list[Tensor]:
    """Gradients of the rows, the weights and the biases; what is not needed is empty."""
    needs_x, needs_weight, needs_bias = needs
    none = x_PI.new_empty(0)
    grad_PO = grad_PO.contiguous()
    grad_x = torch.empty_like(x_PI) if needs_x and kernel == "loop" else none
    grad_weight = torch.empty_like(weight_EIO) if needs_weight and kernel == "loop" else none
    grad_bias = weight_EIO.new_zeros(weight_EIO.size(0), weight_EIO.size(2)) if needs_bias else none
    if kernel == "loop":
        ends = offsets_E.tolist()  # one host sync
        for expert, rows in enumerate(map(slice, [0, *ends], ends)):
            if needs_x:
                torch.mm(grad_PO[rows], weight_EIO[expert].T, out=grad_x[rows])
            if needs_weight:  # zero where the expert has no rows
                torch.mm(x_PI[rows].T, grad_PO[rows], out=grad_weight[expert])
            if needs_bias:
                torch.sum(grad_PO[rows], dim=0, out=grad_bias[expert])
        return [grad_x, grad_weight, grad_bias]
    padded = kernel == "padded"
    if needs_x:
        grad_x = (_padded_mm if padded else _grouped_mm)(grad_PO, weight_EIO.transpose(1, 2), offsets_E)
    if needs_weight:
        grad_weight = (_padded_outer if padded else _grouped_outer)(x_PI, grad_PO, offsets_E)
    if needs_bias:
        owner_P = torch.arange(offsets_E.numel(), device=x_PI.device).repeat_interleave(
            _load(offsets_E), output_size=x_PI.size(0)
        )
        grad_bias.index_add_(0, owner_P, grad_PO)
    return [grad_x, grad_weight, grad_bias]


@_grouped_linear_backward.register_fake
def _(
    grad_PO: Tensor, x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor, kernel: str, needs: Sequence[bool]
) -> list[Tensor]:
    bias_EO = weight_EIO.new_empty(weight_EIO.size(0), weight_EIO.size(2))
    return [_like(value, needed) for value, needed in zip((x_PI, weight_EIO, bias_EO), needs, strict=True)]


def _like(value: Tensor | None, needed: bool) -> Tensor:
    """An empty gradient of that shape, or the stand-in for one that is not needed."""
    return torch.empty_like(value) if needed and value is not None else torch.empty(0)


def _keep_grouped(ctx: Any, inputs: Any, output: Any) -> None:
    x_PI, weight_EIO, _, offsets_E, ctx.kernel = inputs
    ctx.save_for_backward(x_PI, weight_EIO, offsets_E)


def _grouped_gradients(ctx: Any, grad_PO: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    found = torch.ops.gmoe.grouped_linear_backward(grad_PO, *ctx.saved_tensors, ctx.kernel, needs)
    return *_wanted(found, needs), None, None


def _wanted(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    return [value if needed else None for value, needed in zip(found, needs, strict=True)]


_grouped_linear.register_autograd(_grouped_gradients, setup_context=_keep_grouped)


def _load(offsets_E: Tensor) -> Tensor:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()


def _padded(x_PI: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """(E, C, I) the rows of each expert, padded to the largest load, and (P,) where each row lies in that."""
    load_E = _load(offsets_E)
    num_experts, capacity = load_E.numel(), int(load_E.max()) if x_PI.size(0) else 0
    start_P = (offsets_E.long() - load_E).repeat_interleave(load_E)
    expert_P = torch.arange(num_experts, device=x_PI.device).repeat_interleave(load_E)
    slot_P = expert_P * capacity + torch.arange(x_PI.size(0), device=x_PI.device) - start_P
    x_ECI = x_PI.new_zeros(num_experts * capacity, x_PI.size(1)).index_copy(0, slot_P, x_PI)
    return x_ECI.view(num_experts, capacity, x_PI.size(1)), slot_P


def _padded_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    x_ECI, slot_P = _padded(x_PI, offsets_E)
    return torch.bmm(x_ECI, weight_EIO).flatten(0, 1).index_select(0, slot_P)


def _padded_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    return torch.bmm(_padded(x_PI, offsets_E)[0].transpose(1, 2), _padded(grad_PO, offsets_E)[0])


def _grouped_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    if x_PI.size(0) == 0:
        return x_PI.new_zeros(0, weight_EIO.size(2))
    x_PI = _aligned(x_PI)
    step = 16 // x_PI.element_size()
    missing_in, missing_out = -weight_EIO.size(1) % step, -weight_EIO.size(2) % step
    aligned_EIO = F.pad(weight_EIO, (0, missing_out, 0, missing_in)) if missing_in or missing_out else weight_EIO
    return F.grouped_mm(x_PI, aligned_EIO, offs=offsets_E)[:, : weight_EIO.size(2)].clone()


def _grouped_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    if x_PI.size(0) == 0:
        return x_PI.new_zeros(offsets_E.numel(), x_PI.size(1), grad_PO.size(1))
    full_EIO = F.grouped_mm(_aligned(x_PI).T, _aligned(grad_PO), offs=offsets_E)
    # an empty group's product is zero, whether or not the kernel writes it
    return torch.where(
        (_load(offsets_E) > 0)[:, None, None], full_EIO[:, : x_PI.size(1), : grad_PO.size(1)], 0.0
    )


def _aligned(x_PI: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, zeros behind the true width."""
    missing = -x_PI.size(1) % (16 // x_PI.element_size())
    return F.pad(x_PI, (0, missing)) if missing else x_PI.contiguous()


# from tokens to tokens, one expert after the other --------------------------------------------------------------------


@torch.library.custom_op("gmoe::routed_linear", mutates_args=())
def _routed_linear(
    gate_P: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    parts: Sequence[Tensor],
    token_P: Tensor,
    offsets_E: Tensor,
    num_tokens: int,
) -> Tensor:
    widths = [part.size(1) for part in parts]
    out_TO = gate_P.new_zeros(num_tokens, weight_EIO.size(2))
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token = token_P[pairs]
        y = gate_P.new_zeros(len(token), weight_EIO.size(2)) if bias_EO is None else bias_EO[expert]
        for part, weight in zip(parts, weight_EIO[expert].split(widths), strict=True):
            y = torch.addmm(y, part.index_select(0, token), weight)
        out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
    return out_TO


@_routed_linear.register_fake
def _(
    gate_P: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    parts: Sequence[Tensor],
    token_P: Tensor,
    offsets_E: Tensor,
    num_tokens: int,
) -> Tensor:
    return gate_P.new_empty(num_tokens, weight_EIO.size(2))


@torch.library.custom_op("gmoe::routed_linear_backward", mutates_args=())
def _routed_linear_backward(
    grad_TO: Tensor,
    gate_P: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    parts: Sequence[Tensor],
    token_P: Tensor,
    offsets_E: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the gates, the weights, the biases and each part; what is not needed is empty."""
    needs_gate, needs_weight, needs_bias, *needs_parts = needs
    values = (gate_P, weight_EIO, bias_EO)
    grad_gate, grad_weight, grad_bias = (_like(v, need) for v, need in zip(values, needs[:3], strict=True))
    grad_parts = [torch.zeros_like(part) if needed else None for part, needed in zip(parts, needs_parts, strict=True)]
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, gate = token_P[pairs], gate_P[pairs, None]
        grad = grad_TO.index_select(0, token)
        at_gate = gate_P.new_zeros(len(token)) if bias_EO is None else torch.mv(grad, bias_EO[expert])
        scaled = grad * gate
        if needs_bias:
            torch.sum(scaled, dim=0, out=grad_bias[expert])
        first = 0
        for part, grad_part in zip(parts, grad_parts, strict=True):
            columns = slice(first, first + part.size(1))
            first = columns.stop
            x = part.index_select(0, token)
            if needs_weight:
                torch.mm(x.T, scaled, out=grad_weight[expert, columns])
            if not needs_gate and grad_part is None:
                continue
            back = grad @ weight_EIO[expert, columns].T
            if needs_gate:
                at_gate = at_gate + x.mul_(back).sum(dim=1)
            if grad_part is not None:
                grad_part.index_add_(0, token, back.mul_(gate))
        if needs_gate:
            grad_gate[pairs] = at_gate
    none = gate_P.new_empty(0)
    return [grad_gate, grad_weight, grad_bias, *(none if grad is None else grad for grad in grad_parts)]


@_routed_linear_backward.register_fake
def _(
    grad_TO: Tensor,
    gate_P: Tensor,
    weight_EIO: Tensor,
    bias_EO: Tensor | None,
    parts: Sequence[Tensor],
    token_P: Tensor,
    offsets_E: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    return [_like(v, needed) for v, needed in zip((gate_P, weight_EIO, bias_EO, *parts), needs, strict=True)]


def _keep_routed_linear(ctx: Any, inputs: Any, output: Any) -> None:
    gate_P, weight_EIO, bias_EO, parts, token_P, offsets_E, _ = inputs
    ctx.save_for_backward(gate_P, weight_EIO, bias_EO, token_P, offsets_E, *parts)


def _routed_linear_gradients(ctx: Any, grad_TO: Tensor) -> tuple[Any, ...]:
    gate_P, weight_EIO, bias_EO, token_P, offsets_E, *parts = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:3], *_needed(ctx.needs_input_grad[3], parts)]
    found = torch.ops.gmoe.routed_linear_backward(
        grad_TO, gate_P, weight_EIO, bias_EO, parts, token_P, offsets_E, needs
    )
    wanted = _wanted(found, needs)
    return *wanted[:3], wanted[3:], None, None, None


def _needed(needs: bool | Sequence[bool], parts: Sequence[Tensor]) -> list[bool]:
    """For a list of tensors, torch says of each, or in one word."""
    return [bool(needs)] * len(parts) if isinstance(needs, bool) else list(needs)


_routed_linear.register_autograd(_routed_linear_gradients, setup_context=_keep_routed_linear)


@torch.library.custom_op("gmoe::routed_mlp", mutates_args=())
def _routed_mlp(
    x_TI: Tensor,
    gate_P: Tensor,
    up_EIU: Tensor,
    up_bias_EU: Tensor | None,
    down_EHO: Tensor,
    down_bias_EO: Tensor | None,
    token_P: Tensor,
    offsets_E: Tensor,
    activation: str,
    glu: bool,
) -> tuple[Tensor, Tensor]:
    """(T, O) the output, and (P, U) the hidden layer before its activation."""
    activate = FUSED[activation][0]
    out_TO = gate_P.new_zeros(x_TI.size(0), down_EHO.size(2))
    hidden_PU = x_TI.new_empty(token_P.size(0), up_EIU.size(2))
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, u = token_P[pairs], hidden_PU[pairs]
        if up_bias_EU is None:
            torch.mm(x_TI.index_select(0, token), up_EIU[expert], out=u)
        else:
            torch.addmm(up_bias_EU[expert], x_TI.index_select(0, token), up_EIU[expert], out=u)
        h = activate(u[:, : u.size(1) // 2]) * u[:, u.size(1) // 2 :] if glu else activate(u)
        y = h @ down_EHO[expert] if down_bias_EO is None else torch.addmm(down_bias_EO[expert], h, down_EHO[expert])
        out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
    return out_TO, hidden_PU


@_routed_mlp.register_fake
def _(
    x_TI: Tensor,
    gate_P: Tensor,
    up_EIU: Tensor,
    up_bias_EU: Tensor | None,
    down_EHO: Tensor,
    down_bias_EO: Tensor | None,
    token_P: Tensor,
    offsets_E: Tensor,
    activation: str,
    glu: bool,
) -> tuple[Tensor, Tensor]:
    return gate_P.new_empty(x_TI.size(0), down_EHO.size(2)), x_TI.new_empty(token_P.size(0), up_EIU.size(2))


@torch.library.custom_op("gmoe::routed_mlp_backward", mutates_args=())
def _routed_mlp_backward(
    grad_TO: Tensor,
    x_TI: Tensor,
    gate_P: Tensor,
    up_EIU: Tensor,
    up_bias_EU: Tensor | None,
    down_EHO: Tensor,
    down_bias_EO: Tensor | None,
    hidden_PU: Tensor,
    token_P: Tensor,
    offsets_E: Tensor,
    activation: str,
    glu: bool,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of the first six tensors; what is not needed is empty."""
    needs_x, needs_gate, needs_up, needs_up_bias, needs_down, needs_down_bias = needs
    activate, derivative = FUSED[activation]
    inputs = (x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO)
    grads = [_like(value, needed) for value, needed in zip(inputs, needs, strict=True)]
    grad_x, grad_gate, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
    grad_x.zero_()
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, gate, u = token_P[pairs], gate_P[pairs, None], hidden_PU[pairs]
        half = u.size(1) // 2
        grad = grad_TO.index_select(0, token)
        opened = activate(u[:, :half] if glu else u)
        h = opened * u[:, half:] if glu else opened
        grad_h = grad @ down_EHO[expert].T
        if needs_gate:
            at_gate = torch.linalg.vecdot(grad_h, h)
            grad_gate[pairs] = at_gate if down_bias_EO is None else at_gate.addmv_(grad, down_bias_EO[expert])
        grad.mul_(gate)
        if needs_down:
            torch.mm(h.T, grad, out=grad_down[expert])
        if needs_down_bias:
            torch.sum(grad, dim=0, out=grad_down_bias[expert])
        if not (needs_x or needs_up or needs_up_bias):
            continue
        grad_h.mul_(gate)
        if glu:
            grad_u = torch.cat([derivative(grad_h * u[:, half:], u[:, :half]), grad_h * opened], dim=1)
        else:
            grad_u = derivative(grad_h, u)
        if needs_up:
            torch.mm(x_TI.index_select(0, token).T, grad_u, out=grad_up[expert])
        if needs_up_bias:
            torch.sum(grad_u, dim=0, out=grad_up_bias[expert])
        if needs_x:
            grad_x.index_add_(0, token, grad_u @ up_EIU[expert].T)
    return grads


@_routed_mlp_backward.register_fake
def _(grad_TO: Tensor, *inputs: Any) -> list[Tensor]:
    return [_like(value, needed) for value, needed in zip(inputs[:6], inputs[-1], strict=True)]


def _keep_routed_mlp(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, ctx.activation, ctx.glu = inputs
    ctx.save_for_backward(*tensors[:6], output[1], *tensors[6:])
    ctx.set_materialize_grads(False)


def _routed_mlp_gradients(ctx: Any, grad_TO: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_TO is None:
        return (None,) * 10
    needs = list(ctx.needs_input_grad[:6])
    found = torch.ops.gmoe.routed_mlp_backward(grad_TO, *ctx.saved_tensors, ctx.activation, ctx.glu, needs)
    return *_wanted(found, needs), None, None, None, None


_routed_mlp.register_autograd(_routed_mlp_gradients, setup_context=_keep_routed_mlp)
