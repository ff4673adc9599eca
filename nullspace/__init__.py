"""Null-space DreamBooth: a LoRA that leaves what a model knows as it was.

What the scripts that train, build and audit are made of, and `NullSpace` for a training loop of one's own.
"""

__all__ = ["NullSpace"]


def __getattr__(name):
    if name in __all__:  # takes seconds to import, which flags, help and errors do without
        from nullspace.null_space import NullSpace

        return NullSpace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
