"""What a network's forward pass does between its stages, as modules of its own.

A head repeats the later stages of a network. Calls of functions between them, such as an activation
or a change of shape, are no submodules that it could copy. They are read from a symbolic trace.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from mclfast._base.modules import modes_kept


class Glue(nn.Module):
    """Calls without parameters between two stages, in the forms for training and evaluation.

    Args:
        training_form: what runs in training mode.
        evaluation_form: what runs in evaluation mode.
    """

    def __init__(self, training_form: fx.GraphModule, evaluation_form: fx.GraphModule) -> None:
        super().__init__()
        self.training_form, self.evaluation_form = training_form, evaluation_form

    @property
    def depends_on_mode(self) -> bool:
        """Whether training is another thing than evaluation here."""
        # A submodule, such as dropout, may heed it by itself.
        return any(True for _ in self.training_form.children()) or (
            self.training_form.code != self.evaluation_form.code
        )

    def forward(self, x: Any) -> Any:
        """Output of one stage -> input of the next one."""
        return self.training_form(x) if self.training else self.evaluation_form(x)


class _Tracer(fx.Tracer):
    """Looks into the modules that hold the named ones, and into no others."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._opened = {name.rsplit(".", i)[0] for name in names for i in range(1, 1 + 32)}
        self._opened -= set(names)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module is one step of the trace."""
        return module_qualified_name not in self._opened


def glue_between(module: nn.Module, names: Sequence[str]) -> dict[str, Glue]:
    """The calls between submodules that run one after the other.

    Args:
        module: network whose forward pass runs the named submodules.
        names: dotted names in the order they run.

    Returns:
        The glue before each named submodule that has some, by its name. A submodule is absent if it
        takes the output of the one before as it is, if its input is made of something else too, of
        parameters for example, or if the forward pass cannot be traced.
    """
    forms = []
    for training in (True, False):
        try:
            with modes_kept(module):
                # The flag alone: a module's own ``train()`` may do more.
                for part in module.modules():
                    part.training = training
                graph = _Tracer(names).trace(module)
        # The trace runs the network's own code on stand-ins, which may raise anything.
        except Exception:
            return {}
        forms.append(
            {
                after: _part(module, graph, before, after)
                for before, after in zip(names[:-1], names[1:], strict=True)
            }
        )
    found = {}
    for name in names[1:]:
        first, second = (form[name] for form in forms)
        if first is not None and second is not None:
            found[name] = Glue(first, second)
    return found


def _part(module: nn.Module, graph: fx.Graph, before: str, after: str) -> fx.GraphModule | None:
    """The calls from the output of one module to the input of another; None for none such."""
    calls = [[n for n in graph.nodes if n.target == name] for name in (before, after)]
    if any(len(found) != 1 or found[0].op != "call_module" for found in calls):
        return None
    (source,), (target,) = calls
    if len(target.args) != 1 or target.kwargs or not isinstance(target.args[0], fx.Node):
        return None
    wanted: list[fx.Node] = []
    open_nodes = [target.args[0]]
    while open_nodes:
        node = open_nodes.pop()
        if node is source or node in wanted:
            continue
        if node.op not in ("call_function", "call_method", "call_module"):
            return None
        if node.op == "call_module" and _has_state(module.get_submodule(str(node.target))):
            return None
        wanted.append(node)
        open_nodes += node.all_input_nodes
    part = fx.Graph()
    places: dict[fx.Node, fx.Node] = {source: part.placeholder("x")}
    modules = {}
    for node in graph.nodes:
        if node not in wanted:
            continue
        # A head takes the first tensor of an output by itself.
        if node.target is operator.getitem and node.args == (source, 0):
            places[node] = places[source]
            continue
        if node.op == "call_module":
            modules[str(node.target)] = copy.deepcopy(module.get_submodule(str(node.target)))
        places[node] = part.node_copy(node, lambda n: places[n])
    if len(set(places.values())) == 1:
        return None
    part.output(places[target.args[0]])
    return fx.GraphModule(modules, part)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())
