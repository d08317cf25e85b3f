"""torchvision as the index has it looks for CUDA, and beside torch for a CPU its operations are missing.

Declares the two that it looks up when it is imported, just before that; run at the start of every process.
"""

import sys


class _Before:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operation in ("nms", "qnms"):
                self.library.define(f"{operation}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _kept.append(self.library)


_kept = []
sys.meta_path.insert(0, _Before())
