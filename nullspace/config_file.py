"""--config: flags from a YAML file, and the file that says which ones a run was given."""

import argparse
import difflib

from nullspace.errors import NullSpaceError


CONFIG_HELP = (
    "YAML file of flags, as `learning_rate: 1e-4`; a list for several values, true or false for those without one. The "
    "command line comes before it."
)
# What a run is told and another would not be: where to go on, a secret, the file itself
NOT_KEPT = ("config", "resume_from_checkpoint", "hub_token", "local_rank")


def flags_in(path, parser, words):
    """The command-line words (`list[str]`) that a file stands for, without the flags that `words` have themselves.

    Every value is read as text, as from a command line: YAML would take `no` for a truth value and 1e-4 for text.

    Raises:
        NullSpaceError: if it cannot be read, is no YAML mapping, or names what is no flag or has no such value.
    """
    import yaml  # which only who has such a file waits for

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except FileNotFoundError as error:
        raise NullSpaceError(f"--config {path} is not there; check its name.") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise NullSpaceError(f"--config {path} cannot be read as YAML ({reason}); mend it.") from error
    if not isinstance(content, dict):
        raise NullSpaceError(f"--config {path} has no flags; write one a line, as 'learning_rate: 1e-4'.")
    actions = {action.dest: action for action in parser._actions if action.help != argparse.SUPPRESS}
    own, found = {word.split("=")[0] for word in words}, []
    for name, value in content.items():
        action = actions.get(name)
        if action is None or name in ("config", "help"):
            close = difflib.get_close_matches(str(name), actions, 1)
            hint = f"did you mean {close[0]}?" if close else "--help has them all."
            raise NullSpaceError(f"--config {path} has '{name}', which is no flag; {hint}")
        if own.isdisjoint(action.option_strings):
            found += _words(action, value, f"--config {path} has '{name}'")
    return found


def _words(action, value, where):
    """The command-line words of one flag."""
    flag = action.option_strings[0]
    if action.nargs == 0:  # those without a value
        if value not in ("true", "false"):
            raise NullSpaceError(f"{where}, which is either true or false; write one of them.")
        if value == "true":
            return [flag]
        return [each for each in action.option_strings if each.startswith("--no-")]
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str) for each in values):
        raise NullSpaceError(f"{where} with more in it than a value can be; write it as on the command line.")
    if isinstance(value, list) and action.nargs is None:
        raise NullSpaceError(f"{where}, which takes one value, not a list.")
    if action.nargs is None:
        return [f"{flag}={value}"]  # also where it begins with a dash
    return [flag, *values]


def flags_as_yaml(args, parser):
    """The flags that a run was given or has by default, as a text that `--config` reads, in the order of the help."""
    import yaml

    content = {}
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if value is None or action.dest in NOT_KEPT:
            continue
        if isinstance(value, tuple):  # a colour
            value = "#{:02x}{:02x}{:02x}".format(*value)
        elif isinstance(value, list):
            value = [each if isinstance(each, int | float) else str(each) for each in value]
        elif not isinstance(value, bool | int | float) or value == float("inf"):  # which YAML would write .inf
            value = str(value)
        content[action.dest] = value
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=float("inf"))
