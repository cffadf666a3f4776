"""Heads of transformers models: the backbone runs, the logits never exist.

A model's own forward is called with the product of its output layer taken out. What reaches that product are the
hidden states, the weight and the bias as the layer has them there and then, whatever wraps it (hooks that load it,
adapters that change it); what goes on in its place is a few rows of probes, numbers of known size, and what the forward
makes of those is what it makes of any logit. Scale and softcap are read off that, so no list of architectures is
needed, and a forward that does anything else to its logits is found out on the call in which it does. Wrappers (PEFT,
DDP, FSDP, accelerate) see an ordinary call.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tip_kernels._checks import FLOATS, expect, refuse
from tip_kernels.distillation.distill import distill
from tip_kernels.distillation.options import Execution, Plan
from tip_kernels.learn.divergences import ReverseKL
from tip_kernels.select.rule import Kept, SoftOr
from tip_kernels.sources.pair import Head
from tip_kernels.sources.topk import TopK
from tip_kernels.stats import LABEL_FIELDS, TokenStats

IGNORE = -100  # no label, as in transformers
TOLERANCE = 1e-5  # relative: what float32 in a model's forward may round
NOT_INPUTS = ("labels", "completion_mask")  # entries of a batch that are not the model's


class DistilledBatch(NamedTuple):
    """What distill_batch returns.

    Attributes:
        loss: () fp32.
        stats: What was measured of each row.
        kept: The rows that were learned from.
        plan: How it was done.
        router_loss: () of the student's experts, part of loss; None where its forward returns none.
    """

    loss: Tensor
    stats: TokenStats
    kept: Kept
    plan: Plan
    router_loss: Tensor | None


def head_of(
    model: nn.Module, *, vocab_size: int | None = None, logits_to_keep: int | slice | Tensor = 0, **inputs: Any
) -> Head:
    """The hidden states of a causal language model and its output layer, without its logits.

        softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) = model(**inputs).logits

    Gradients flow through the Head to the whole model. Where autocast is active inside the model's forward alone, the
    head's products are taken in its weight's dtype. Does not synchronise.

    Args:
        model: A transformers model with a linear output layer, perhaps wrapped by PEFT, DDP, FSDP or accelerate. Mode,
            autocast, gradient checkpointing and tied embeddings are as they are found.
        vocab_size: Use the first vocab_size tokens alone, where padding differs between models.
        logits_to_keep: Positions of the Head: the last n (0 is all), a slice, or an int64 tensor (n,).
        **inputs: What model.forward takes (input_ids, attention_mask, position_ids, ...), without labels.

    Returns:
        A Head with hidden (B, T, H); row t predicts token t + 1.

    Raises:
        ValueError: With the reason where the model's logits are not the formula's: several output layers, adapters
            beside it (unless disabled or merged), quantised weights of it, a learnable scale, tokens that are masked;
            for a weight that nothing can be learned into, since it is there only while its layer runs; and for a model
            that is compiled as a whole.
    """
    head, router = read(model, model, vocab_size, logits_to_keep, inputs)
    if router is not None and torch.is_grad_enabled():
        warnings.warn(
            "tip_kernels.head_of: the model's forward has an auxiliary loss (aux_loss) that is no part of a Head; "
            "distill_batch adds it",
            RuntimeWarning,
            stacklevel=2,
        )
    return head


def read(
    model: nn.Module,
    run: Callable[..., Any],
    vocab_size: int | None,
    logits_to_keep: int | slice | Tensor,
    inputs: dict[str, Any],
) -> tuple[Head, Tensor | None]:
    """The Head of a forward, and the auxiliary loss () that comes with it, times the model's own coefficient.

    run  what is called: the model, or its forward where its hooks have run already
    """
    expect(isinstance(model, nn.Module), "model", "a transformers causal language model", model)
    if inputs.get("labels") is not None:
        raise ValueError("labels: expected none, since head_of takes no loss: tip_kernels.distill does, got some")
    plain = _unwrapped(model)
    kind = type(plain).__name__
    output = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    if not isinstance(output, nn.Module):
        refuse("model", f"a model with get_output_embeddings(), which {kind} has not", output)
    _warn_of_unread(plain, inputs)
    sharded = _is_sharded(model)
    traced = sharded or bool(getattr(model, "find_unused_parameters", False))
    with _taken_out(output, kind, traced) as calls:
        trouble, out = None, None
        try:
            out = _without_cache(run, inputs)
        except (RuntimeError, IndexError, ValueError) as error:
            if not calls or isinstance(error, torch.OutOfMemoryError):
                raise  # the backbone's own
            trouble = error
    if len(calls) != 1:
        raise ValueError(
            f"model: expected a forward that calls one linear output layer once, got {_found(kind, calls, output)}"
        )
    if trouble is not None:
        raise _more_than_the_formula(kind, str(trouble).partition("\n")[0]) from trouble
    (call,) = calls
    logits = getattr(out, "logits", None)
    scale, softcap = _transform(kind, logits, call)
    weight, bias = _lasting(call, kind)
    hidden = call.hidden
    if sharded and hidden.requires_grad:
        hidden = _Tied.apply(hidden, logits)
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    expect(hidden.dim() == 3, "model", f"a {kind} whose output layer reads (B, T, H)", hidden)
    head = Head(_positions(hidden, logits_to_keep), weight, bias, scale=scale, softcap=softcap, vocab_size=vocab_size)
    return head, _router_loss(out, plain)


def _found(kind: str, calls: list[_Call], output: nn.Module) -> str:
    """What a forward called in place of one linear layer, in words."""
    layers = ", ".join("a product" if call.layer is None else type(call.layer).__name__ for call in calls) or "none"
    adapted = any(hasattr(module, "active_adapters") for module in output.modules())  # PEFT's layers
    return f"{kind} with {layers}" + (": an adapter on it, to be merged or disabled" if adapted else "")


def _router_loss(out: Any, plain: Any) -> Tensor | None:
    """The auxiliary loss that a forward returned, weighed as the model's own loss weighs it."""
    loss = getattr(out, "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    weight = getattr(plain, "router_aux_loss_coef", None)
    if weight is None:
        weight = getattr(plain.config.get_text_config(), "router_aux_loss_coef", None)
    if weight is None:
        kind = type(plain).__name__
        raise ValueError(
            f"model: expected router_aux_loss_coef beside the aux_loss that {kind} returns, got none: "
            "output_router_logits=False leaves it out"
        )
    return weight * loss


def _warn_of_unread(plain: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Warns of tensors, such as images, that a forward takes without a word and does not read."""
    known = inspect.signature(plain.forward).parameters
    for name, value in inputs.items():
        if name not in known and isinstance(value, Tensor) and value.is_floating_point():
            text = f"tip_kernels: {type(plain).__name__} has no input {name!r}, which it leaves unread"
            warnings.warn(text, RuntimeWarning, stacklevel=4)


def _without_cache(run: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """What the forward returns; it keeps no keys and values unless `inputs` say so, where it knows that wish."""
    try:
        return run(**({"use_cache": False} | inputs))
    except TypeError as error:
        if "use_cache" in inputs or "use_cache" not in str(error):
            raise
    return run(**inputs)


def distill_batch(
    student: nn.Module,
    teacher: nn.Module | Head | TopK | Tensor,
    batch: Mapping[str, Any],
    *,
    vocab_size: int | None = None,
    num_items_in_batch: float | Tensor | None = None,
    **options: Any,
) -> DistilledBatch:
    """tip_kernels.distill on a batch as transformers' data collators make it; the loss of one forward of each model.

    A token is a row where it and the token before it are attended to: no row predicts from padding. Synchronises once
    on a GPU, to leave masked rows out of every product.

    Args:
        student: A model as head_of takes it.
        teacher: Another one, run without gradients in the mode it is in; or a source of rows (B, T - 1); or a TopK of
            rows (B, T), as from_prompt_logprobs makes it, of which the last predicts nothing here.
        batch: input_ids (B, T) and what else the models' forwards take; labels (B, T), -100 where nothing is learned,
            or completion_mask (B, T), 1 on the tokens to learn; with both, both must allow a token.
        vocab_size: Slices both models' vocabularies, where their padding differs.
        num_items_in_batch: As Trainer.compute_loss gets it: the tokens with a label in all micro-batches of the step.
            The loss is then the mean over kept tokens times this batch's share of those tokens.
        **options: Of tip_kernels.distill: select, divergence, temperature, ...; its rows are (B, T - 1), row t
            predicting token t + 1; labels are made here, and a row_mask (B, T - 1), as adakd hands one on, narrows
            what the batch says.

    Returns:
        What tip_kernels.distill returns, and router_loss: the loss of a mixture of experts that the student's forward
        returns with output_router_logits (aux_loss) times the model's own coefficient, which is in loss.

    Raises:
        ValueError: Naming the argument.
    """
    mask, labels = _rows(batch, options.pop("row_mask", None))
    inputs = {name: value for name, value in batch.items() if name not in NOT_INPUTS}
    rows, router = _read_as("student", student, mask, vocab_size, inputs)
    if isinstance(teacher, nn.Module):
        with torch.no_grad():
            teacher, _ = _read_as("teacher", teacher, mask, vocab_size, inputs)
    elif isinstance(teacher, TopK):
        teacher = _without_last(teacher, mask.shape)
    options |= _labels(options, mask, labels, batch)
    execution = options.pop("execution", Execution())
    if execution.backward and isinstance(student, nn.parallel.DistributedDataParallel):
        raise ValueError("backward: expected False with DDP, which has to see every gradient, got True")
    share = 1.0
    if num_items_in_batch is not None:
        expect(options.get("normalizer", "kept") == "kept", "normalizer", "'kept' beside num_items_in_batch", options)
        share = (mask.sum() / num_items_in_batch).float()
        execution = replace(execution, grad_scale=share * execution.grad_scale) if execution.backward else execution
    if router is not None and execution.backward:
        weight = torch.as_tensor(execution.grad_scale, device=router.device)
        rows = replace(rows, hidden=_BackwardTo.apply(rows.hidden, router * weight))
    out = distill(rows, teacher, row_mask=mask.cpu(), execution=execution, **options)
    if router is None:
        return DistilledBatch(out.loss * share, *out[1:], None)
    loss = out.loss + (router.detach() if execution.backward else router).to(out.loss.device)
    return DistilledBatch(loss * share, *out[1:], router.detach())


def _labels(
    options: Mapping[str, Any], mask: Tensor, labels: Tensor | None, batch: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The labels, for a loss or a rule that reads some."""
    reads = (options.get("divergence") or ReverseKL()).needs | (options.get("select") or SoftOr(0.5)).needs
    if not options.get("ce_weight") and not reads & LABEL_FIELDS:
        return {}
    if labels is None:
        refuse("batch", "labels or input_ids, since the loss reads tokens", tuple(batch))
    return {"labels": torch.where(mask, labels, IGNORE)}


def _read_as(
    name: str, model: nn.Module, mask: Tensor, vocab_size: int | None, inputs: dict[str, Any]
) -> tuple[Head, Tensor | None]:
    """What `read` gives of the rows of a mask (B, T - 1); errors name the argument."""
    try:
        head, router = read(model, model, vocab_size, slice(None, -1), inputs)
    except ValueError as error:
        raise ValueError(renamed(error, name)) from error
    if head.hidden.shape[:2] != mask.shape:
        adapted = " (an adapter of virtual tokens adds some)" if hasattr(model, "active_peft_config") else ""
        refuse(name, f"hidden states of {tuple(mask.shape)} rows, one a token but the last{adapted}", head.hidden)
    return head, router


def renamed(error: ValueError, name: str) -> str:
    """The message of an error about `model` as one about the argument of that name."""
    text = str(error)
    return f"{name}:{text.removeprefix('model:')}" if text.startswith("model:") else text


class _BackwardTo(torch.autograd.Function):
    """Hidden states in whose backward another loss () goes backward, too, by itself."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        return *upstream, torch.ones_like(ctx.like)


def _without_last(teacher: TopK, rows: torch.Size) -> TopK:
    """A teacher of every position, (B, T), without the last, which predicts nothing in the batch."""
    if teacher.ids.shape[:-1] != (rows[0], rows[1] + 1):
        return teacher
    return replace(teacher, ids=teacher.ids[:, :-1], logp=teacher.logp[:, :-1])


def _rows(batch: Mapping[str, Any], narrower: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(B, T - 1) bool, whether a row is learned, and the token that it predicts."""
    labels, completion = batch.get("labels"), batch.get("completion_mask")
    for name in ("labels", "completion_mask", "attention_mask", "input_ids"):
        value = batch.get(name)
        expect(value is None or isinstance(value, Tensor), name, "a tensor (B, T), as a collator makes it", value)
    chosen = [] if labels is None else [labels != IGNORE]
    chosen += [] if completion is None else [completion.bool()]
    expect(bool(chosen), "batch", "labels or completion_mask, (B, T)", tuple(batch))
    mask = chosen[0] & chosen[-1]
    expect(mask.dim() == 2, "batch", "labels and completion_mask of shape (B, T)", mask)
    ids = batch.get("input_ids")
    ok = not isinstance(ids, Tensor) or ids.shape == mask.shape
    expect(ok, "batch", f"labels and completion_mask of input_ids' shape {tuple(getattr(ids, 'shape', ()))}", mask)
    mask, attention = mask[:, 1:], batch.get("attention_mask")
    if attention is not None and attention.dim() == 2:
        mask = mask & attention[:, 1:].bool() & attention[:, :-1].bool()
    if narrower is not None:
        ok = isinstance(narrower, Tensor) and narrower.dtype == torch.bool and narrower.shape == mask.shape
        expect(ok, "row_mask", f"a bool tensor {tuple(mask.shape)}, a row for every token but the first", narrower)
        mask = mask & narrower.to(mask.device)
    tokens = batch.get("input_ids") if labels is None else labels
    return mask, None if tokens is None else tokens[:, 1:]


def _unwrapped(model: Any) -> Any:
    """The model inside DDP, PEFT and the like."""
    while True:
        if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
            raise ValueError(
                "model: expected a model that is not compiled as a whole, since its output layer is taken out of its"
                f" forward: compile its backbone or its layers instead, got {type(model).__name__}"
            )
        if hasattr(model, "get_base_model"):  # PEFT
            model = model.get_base_model()
        elif isinstance(getattr(model, "module", None), nn.Module):
            if getattr(model, "static_graph", False):
                raise ValueError(
                    "model: expected DDP without static_graph, which watches the logits, got static_graph=True"
                )
            model = model.module
        else:
            return model


class _Call(NamedTuple):
    """A product hidden @ weight.T + bias that an output layer was about to take."""

    layer: nn.Linear | None  # whose weight it is
    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    probes: Tensor  # what went on in its place


@contextmanager
def _taken_out(output: nn.Module, kind: str, traced: bool) -> Iterator[list[_Call]]:
    """Inside, the products of `output` are probes; yields what they were to be taken of."""
    calls: list[_Call] = []
    run, own = output.forward, vars(output).get("forward")

    def forward(*args: Any, **named: Any) -> Any:
        for layer in output.modules():
            if hasattr(layer, "_orig_mod") or getattr(layer, "_compiled_call_impl", None) is not None:
                raise ValueError(
                    f"model: expected an output layer that is not compiled, got {type(layer).__name__} in {kind}"
                )
            if isinstance(layer, nn.Linear) and type(layer).forward is not nn.Linear.forward:
                raise _not_plain(kind, layer, layer.weight)
        with _Probing(output, kind, calls, traced):
            return run(*args, **named)

    try:
        output.forward = forward
        yield calls
    finally:
        if own is None:
            del output.forward
        else:
            output.forward = own


class _Probing(TorchFunctionMode):
    """Gives probes in place of every linear product, and notes what it was to be taken of."""

    def __init__(self, output: nn.Module, kind: str, calls: list[_Call], traced: bool) -> None:
        super().__init__()
        self.output, self.kind, self.calls, self.traced = output, kind, calls, traced
        self.grad_enabled = torch.is_grad_enabled()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        named = dict(zip(("input", "weight", "bias"), args, strict=False)) | (kwargs or {})
        hidden, weight, bias = named["input"], named["weight"], named.get("bias")
        layers = [layer for layer in self.output.modules() if isinstance(layer, nn.Linear) and layer.weight is weight]
        layer = layers[0] if layers else None
        plain = type(weight) in (Tensor, nn.Parameter) and weight.dim() == 2 and weight.dtype in FLOATS
        if not plain or torch.is_grad_enabled() != self.grad_enabled:  # inside a Function, gradients of its own
            raise _not_plain(self.kind, layer or self.output, weight)
        probes = _probes(weight.shape[0])
        if self.traced:
            probes = _Attached.apply(probes, hidden, weight, bias)
        self.calls.append(_Call(layer, hidden, weight, bias, probes))
        return probes


def _not_plain(kind: str, layer: nn.Module, weight: Any) -> ValueError:
    what = f"{type(layer).__name__} with {type(weight).__name__} of {weight.dtype} {tuple(weight.shape)}"
    return ValueError(f"model: expected a plain nn.Linear output layer, whole and not quantised, got {what} in {kind}")


def _lasting(call: _Call, kind: str) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a product, as they can still be read and learned into when the forward is over."""
    weight, layer = call.weight, call.layer
    now = weight if layer is None else layer.weight
    if hasattr(now, "full_tensor"):  # FSDP2 has sharded it again: the Head gathers it
        return now, call.bias if layer is None else layer.bias
    reason = None
    if weight.numel() and not weight.untyped_storage().size():
        reason = "shards it again: leave the layer to the root's unit, or use fully_shard"
    elif torch.is_grad_enabled() and weight.requires_grad and weight.is_leaf and now is not weight:
        reason = "offloads it, where no gradient would reach it: load it, freeze it, or run under torch.no_grad()"
    if reason:
        raise ValueError(f"model: expected an output layer whose weight stays, got {kind}, which {reason}")
    return weight, call.bias


def _is_sharded(model: nn.Module) -> bool:
    """Whether FSDP has a hand in it, whose backward begins where the logits would be."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    return any(isinstance(module, (FSDPModule, FullyShardedDataParallel)) for module in model.modules())


class _Attached(torch.autograd.Function):
    """Probes that are in the graph of the hidden states, where DDP looks for the parameters that a step uses."""

    @staticmethod
    def forward(ctx: Any, probes: Tensor, *watched: Tensor | None) -> Tensor:
        return probes.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class _Tied(torch.autograd.Function):
    """Hidden states whose gradient comes by the logits first, with zeros for them: there FSDP begins its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(logits)
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, ...]:
        (logits,) = ctx.saved_tensors
        return *upstream, torch.zeros_like(logits)


_SMALL = 2.0 ** torch.arange(-3, 4, dtype=torch.float64)
_WIDE = 2.0 ** torch.arange(-30, 41, dtype=torch.float64)


def _probes(vocab: int) -> Tensor:
    """(1, R, V) float64 on the CPU: a row of small numbers of both signs, in which what happens to single tokens would
    show, and as many rows as it takes to hold every power of _WIDE and 0."""
    small, wide = torch.cat([_SMALL, -_SMALL]), torch.cat([_WIDE, -_WIDE, torch.zeros(1, dtype=torch.float64)])
    size = math.ceil(wide.numel() / vocab) * vocab
    return torch.cat([_repeated(small, vocab), _repeated(wide, size)]).view(1, -1, vocab)


def _repeated(pattern: Tensor, size: int) -> Tensor:
    return pattern.repeat(math.ceil(size / pattern.numel()))[:size]


def _transform(kind: str, logits: Tensor | None, call: _Call) -> tuple[float, float | None]:
    """Scale and softcap of a forward that made `logits` of the probes."""
    probes = _probes(call.weight.shape[0])
    if not isinstance(logits, Tensor) or logits.shape != probes.shape:
        got = "no logits" if logits is None else f"logits of another shape, {tuple(getattr(logits, 'shape', ()))}"
        raise _more_than_the_formula(kind, got)
    if _reads_parameters(logits, call.probes):
        raise _more_than_the_formula(kind, "a learnable scale or bias after the output layer")
    made = logits.detach().to("cpu", torch.float64)
    wide = made[0, 1:].flatten()[: _WIDE.numel()]  # what became of the powers of two, ascending
    if torch.isclose(wide[-1], 2 * wide[-2], rtol=TOLERANCE, atol=0):
        scale, softcap = wide[_WIDE == 1].item(), None
        expected = scale * probes
    else:
        softcap = wide[-1].item()
        half = (wide / softcap - 0.5).abs().nan_to_num(math.inf).argmin()  # where atanh is well conditioned
        scale = (softcap * torch.atanh(wide[half] / softcap) / _WIDE[half]).item()
        expected = softcap * torch.tanh(scale / softcap * probes) if softcap else torch.full_like(probes, math.nan)
    wrong = ~torch.isclose(made, expected, rtol=TOLERANCE, atol=0)
    if wrong.any() or not 0 < scale < math.inf or not (softcap is None or 0 < softcap < math.inf):
        at = wrong.nonzero()[0] if wrong.any() else torch.tensor([0, 0, 0])
        z, token = tuple(at), int(at[2])
        raise _more_than_the_formula(kind, f"a logit of {probes[z]:.6g} for token {token} becomes {made[z]:.6g}")
    # 12 digits: as the config has them, without the rounding of the way here
    return float(f"{scale:.12g}"), None if softcap is None else float(f"{softcap:.12g}")


def _reads_parameters(logits: Tensor, probes: Tensor) -> bool:
    """Whether a parameter had a part in what became of the probes."""
    nodes, seen = [logits.grad_fn], {probes.grad_fn}
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if hasattr(node, "variable"):
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False


def _more_than_the_formula(kind: str, got: str) -> ValueError:
    form = "softcap * tanh(scale * (hidden W^T + bias) / softcap)"
    return ValueError(f"model: expected logits {form}, got {kind}, whose forward does something else to them: {got}")


def _positions(hidden: Tensor, keep: int | slice | Tensor) -> Tensor:
    """Positions of (B, T, H) as transformers' logits_to_keep means them."""
    if isinstance(keep, slice):
        return hidden[:, keep]
    if isinstance(keep, Tensor):
        expect(keep.dim() == 1 and keep.dtype == torch.int64, "logits_to_keep", "an int64 tensor (n,)", keep)
        return hidden[:, keep]
    ok = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0
    expect(ok, "logits_to_keep", "an int of at least 0, a slice or an int64 tensor (n,)", keep)
    return hidden[:, -keep:] if keep else hidden
