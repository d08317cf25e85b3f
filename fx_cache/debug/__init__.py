"""Seeing what the backend found and did: explanations, dumps, reports."""
