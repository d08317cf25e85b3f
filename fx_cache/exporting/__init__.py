"""A cached model as a ``torch.export`` program: its state goes in and comes out, and ``torch.cond`` decides."""
