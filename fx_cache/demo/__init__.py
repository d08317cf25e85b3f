"""Demo assets and sampling code."""
