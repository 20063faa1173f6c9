"""What would form gradients around the routes: parameters used, changed or replaced elsewhere, refused by name.

Every routed forward is a ``RoutedFunction``, and a trainable parameter may enter a loss through these alone. So the
graph of each loss is walked before its backward pass (0.3 ms for a byte model of four layers, 8 ms for LoRA on 32):
what ends in a parameter elsewhere is a ``functional.linear(x, layer.weight)``, a hook, a fused kernel, or a module that
was unfrozen or put in after the opening.

Left to others: what a module's route is (``route.py``), and coupled examples, which no graph shows (``probe.py``).
"""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from trainer_client.route import RoutedFunction, RoutingUnsupported


def around_routes(loss: Tensor) -> list[Tensor]:
    """The leaves whose gradients ``loss.backward()`` would form outside of every ``RoutedFunction``.

    Of a checkpointed part that is reentrant the graph does not exist yet: what is in there is not seen.
    """
    found: list[Tensor] = []
    seen: set[object] = set()
    waiting: list[object] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        before = node.next_functions  # type: ignore[attr-defined]
        kind = getattr(type(node), "_forward_cls", None)
        if kind is not None and issubclass(kind, RoutedFunction):
            before = before[:1]
        elif not before and isinstance(leaf := getattr(node, "variable", None), Tensor):
            found.append(leaf)
        waiting += [each for each, _ in before]
    return found


def check_parameter(label: str, parameter: Tensor) -> None:
    """A trainable parameter whose gradient is a sum over examples, and nobody's to change before the optimizer has it.

    Raises:
        RoutingUnsupported: it has no values yet, is complex, or has hooks on its gradient.
    """
    if is_lazy(parameter) or parameter.is_meta:
        raise RoutingUnsupported(f"{label} has no values yet")
    if parameter.is_complex():
        raise RoutingUnsupported(f"{label} is complex")
    if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
        raise RoutingUnsupported(f"{label} has a hook on its gradient: what that does is not of chosen examples")


def one_tensor(module_name: str, given: Sequence[object]) -> Tensor:
    """The only argument of a module's call.

    Raises:
        RoutingUnsupported: there are others, or it is no tensor that has one shape.
    """
    if len(given) == 1 and isinstance(given[0], Tensor) and not given[0].is_nested:
        return given[0]
    kinds = ("nested Tensor" if isinstance(each, Tensor) and each.is_nested else type(each).__name__ for each in given)
    raise RoutingUnsupported(f"module {module_name!r} expects one tensor, found ({', '.join(kinds)})")


def check_own(module_name: str, module: nn.Module, held: Mapping[str, nn.Parameter | None]) -> None:
    """What a module computes with is what it held when forwards were replaced, or has no gradient.

    Raises:
        RoutingUnsupported: it is computed from something else, whose gradient would have this module's weights.
    """
    for own_name in {"weight", "bias", *held}:
        used = getattr(module, own_name, None)
        if isinstance(used, Tensor) and used.requires_grad and used is not held.get(own_name):
            raise RoutingUnsupported(f"module {module_name!r}: its {own_name} is none of its own parameters")
