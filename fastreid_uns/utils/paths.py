"""One door to every path that a user can write: local, http(s), or whatever handler a plugin registers."""

from iopath.common.file_io import HTTPURLHandler, PathManager

path_manager = PathManager()
path_manager.register_handler(HTTPURLHandler())
