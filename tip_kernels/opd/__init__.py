"""The on-policy loop: `tip-kernels opd`. Everything here needs the `opd` extra; nothing else imports it."""


class UsageError(ValueError):
    """What the user can mend: shown as one line, exit code 2."""
