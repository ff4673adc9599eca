"""The commands that `pip install` makes: each runs a script as `python` does, so that flags come before libraries."""

import runpy


def train():
    """`nullspace-train`, which is train_dreambooth_nullspace.py."""
    runpy.run_module("train_dreambooth_nullspace", run_name="__main__")


def build():
    """`nullspace-build`, which is build_nullspace.py."""
    runpy.run_module("build_nullspace", run_name="__main__")


def tools():
    """`nullspace`, which is nullspace_utils.py."""
    runpy.run_module("nullspace_utils", run_name="__main__")
