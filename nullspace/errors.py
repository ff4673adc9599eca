"""What is raised where a user must do something: the scripts end with its sentence and exit code 1."""

from pathlib import Path

from nullspace.terminal import printable


class NullSpaceError(ValueError):
    """What is wrong and what to do about it, in one sentence that a user can act on.

    As text it is fit for a terminal, whatever the names and the answers in it hold.
    """

    def __str__(self):
        return printable(super().__str__())


class UnsoundError(NullSpaceError):
    """What was trained is not fit for use."""


class DamagedError(NullSpaceError):
    """A file of a bundle is not what it was when the bundle was built."""


NETWORK = {"TransportError", "ConnectionError"}  # of the HTTP libraries, whose modules differ, and of Python


def causes(error):
    """An exception, and those that it was raised from or after, down to the bottom."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def kinds(error):
    """The names of the classes of an exception, bases included, and of its causes."""
    return {kind.__name__ for one in causes(error) for kind in type(one).__mro__}


def answer(error):
    """The response of the Hub in a chain of exceptions, or None where there was none."""
    return next((one.response for one in causes(error) if getattr(one, "response", None) is not None), None)


class StaleError(NullSpaceError):
    """What an earlier run left cannot be gone on from: it is of another command, or cannot be read.

    Attributes:
        folder (`Path`): what it left.
    """

    def __init__(self, message, folder):
        super().__init__(message)
        self.folder = folder


def status(error):
    """The HTTP status that the Hub answered in a chain of exceptions, or None."""
    response = answer(error)
    return None if response is None else response.status_code


def reason(error):
    """What the Hub said in a chain of exceptions, or the first sentence of what went wrong at its bottom."""
    bottom = error
    while bottom.__cause__ is not None:
        bottom = bottom.__cause__
    for one in causes(error):
        named = {kind.__name__ for kind in type(one).__mro__}
        if getattr(one, "server_message", None) and "EntryNotFoundError" not in named:  # whose file only others name
            return f"{status(one)} {one.server_message}".splitlines()[0].rstrip(".")
        if named & NETWORK:
            bottom = one
    first = (str(bottom).strip() or type(bottom).__name__).splitlines()[0]
    return first.split(". ")[0].rstrip(".")


def way_on(error):
    """What to do when the Hub does not give a base model, or None where the exception is of something else."""
    code, named = status(error), kinds(error)
    if "GatedRepoError" in named:
        return "accept its conditions on the Hub and log in with `hf auth login` or pass --hub_token"
    if "HFValidationError" in named:
        return "name a folder that is there, or a Hub id"
    if "RevisionNotFoundError" in named:
        return "name a revision that it has"
    if code in (401, 403, 404):
        return "check its name, and if it is private log in with `hf auth login` or pass --hub_token"
    if code == 429:
        return "wait some minutes and run this command again"
    if code is not None and code >= 500:
        return "the fault is on the Hub's side, so run this command again later"
    if named & NETWORK:
        return "check the network, or run it where the cache has what is needed"
    return None


def named(name):
    """A name that was given for a folder, a file or a Hub id, and that there is nothing of that name here, if so."""
    return f"{name}" if Path(name).exists() else f"{name}, no folder or file here,"


def cannot_be_had(model, error, kind="base model"):
    """The sentence on a model that the Hub, or its folder, does not give."""
    what = way_on(error)
    shown = named(model) if kinds(error) & NETWORK and status(error) is None else model  # the Hub has not been asked
    return f"The {kind} {shown} cannot be had ({reason(error)}){f'; {what}' if what else ''}."


LONGEST = 200  # characters that are shown of a name


def listed(names, most=5):
    """Names in a row, the first few of many: 'a, b and 3 more'."""
    names = [str(name) if len(str(name)) <= LONGEST else f"{str(name)[:LONGEST]}..." for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
