"""One door to every path that a user can write: local, http(s), or whatever handler a plugin registers."""

from iopath.common.file_io import HTTPURLHandler, PathManager

path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())


def printable(path: object) -> str:
    """A path for messages: bytes that are no UTF-8 and control characters become escapes such as `\\xff`."""
    text = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
