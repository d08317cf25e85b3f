"""What is in a captured graph: stacks, blocks, streams, the roles of its inputs, the spans to cache. Reads only."""
