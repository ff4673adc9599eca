"""Flags before libraries: torch, diffusers and their like take seconds to import, and help needs none of them."""

import importlib.machinery
import os
import runpy
import sys
from pathlib import Path
from types import ModuleType


OPTIONAL = {
    "bitsandbytes": "use_8bit_adam"
}  # package: the flag that needs it; peft imports it wherever it is installed


def parse_first(script):
    """Run a script's `parse_args` before the script imports its libraries: call it above them, in `__main__` alone.

    Help is shown and wrong flags are refused at once, without any library. What was parsed is dropped, for the script
    parses it again when it is whole; packages that no flag asks for are hidden from the libraries that come.
    """
    before = set(sys.modules)
    finder = _Placeholders(Path(script).resolve().parent)
    sys.meta_path.insert(0, finder)
    try:
        args = runpy.run_path(script, run_name="__flags__")["parse_args"]()
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if not _is_standard(name):
                del sys.modules[name]
    for package, flag in OPTIONAL.items():
        if not getattr(args, flag, False):
            sys.modules.setdefault(package, None)  # which Python takes for "not installed"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it warns of packages that are not needed


def _is_standard(name):
    return name.partition(".")[0] in sys.stdlib_module_names


class _Placeholder:
    """Stands for whatever is taken from a library while flags are parsed: good for definitions, not for work."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __getitem__(self, key):
        return self

    def __or__(self, other):
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases):
        return ()


class _PlaceholderModule(ModuleType):
    __path__ = []  # any module may be looked for in it

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Placeholder()


class _Placeholders:
    """Finds a placeholder for every module that is neither Python's own nor in the scripts' folder.

    Args:
        folder (`Path`): of the scripts.
    """

    def __init__(self, folder):
        self.folder = folder

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if _is_standard(name) or (self.folder / top).is_dir() or (self.folder / f"{top}.py").is_file():
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return _PlaceholderModule(spec.name)

    def exec_module(self, module):
        """There is nothing in it."""
