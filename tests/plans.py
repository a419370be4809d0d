"""The plans that most tests need: one schedule, and δ."""

from jaxspd.spectral.plan import activation_thresholds, make_plan


def plan_of(levels, sigmas, spectrum, *, mode, delta, tokens, respace=False):
    """The plan of the full grid's schedule `sigmas` through all `levels`. It grows where `spectrum` and δ
    say.
    """
    return make_plan(
        levels,
        [sigmas] * len(levels),
        activation_thresholds(levels, spectrum, delta),
        mode=mode,
        tokens=tokens,
        delta=delta,
        respace=respace,
    )
