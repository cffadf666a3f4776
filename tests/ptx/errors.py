"""Why a kernel does not run to its end."""


class Unsupported(Exception):
    """PTX that nothing here executes; named, never guessed."""


class Fault(Exception):
    """What a GPU would do wrong, or what it does not define."""
