"""torchvision as the index has it is made for CUDA, and beside torch for a CPU its library of operations does not load.

Then the two that it looks up when it is imported are declared just before that; run at the start of every process.
"""

import importlib.machinery
import sys
from pathlib import Path


def _loads(package):
    """Whether torchvision's own library can be loaded, which declares all its operations; it is then."""
    import torch

    try:
        for library in Path(package.submodule_search_locations[0]).glob("_C*.so"):
            torch.ops.load_library(library)
            return True
    except OSError:
        pass
    return False


class _Before:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        package = importlib.machinery.PathFinder.find_spec(name)
        if package is None or _loads(package):
            return
        import torch

        library = torch.library.Library("torchvision", "FRAGMENT")
        for operation in ("nms", "qnms"):
            library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


_kept = []
sys.meta_path.insert(0, _Before())
