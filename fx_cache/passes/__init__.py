"""One rewrite a file, and the order in which they run.

Every pass is a function ``(gm, context) -> int`` that changes `gm` in place and returns how many rewrites it made.
Its docstring shows the graph before and after, what it requires of the passes before it, and what it ensures.
"""

from fx_cache.passes.align_layouts import align_layouts
from fx_cache.passes.divide_contexts import divide_contexts
from fx_cache.passes.gather_weights import gather_weights
from fx_cache.passes.hoist_invariants import hoist_invariants
from fx_cache.passes.hoist_side_values import hoist_side_values
from fx_cache.passes.insert_conditionals import insert_conditionals
from fx_cache.passes.insert_probes import insert_probes
from fx_cache.passes.mark_regions import mark_regions
from fx_cache.passes.name_inputs import name_inputs
from fx_cache.passes.outline_blocks import outline_blocks
from fx_cache.passes.outline_glue import outline_glue
from fx_cache.passes.protect_streams import protect_streams
from fx_cache.passes.runner import Pass
from fx_cache.passes.separate_sequences import separate_sequences
from fx_cache.passes.sink_into_spans import sink_into_spans

PIPELINE: tuple[Pass, ...] = (
    name_inputs,
    separate_sequences,
    divide_contexts,
    mark_regions,
    gather_weights,
    align_layouts,
    hoist_side_values,
    sink_into_spans,
    protect_streams,
    insert_probes,
    hoist_invariants,
    outline_blocks,
    insert_conditionals,
    outline_glue,
)
