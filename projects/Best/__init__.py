"""The sum: the core and what the other projects add to it, one thing after the other. All of its parts are theirs."""
