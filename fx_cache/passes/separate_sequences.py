from __future__ import annotations

import operator

from torch import fx

from fx_cache.passes.outline import fake, mark
from fx_cache.passes.runner import RewriteContext
from fx_cache.patterns.graph import is_tensor, is_tensor_sequence, value_of


def separate_sequences(gm: fx.GraphModule, context: RewriteContext) -> int:
    """Takes the elements of every tuple of tensors right where it is made, so that only tensors cross a cut.

    An element of a tensor that the capture took without recording its value (``tolist``) gets one.

    Before::

        chunk = emb.chunk(2);  ...;  shift = chunk[0];  y = cat(chunk)

    After::

        chunk = emb.chunk(2);  shift = chunk[0];  item = chunk[1];  ...;  y = cat((shift, item))

    Requires: nothing.
    Ensures: a tuple of tensors is read only by the ``getitem`` nodes that follow it directly.
    """
    del context
    count = 0
    for node in list(gm.graph.nodes):
        source = node.args[0] if node.target is operator.getitem else None  # None, too, where it was erased meanwhile
        if isinstance(source, fx.Node) and value_of(node) is None and is_tensor(source):
            mark(node, None, fake(lambda whole, node=node: whole[node.args[1]], source))
        if node.op not in ("call_function", "call_method") or not is_tensor_sequence(node):
            continue
        values = value_of(node)
        items: dict[int, fx.Node] = {}
        last = node

        def item(i: int, node: fx.Node = node, items: dict[int, fx.Node] = items) -> fx.Node:
            nonlocal last
            if i not in items:
                with gm.graph.inserting_after(last):
                    items[i] = mark(gm.graph.call_function(operator.getitem, (node, i)), None, value_of(node)[i])
                last = items[i]
            return items[i]

        for user in list(node.users):
            if user in items.values():
                continue
            if user.target is operator.getitem and isinstance(user.args[1], int):
                i = user.args[1] % len(values)
                if i in items:
                    user.replace_all_uses_with(items[i])
                    gm.graph.erase_node(user)
                else:
                    if last.next is not user:
                        last.append(user)
                        count += 1
                    items[i] = last = user
            else:
                for i in range(len(values)):
                    item(i)
                _replace(user, node, tuple(items[i] for i in range(len(values))))
                count += 1
    return count


def _replace(user: fx.Node, node: fx.Node, whole: tuple[fx.Node, ...]) -> None:
    """Lets `user` read a tuple of nodes in place of the node `node`."""
    user.args = fx.map_arg(user.args, lambda a: whole if a is node else a)
    user.kwargs = fx.map_arg(user.kwargs, lambda a: whole if a is node else a)
