"""What a user did wrong, in one line.

A ``UserError`` says what is wrong, why it matters and what to do. Every command turns it into that one line on
standard error and exit code 2; anything else that escapes is a defect of farnear's and shows its traceback.
"""

import errno


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, why, and what to do."""

    exit_code = 2


class RunStoppedError(UserError):
    """A run that cannot go on because of its own numbers: reported in one line too, but nobody's mistake."""

    exit_code = 1


class RunInterruptedError(UserError):
    """A run that a signal has stopped in good order: what it had done is saved, and --resume goes on from there.

    Its code is the EX_TEMPFAIL of sysexits.h: nothing is wrong, try again later.
    """

    exit_code = 75


def as_user_error(error: UserError | OSError) -> UserError:
    """The error that a command ends with.

    Raises:
        OSError: The one given, when it names no file: a defect.
    """
    if isinstance(error, UserError):
        return error
    if error.filename is None and error.errno in (errno.ENOSPC, errno.EIO):
        # What writes files names them (`farnear.files`): this is where the output goes.
        return UserError(f"standard output cannot be written ({error.strerror}); send it elsewhere")
    if error.filename is None:
        raise error
    return refused_by_system(error)


def refused_by_system(error: OSError) -> UserError:
    """A full disk, a folder that is a file, a missing permission, as one line."""
    where = f": {error.filename}" if error.filename is not None else ""
    return UserError(f"{error.strerror or error}{where}; check the path, its permissions and the space on its disk")
