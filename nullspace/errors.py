"""What is raised where a user must do something: the scripts end with its sentence and exit code 1."""


class NullSpaceError(ValueError):
    """What is wrong and what to do about it, in one sentence that a user can act on."""


class DamagedError(NullSpaceError):
    """A file of a bundle is not what it was when the bundle was built."""
