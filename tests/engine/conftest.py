"""These tests run in an environment of their own: ``make test-engine``."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("vllm_omni") else ["test_*.py"]
