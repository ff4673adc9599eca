"""What is raised where a user must do something: the scripts end with its sentence and exit code 1."""


class NullSpaceError(ValueError):
    """What is wrong and what to do about it, in one sentence that a user can act on."""


class DamagedError(NullSpaceError):
    """A file of a bundle is not what it was when the bundle was built."""


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
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response.status_code
        error = error.__cause__
    return None


def reason(error):
    """What the Hub said in a chain of exceptions, or the first sentence of what went wrong at its bottom."""
    while True:
        if getattr(error, "server_message", None):
            return f"{status(error)} {error.server_message}".splitlines()[0].rstrip(".")
        if error.__cause__ is None:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            return first.split(". ")[0].rstrip(".")
        error = error.__cause__


def listed(names, most=5):
    """Names in a row, the first few of many: 'a, b and 3 more'."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
