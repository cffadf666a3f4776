"""Rules, divergences and amounts by the names that command lines and configuration files use.

Listing the names, as a --help does, loads nothing of the package.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tip_kernels.learn.divergences import Divergence
    from tip_kernels.select.rule import Rule


def _rule(name: str, *args: object, **kwargs: object) -> Rule:
    from tip_kernels.select import adakd, rule, tip

    (kind,) = {getattr(room, name) for room in (rule, tip, adakd) if hasattr(room, name)}
    return kind(*args, **kwargs)


RULES = {
    "all": lambda keep, generator: _rule("KeepAll"),
    "entropy": lambda keep, generator: _rule("TopEntropy", keep),
    "sample_entropy": lambda keep, generator: _rule("SampleEntropy", keep, generator=generator),
    "soft_or": lambda keep, generator: _rule("SoftOr", keep),
    "soft_or_minmax": lambda keep, generator: _rule("SoftOr", keep, normalize="minmax"),
    "soft_or_lowest": lambda keep, generator: _rule("SoftOr", keep, lowest=True),
    "overconfident": lambda keep, generator: _rule("Overconfident", keep),
    "divergence": lambda keep, generator: _rule("TopDivergence", keep),
    "hellinger": lambda keep, generator: _rule("TopHellinger", keep),
    "random": lambda keep, generator: _rule("RandomRows", keep, generator=generator),
}
CLASSES = {  # the public name of what each makes, for help texts
    "all": "KeepAll",
    "entropy": "TopEntropy",
    "sample_entropy": "SampleEntropy",
    "soft_or": "SoftOr",
    "soft_or_minmax": "SoftOr by min-max",
    "soft_or_lowest": "SoftOr, the lowest",
    "overconfident": "Overconfident",
    "divergence": "TopDivergence",
    "hellinger": "TopHellinger",
    "random": "RandomRows",
}
SCORES = {  # what each ranks by, larger is kept; h and d are entropy and reverse KL, brought to 0 to 1 over the batch
    "all": "nothing: every token is kept",
    "entropy": "the student's entropy",
    "sample_entropy": "the student's entropy, drawn at random in proportion to it",
    "soft_or": "1 - (1 - h)(1 - d), h the rank of the student's entropy and d that of KL(student ‖ teacher), 0 to 1",
    "soft_or_minmax": "1 - (1 - h)(1 - d), h and d the student's entropy and KL(student ‖ teacher) scaled to 0 to 1",
    "soft_or_lowest": "minus soft_or's score: the tokens that it leaves out, as its control",
    "overconfident": "KL(teacher ‖ student) times (1 - h), h the student's entropy scaled to 0 to 1",
    "divergence": "KL(student ‖ teacher)",
    "hellinger": "the squared Hellinger distance of the two distributions",
    "random": "noise: the control of every other rule",
}
DIVERGENCES = {  # name: the public name, and the parameters where `name:1,2` does not say others
    "reverse_kl": ("ReverseKL", ()),
    "forward_kl": ("ForwardKL", ()),
    "jeffreys": ("Jeffreys", ()),
    "jsd": ("JSD", (0.5,)),
    "skew_forward_kl": ("SkewForwardKL", (0.1,)),
    "skew_reverse_kl": ("SkewReverseKL", (0.1,)),
    "tvd": ("TVD", ()),
    "hellinger_sq": ("HellingerSq", ()),
    "renyi": ("Renyi", (0.5,)),
    "alpha_beta": ("AlphaBeta", (0.2, 0.7)),
    "todi": ("ToDi", (1.0,)),
    "sampled_reverse_kl": ("SampledReverseKL", (None,)),
}


def divergence_of(text: str) -> Divergence:
    """The divergence called "jsd", or with parameters "jsd:0.1".

    Args:
        text: A name of DIVERGENCES, with a colon and as many numbers as it has parameters, or none of them.

    Raises:
        ValueError: For any other text.
    """
    name, colon, listed = text.partition(":")
    if name not in DIVERGENCES:
        known = ", ".join(DIVERGENCES)
        raise ValueError(f"expected one of {known}, some with parameters as in jsd:0.1, got {text!r}")
    kind, parameters = DIVERGENCES[name]
    if colon:
        count = len(parameters)
        try:
            given = tuple(float(number) for number in listed.split(","))
        except ValueError:
            given = ()
        if not count or len(given) != count:
            form = ":" + ",".join(["NUMBER"] * count) if count else ""
            raise ValueError(f"expected {name}{form}, got {text!r}")
        parameters = given
    from tip_kernels.learn import divergences

    return getattr(divergences, kind)(*parameters)


def keep_of(value: str | float) -> float | int:
    """How much is kept: 0.2 or "0.2" is a fraction of the tokens, 64 or "64" a number of them, "1.0" every token.

    Args:
        value: A fraction in (0, 1], a whole number of at least 1, or either as text.

    Raises:
        ValueError: For any other value.
    """
    given = value
    if isinstance(value, str):
        try:
            value = int(value) if value.strip().lstrip("+-").isdigit() else float(value)
        except ValueError:
            value = math.nan
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not (value >= 1 if whole else isinstance(value, float) and 0 < value <= 1):
        raise ValueError(f"expected a fraction in (0, 1] or a whole number of tokens of at least 1, got {given!r}")
    return value


def cut_of(value: str | float) -> float | tuple[str, float]:
    """A threshold: a number in nats, as it is or as text, or "quantile:0.9" for a quantile of the batch.

    Args:
        value: A finite number, its text, or "quantile:" with a number in [0, 1].

    Raises:
        ValueError: For any other value.
    """
    name, colon, share = str(value).partition(":")
    try:
        number = float(share if colon else name)
    except ValueError:
        number = math.nan
    ok = name == "quantile" and 0 <= number <= 1 if colon else math.isfinite(number)
    if not ok:
        raise ValueError(f"expected a finite number in nats, or quantile:Q with Q in [0, 1], got {value!r}")
    return ("quantile", number) if colon else number
