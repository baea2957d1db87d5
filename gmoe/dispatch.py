"""Tokens to experts and back: the one place where tokens move, and the one choice of kernel.

Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out features; U = H, or 2 H before a gate.

A layer calls :func:`routed_linear`, :func:`routed_mlp`, or the halves :func:`dispatch` and :func:`combine` around
:func:`grouped_linear`. The kernels are operators of torch (``torch.ops.gmoe``), into which ``torch.compile`` does not
look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import partial
from operator import methodcaller
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from gmoe._autograd import first_order
from gmoe._checks import check_choice
from gmoe.routing import Routing

Backend: TypeAlias = Literal["auto", "grouped", "padded", "loop"]
Elementwise: TypeAlias = Callable[[Tensor], Tensor]
Derivative: TypeAlias = Callable[[Tensor, Tensor], Tensor]

aten = torch.ops.aten

COUNTING = ContextVar("COUNTING", default=False)
"""Set where FLOPs are counted: layers then do what experts need, not what is quickest, or a dense model of equal FLOPs
would be as wide as the machine makes it."""


def gelu_tanh(u: Tensor) -> Tensor:
    """A function, not a lambda, so that experts can be pickled."""
    return F.gelu(u, approximate="tanh")


FUSED: dict[str, tuple[Elementwise, Derivative]] = {
    "gelu": (F.gelu, aten.gelu_backward),
    "gelu_tanh": (gelu_tanh, partial(aten.gelu_backward, approximate="tanh")),
    "identity": (torch.positive, lambda grad, _: grad),
    "relu": (F.relu, lambda grad, u: aten.threshold_backward(grad, u, 0)),
    "silu": (F.silu, aten.silu_backward),
    "tanh": (torch.tanh, lambda grad, u: aten.tanh_backward(grad, u.tanh())),
}
"""Activations that :func:`routed_mlp` runs expert by expert: the function, and ``(grad of output, input) -> grad``."""

FUSING = frozenset({"auto", "loop"})
"""Backends with which, on a CPU, gather, products and scatter are one step per expert."""


def dispatch(x_TI: Tensor, routing: Routing) -> Tensor:
    """Gather the token of each pair, expert by expert: (P, I)."""
    return x_TI if routing.contiguous else x_TI.index_select(0, routing.token)


def combine(y_PO: Tensor, routing: Routing) -> Tensor:
    r"""Sum the experts' outputs (P, O) over each token's pairs, by weight: (T, O); zero for a token without pairs.

    .. math:: y_t = \sum_{e} w_{te} f_e(x_t)
    """
    weighted_PO = y_PO * routing.weight.to(y_PO.dtype)[:, None]
    if routing.contiguous:
        return weighted_PO
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
    """Apply expert ``e``'s linear layer to the rows ``offsets[e - 1]:offsets[e]``: (P, O).

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
        if kernel == "loop" and type(x_PI) is Tensor and not (x_PI.is_meta or torch.compiler.is_compiling()):
            return _GroupedLinear.apply(x_PI, weight_EIO, bias_EO, offsets_E, kernel)
        return torch.ops.gmoe.grouped_linear(x_PI, weight_EIO, bias_EO, offsets_E, kernel)


def routed_linear(
    parts: Sequence[Tensor], weight_EIO: Tensor, bias_EO: Tensor | None, routing: Routing, backend: Backend = "auto"
) -> Tensor:
    r"""(T, O) :math:`y_t = \sum_e w_{te} (x_t W_e + b_e)`: gather, grouped product and weighted scatter.

    With the loop backend all in one step, one expert after the other, without a (P, I) tensor; and without a (P, O) one
    but where that is narrower, and spares the gates' gradient a product. Neither is needed for the gradients: that of a
    weight is :math:`\bar y_t \cdot (x_t W_e + b_e) = (\bar y_t W_e^\top) \cdot x_t + \bar y_t \cdot b_e`. Follows
    autocast. Can be differentiated once.

    Args:
        parts: x in parts, whose widths add up to I: with the loop backend the first is not joined to the others.
        weight_EIO: stacked weights.
        bias_EO: stacked biases, or ``None``.
        routing: who goes where.
        backend: see :func:`grouped_linear`.
    """
    device = parts[0].device.type
    of_one_type = all(part.dtype == weight_EIO.dtype for part in parts) and weight_EIO.dtype != torch.bfloat16
    if weight_EIO.size(0) == 1 and routing.token.numel() == routing.num_tokens:  # of all of them: a linear layer
        weights = weight_EIO[0].split([part.size(1) for part in parts])
        rows = [part.to(weight_EIO.dtype) for part in parts]
        y_TO = rows[0] @ weights[0] if bias_EO is None else torch.addmm(bias_EO[0], rows[0], weights[0])
        for row, weight_IO in zip(rows[1:], weights[1:], strict=True):
            y_TO = torch.addmm(y_TO, row, weight_IO)
        return y_TO * routing.weight.to(y_TO.dtype)[:, None]
    if routing.contiguous and of_one_type and not torch.is_autocast_enabled(device) and backend in FUSING:
        # slices, with nothing to fuse
        weights = [weight_EIO] if len(parts) == 1 else weight_EIO.split([part.size(1) for part in parts], dim=1)
        y_TO = grouped_linear(parts[0], weights[0], bias_EO, routing.offsets, backend)
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            y_TO = y_TO + grouped_linear(part, weight, None, routing.offsets, backend)
        return combine(y_TO, routing)
    if backend not in FUSING or device == "cuda":
        x_TI = parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=-1)
        return combine(grouped_linear(dispatch(x_TI, routing), weight_EIO, bias_EO, routing.offsets, backend), routing)
    if torch.is_autocast_enabled(device) and parts[0].dtype != torch.float64:
        weight_EIO = weight_EIO.to(torch.get_autocast_dtype(device))
    dtype = weight_EIO.dtype
    x_TI, *other = map(methodcaller("to", dtype), parts)
    bias_EO = None if bias_EO is None else bias_EO.to(dtype)
    token_P, offsets_E, gate_P = routing.token, routing.offsets, routing.weight.to(dtype)
    if dtype == torch.bfloat16 and device == "cpu":
        token_P, offsets_E, gate_P = rounded(token_P, offsets_E, gate_P)
    z_TJ = torch.cat(other, dim=-1) if len(other) > 1 else next(iter(other), None)
    keep = gate_P.requires_grad and torch.is_grad_enabled() and weight_EIO.size(2) < weight_EIO.size(1)
    with torch.autocast(device, enabled=False):
        out_TO, _ = torch.ops.gmoe.routed_linear(
            x_TI, z_TJ, gate_P, weight_EIO, bias_EO, token_P, offsets_E, routing.num_tokens, keep
        )
    return out_TO


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
    load_E = _load(offsets_E)
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


KERNELS: dict[str, Callable[..., Any]] = {}
"""What runs inside the operators, by name."""


def _operator(
    name: str, arguments: str, results: str, fake: Callable[..., Any], num_grads: int
) -> Callable[[Callable[..., Any], Callable[..., list[Tensor]]], None]:
    """Register a kernel, and the kernel of its gradients, as operators of torch.

    Args:
        name: ``torch.ops.gmoe.NAME``, and ``NAME_backward``.
        arguments: by torch's schema: what is differentiable, then other tensors, then the rest.
        results: by torch's schema; what comes second is kept for the backward pass.
        fake: gives empty results of the right shapes.
        num_grads: how many of the arguments are differentiable.
    """
    names = arguments.split(", ")
    num_tensors = sum(argument.startswith("Tensor") for argument in names)
    kept = ["Tensor kept"] if "," in results else []
    of_backward = ["Tensor grad", *names[:num_tensors], *kept, *names[num_tensors:], "bool[] needs"]

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs[:num_tensors], *(output[1:] if kept else ()))
        ctx.rest = inputs[num_tensors:]
        ctx.set_materialize_grads(False)  # of what is kept, which would be zeros of its size

    def differentiate(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:  # no gradient reaches the output
            return (None,) * len(names)
        needs = list(ctx.needs_input_grad[:num_grads])
        found = getattr(torch.ops.gmoe, f"{name}_backward")(grad, *ctx.saved_tensors, *ctx.rest, needs)
        wanted = [value if needed else None for value, needed in zip(found, needs, strict=True)]
        return *wanted, *(None,) * (len(names) - num_grads)

    def register(kernel: Callable[..., Any], backward: Callable[..., list[Tensor]]) -> None:
        schema = f"({arguments}) -> {results}"
        forward = torch.library.custom_op(f"gmoe::{name}", kernel, mutates_args=(), schema=schema)
        forward.register_fake(fake)
        forward.register_autograd(differentiate, setup_context=keep)
        schema = f"({', '.join(of_backward)}) -> Tensor[]"
        reverse = torch.library.custom_op(f"gmoe::{name}_backward", backward, mutates_args=(), schema=schema)
        KERNELS.update({name: kernel, f"{name}_backward": backward})
        reverse.register_fake(lambda *inputs: _gradients_of(inputs[1 : num_grads + 1], inputs[-1]))

    return register


def _gradients_of(inputs: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """An empty gradient for each input, without elements where it is not needed."""
    return [
        torch.empty_like(value) if needed and value is not None else torch.empty(0)
        for value, needed in zip(inputs, needs, strict=True)
    ]


# rows sorted by expert ------------------------------------------------------------------------------------------------


def _grouped_linear(*inputs: Any) -> Tensor:
    x_PI, weight_EIO, bias_EO, offsets_E, kernel = inputs
    if kernel == "loop":
        y_PO: Tensor = x_PI.new_empty(x_PI.size(0), weight_EIO.size(2))
        ends = offsets_E.tolist()  # one host sync
        for expert, rows in enumerate(map(slice, [0, *ends], ends)):
            if bias_EO is None:
                torch.mm(x_PI[rows], weight_EIO[expert], out=y_PO[rows])
            else:
                torch.addmm(bias_EO[expert], x_PI[rows], weight_EIO[expert], out=y_PO[rows])
        return y_PO
    y_PO = (_padded_mm if kernel == "padded" else _grouped_mm)(x_PI, weight_EIO, offsets_E)
    return y_PO if bias_EO is None else y_PO.add_(bias_EO.index_select(0, _owner(offsets_E, x_PI.size(0))))


def _grouped_linear_backward(*inputs: Any) -> list[Tensor]:
    grad_PO, x_PI, weight_EIO, bias_EO, offsets_E, kernel, needs = inputs
    needs_x, needs_weight, needs_bias = needs
    grad_x, grad_weight, grad_bias = _gradients_of((x_PI, weight_EIO, bias_EO), needs)
    grad_PO = grad_PO.contiguous()
    if kernel != "loop":
        multiply, outer = (_padded_mm, _padded_outer) if kernel == "padded" else (_grouped_mm, _grouped_outer)
        if needs_x:
            grad_x = multiply(grad_PO, weight_EIO.transpose(1, 2), offsets_E)
        if needs_weight:
            grad_weight = outer(x_PI, grad_PO, offsets_E)
        if needs_bias:
            grad_bias.zero_().index_add_(0, _owner(offsets_E, x_PI.size(0)), grad_PO)
        return [grad_x, grad_weight, grad_bias]
    ends = offsets_E.tolist()
    for expert, rows in enumerate(map(slice, [0, *ends], ends)):
        if needs_x:
            torch.mm(grad_PO[rows], weight_EIO[expert].T, out=grad_x[rows])
        if needs_weight:  # zero where the expert has no rows
            torch.mm(x_PI[rows].T, grad_PO[rows], out=grad_weight[expert])
        if needs_bias:
            torch.sum(grad_PO[rows], dim=0, out=grad_bias[expert])
    return [grad_x, grad_weight, grad_bias]


_operator(
    "grouped_linear",
    "Tensor x, Tensor weight, Tensor? bias, Tensor offsets, str kernel",
    "Tensor",
    lambda x, weight, *_: x.new_empty(x.size(0), weight.size(2)),
    num_grads=3,
)(_grouped_linear, _grouped_linear_backward)


class _GroupedLinear(torch.autograd.Function):
    """The loop without torch's dispatcher, which takes longer than the products of a small graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        ctx.save_for_backward(*inputs[:4])
        return _grouped_linear(*inputs)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_PO: Tensor) -> Any:
        needs = ctx.needs_input_grad[:3]
        found = _grouped_linear_backward(grad_PO, *ctx.saved_tensors, "loop", needs)
        return *(value if needed else None for value, needed in zip(found, needs, strict=True)), None, None


def _load(offsets_E: Tensor) -> Tensor:
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()


def _owner(offsets_E: Tensor, rows: int) -> Tensor:
    """(P,) the expert of each row."""
    experts = torch.arange(offsets_E.numel(), device=offsets_E.device)
    return experts.repeat_interleave(_load(offsets_E), output_size=rows)


def _padded(x_PI: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor]:
    """(E, C, I) the rows of each expert, padded to the largest load, and (P,) where each row lies in that."""
    load_E = _load(offsets_E)
    num_experts, capacity = load_E.numel(), int(load_E.max()) if x_PI.size(0) else 0
    expert_P = _owner(offsets_E, x_PI.size(0))
    slot_P = torch.arange(x_PI.size(0), device=x_PI.device) - (offsets_E.long() - load_E)[expert_P]
    slot_P = expert_P * capacity + slot_P
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
    step = 16 // x_PI.element_size()
    missing_in, missing_out = -weight_EIO.size(1) % step, -weight_EIO.size(2) % step
    aligned_EIO = F.pad(weight_EIO, (0, missing_out, 0, missing_in)) if missing_in or missing_out else weight_EIO
    return F.grouped_mm(_aligned(x_PI), aligned_EIO, offs=offsets_E)[:, : weight_EIO.size(2)].clone()


def _grouped_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    if x_PI.size(0) == 0:
        return x_PI.new_zeros(offsets_E.numel(), x_PI.size(1), grad_PO.size(1))
    full_EIO = F.grouped_mm(_aligned(x_PI).T, _aligned(grad_PO), offs=offsets_E)[:, : x_PI.size(1), : grad_PO.size(1)]
    # whatever the kernel leaves in an empty one
    return torch.where((_load(offsets_E) > 0)[:, None, None], full_EIO, 0.0)


def _aligned(x_PI: Tensor) -> Tensor:
    """Rows that start at multiples of 16 bytes, zeros behind the true width."""
    missing = -x_PI.size(1) % (16 // x_PI.element_size())
    return F.pad(x_PI, (0, missing)) if missing else x_PI.contiguous()


# from tokens to tokens, one expert after the other --------------------------------------------------------------------


def _routed_linear(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(T, O) the output, and (P, O) what each pair adds before it is weighted, or nothing."""
    x_TI, z_TJ, gate_P, weight_EIO, bias_EO, token_P, offsets_E, num_tokens, keep = inputs
    width = x_TI.size(1)
    out_TO: Tensor = gate_P.new_zeros(num_tokens, weight_EIO.size(2))
    kept_PO = gate_P.new_empty(len(token_P) if keep else 0, weight_EIO.size(2))
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, weight_IO = token_P[pairs], weight_EIO[expert]
        x = x_TI.index_select(0, token)
        y = x @ weight_IO[:width] if bias_EO is None else torch.addmm(bias_EO[expert], x, weight_IO[:width])
        if z_TJ is not None:
            y.addmm_(z_TJ.index_select(0, token), weight_IO[width:])
        if keep:
            kept_PO[pairs] = y
        out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
    return out_TO, kept_PO


def _routed_linear_backward(*inputs: Any) -> list[Tensor]:
    grad_TO, x_TI, z_TJ, gate_P, weight_EIO, bias_EO, token_P, offsets_E, kept_PO, _, kept, needs = inputs
    needs_x, needs_z, needs_gate, needs_weight, needs_bias = needs
    grads = _gradients_of((x_TI, z_TJ, gate_P, weight_EIO, bias_EO), needs)
    grad_gate, grad_weight, grad_bias = grads[2:]
    parts = [(x_TI, grads[0].zero_(), needs_x, slice(0, x_TI.size(1)))]
    if z_TJ is not None:
        parts.append((z_TJ, grads[1].zero_(), needs_z, slice(x_TI.size(1), None)))
    ends = offsets_E.tolist()
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, gate = token_P[pairs], gate_P[pairs, None]
        grad = grad_TO.index_select(0, token)
        scaled = grad * gate
        if needs_gate and kept:
            torch.linalg.vecdot(grad, kept_PO[pairs], out=grad_gate[pairs])
        elif needs_gate:
            at_gate = 0.0 if bias_EO is None else torch.mv(grad, bias_EO[expert])
        if needs_bias:
            torch.sum(scaled, dim=0, out=grad_bias[expert])
        for part, grad_part, needs_part, columns in parts:
            x = part.index_select(0, token)
            if needs_weight:
                torch.mm(x.T, scaled, out=grad_weight[expert, columns])
            needs_product = needs_gate and not kept
            if needs_product or needs_part:
                back = grad @ weight_EIO[expert, columns].T
            if needs_product:
                at_gate = at_gate + x.mul_(back).sum(dim=1)
            if needs_part:
                grad_part.index_add_(0, token, back.mul_(gate))
        if needs_gate and not kept:
            grad_gate[pairs] = at_gate
    return grads


_operator(
    "routed_linear",
    "Tensor x, Tensor? z, Tensor gate, Tensor weight, Tensor? bias, Tensor token, Tensor offsets, SymInt num_tokens, "
    "bool keep",
    "(Tensor, Tensor)",
    lambda *inputs: (
        inputs[2].new_empty(inputs[-2], inputs[3].size(2)),
        inputs[2].new_empty(inputs[5].size(0) if inputs[-1] else 0, inputs[3].size(2)),
    ),
    num_grads=5,
)(_routed_linear, _routed_linear_backward)


def _routed_mlp(*inputs: Any) -> tuple[Tensor, Tensor]:
    """(T, O) the output, and (P, U) the hidden layer before its activation."""
    x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO, token_P, offsets_E, activation, glu = inputs
    activate, half = FUSED[activation][0], up_EIU.size(2) // 2
    out_TO = gate_P.new_zeros(x_TI.size(0), down_EHO.size(2))
    hidden_PU = x_TI.new_empty(token_P.size(0), up_EIU.size(2))
    ends = offsets_E.tolist()  # one host sync
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, u = token_P[pairs], hidden_PU[pairs]
        x = x_TI.index_select(0, token)
        if up_bias_EU is None:
            torch.mm(x, up_EIU[expert], out=u)
        else:
            torch.addmm(up_bias_EU[expert], x, up_EIU[expert], out=u)
        h = activate(u[:, :half]) * u[:, half:] if glu else activate(u)
        y = h @ down_EHO[expert] if down_bias_EO is None else torch.addmm(down_bias_EO[expert], h, down_EHO[expert])
        out_TO.index_add_(0, token, y.mul_(gate_P[pairs, None]))
    return out_TO, hidden_PU


def _routed_mlp_backward(*inputs: Any) -> list[Tensor]:
    grad_TO, x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO, token_P, offsets_E, hidden_PU, *rest = inputs
    activation, glu, needs = rest
    needs_x, needs_gate, needs_up, needs_up_bias, needs_down, needs_down_bias = needs
    activate, derivative = FUSED[activation]
    grads = _gradients_of((x_TI, gate_P, up_EIU, up_bias_EU, down_EHO, down_bias_EO), needs)
    grad_x, grad_gate, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
    grad_x.zero_()
    half = up_EIU.size(2) // 2
    ends = offsets_E.tolist()
    for expert, pairs in enumerate(map(slice, [0, *ends], ends)):
        token, gate, u = token_P[pairs], gate_P[pairs, None], hidden_PU[pairs]
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


_operator(
    "routed_mlp",
    "Tensor x, Tensor gate, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, Tensor token, Tensor offsets, "
    "str activation, bool glu",
    "(Tensor, Tensor)",
    lambda x, gate, up, *rest: (gate.new_empty(x.size(0), rest[1].size(2)), x.new_empty(rest[3].size(0), up.size(2))),
    num_grads=6,
)(_routed_mlp, _routed_mlp_backward)
