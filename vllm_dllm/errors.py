"""What can go wrong. Each message says what was given, what is allowed and what to do, in the user's own names."""


class ConfigError(ValueError):
    """A setting of the user that cannot work."""


class GraphError(ConfigError):
    """A draft graph, in a file or in the settings, that cannot work."""


class KernelUnavailable(RuntimeError):
    """A native op that this installation or this device does not have."""


class UnsupportedVllmError(RuntimeError):
    """The installed vLLM is not one that this plugin knows how to extend."""
