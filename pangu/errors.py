"""The errors Pangu raises on purpose: one clear message, exit code 2, no traceback."""


class PanguError(Exception):
    """What the user can mend. The message names the field or file, the value, and the fix."""


class ConfigError(PanguError):
    """A configuration that cannot be read or whose values cannot work together."""


class DataError(PanguError):
    """A corpus, tokenizer or tokenized dataset that is missing, malformed or does not match."""


class DeviceError(PanguError):
    """A device that is not there or cannot do what is asked."""


class CheckpointError(PanguError):
    """A checkpoint that is missing, damaged or of another model."""


class TrainingError(PanguError):
    """A run that cannot go on, such as one whose loss stays non-finite."""


class ConversionError(PanguError):
    """A model that the requested format cannot express, or files that are not of that format."""


class LaunchError(PanguError):
    """Workers that cannot be started as asked: hosts, ports, node ranks."""
