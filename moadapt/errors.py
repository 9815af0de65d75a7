"""The errors a user can cause. The command line prints them without a traceback."""


class MoadaptError(Exception):
    """Base of every error this library raises on purpose; its text names the cause and the way out."""


class ConfigError(MoadaptError, ValueError):
    """A configuration that cannot be used. Lists every problem found, one per line, each with its path."""


class DataError(MoadaptError, ValueError):
    """A data file that cannot be used; names the file and, where there is one, the line."""


class AdapterError(MoadaptError, RuntimeError):
    """An adapter that cannot be loaded, merged or attached to this base model."""
