"""Flushes are acknowledged without being done, as by drives that ignore them to seem faster."""

from ringplane.policies import DROP, FLUSH, PASS, Policy, chance, counter, parameter, policy


class LyingFlush(Policy):
    """Flushes are acknowledged without being done."""

    probability: float = parameter(1.0, "the probability with which a flush is not done", 0.0, 1.0)
    flushes: int = counter("flushes")
    ignored: int = counter("flushes that were not done")


@policy(LyingFlush)
def lying_flush(io, my):
    if io.operation != FLUSH:
        return PASS
    my.flushes += 1
    if not chance(io, my.probability):
        return PASS
    my.ignored += 1
    return DROP
