"""What a user can mend. The commands print these as one line; every other exception keeps its traceback."""


class UserError(Exception):
    """Says where, what was found, what is accepted and what to do; each kind refines a built-in exception."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class InvalidValue(UserError, ValueError):
    """A value, an input or a file content that is not accepted."""


class UnknownName(UserError, KeyError):
    """A key or a component that does not exist."""


class MissingFile(UserError, FileNotFoundError):
    """A path that leads nowhere."""


class InvalidState(UserError, RuntimeError):
    """Something that the present state of the run, the machine or the disk does not allow."""


class MissingPackage(UserError, ImportError):
    """A package or plug-in that is not installed."""


class FailedElsewhere(InvalidState):
    """Another process of the run has failed; that one says why."""


def shown(value: object) -> str:
    """A value as messages quote it, cut where it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= 100 else f"{text[:60]} ... {text[-20:]}"
