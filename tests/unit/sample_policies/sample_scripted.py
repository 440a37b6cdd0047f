"""A policy whose answers a test chooses."""

from ringplane.policies import Policy, counter, policy, state


class Scripted(Policy):
    """It answers what it has been given."""

    results: int = counter("results that it has seen")
    sum_of_results: int = counter("their sum")
    answer: int = state()
    answer_to_result: int = state()


@policy(Scripted)
def scripted(io, my):
    return my.answer


@scripted.result
def scripted_result(io, my):
    my.results += 1
    my.sum_of_results += io.result
    return my.answer_to_result
