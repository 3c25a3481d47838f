"""Rules that unmask what is sure enough: Fast-dLLM, SDAR, dParallel, dInfer, LocalLeap, CreditDecoding."""

import math

from tests.statements.step import Step, argmax, best, softmax, without


def at_least(step: Step, positions: list[int], confidence: dict[int, float], threshold: float) -> list[int]:
    """Positions that reach the threshold, and the surest."""
    surest = best(positions, confidence, 1)
    return [p for p in positions if confidence[p] >= threshold or p in surest]


def threshold(step: Step) -> list[int]:
    confidence = {p: step.confidence(p) for p in step.masked}
    return step.unmask(at_least(step, step.masked, confidence, step.options["threshold"]))


def factor(step: Step) -> list[int]:
    """As many as the n-th's confidence allows: at least 1 - f / (n + 1)."""
    confidence = {p: step.confidence(p) for p in step.masked}
    order = best(step.masked, confidence, len(step.masked))
    bounds = [-1.0] + [1 - step.options["factor"] / (n + 1) for n in range(2, len(order) + 1)]
    count = len(order) - 1
    for index, position in enumerate(order):
        if confidence[position] < bounds[index]:
            count = index
            break
    if count in (0, len(order) - 1):
        count += 1
    return step.unmask(order[:count])


def dynamic(step: Step) -> list[int]:
    """All above the threshold if these are as many as the schedule gives, else so many of the surest (SDAR)."""
    return step.unmask(above_or_some(step, step.options["threshold"], step.share()))


def above_or_some(step: Step, bound: float, least: int) -> list[int]:
    confidence = {p: step.confidence(p) for p in step.masked}
    above = [p for p in step.masked if confidence[p] > bound]
    return above if len(above) >= least else best(step.masked, confidence, least)


def entropy_bounded(step: Step) -> list[int]:
    """Those of the least entropy, while their sum is below the bound; one at least (SDAR, as JetEngine does it)."""
    entropy = {p: step.entropy(p) for p in step.masked}
    total, chosen = 0.0, []
    for position in best(step.masked, {p: -entropy[p] for p in step.masked}, len(step.masked)):
        total += entropy[position]
        if total >= step.options["entropy_bound"]:
            break
        chosen.append(position)
    return step.unmask(chosen or best(step.masked, {p: -entropy[p] for p in step.masked}, 1))


def entropy_threshold(step: Step) -> list[int]:
    """Those whose entropy does not exceed the bound, and that of the least (dParallel)."""
    entropy = {p: step.entropy(p) for p in step.masked}
    least = best(step.masked, {p: -entropy[p] for p in step.masked}, 1)
    return step.unmask([p for p in step.masked if entropy[p] <= step.options["entropy_threshold_bound"] or p in least])


def local_leap(step: Step) -> list[int]:
    """What reaches the threshold is an anchor; within the radius of one a lower threshold counts. The surest in
    any case.
    """
    confidence = {p: step.confidence(p) for p in step.masked}
    anchors = [p for p in step.masked if confidence[p] >= step.options["threshold"]]
    radius, relaxed = step.options["local_leap_radius"], step.options["local_leap_relaxed"]
    near = [p for p in step.masked if any(abs(p - anchor) <= radius for anchor in anchors)]
    surest = best(step.masked, confidence, 1)
    return step.unmask(
        [p for p in step.masked if p in anchors or p in surest or (p in near and confidence[p] >= relaxed)]
    )


def hierarchy(step: Step) -> list[int]:
    """What exceeds the threshold; of each run of masked positions the surest, all that are so sure, if they exceed the
    lower one; the surest of all.
    """
    confidence = {p: step.confidence(p) for p in step.masked}
    chosen = {p for p in step.masked if confidence[p] > step.options["threshold"]}
    for run in runs(step.masked):
        most = max(confidence[p] for p in run)
        chosen |= {p for p in run if confidence[p] == most > step.options["hierarchy_low"]}
    return step.unmask(sorted(chosen | set(best(step.masked, confidence, 1))))


def runs(positions: list[int]) -> list[list[int]]:
    found: list[list[int]] = []
    for position in positions:
        if found and found[-1][-1] == position - 1:
            found[-1].append(position)
        else:
            found.append([position])
    return found


def credit(step: Step) -> list[int]:
    """CreditDecoding as dInfer has it: as `threshold`, of logits raised by what tokens got for being the
    likeliest before.

    Credit decays, the likeliest token of each masked position gets its probability to the power gamma, and logits
    are raised by
    alpha * log(1 + credit). A position credits eight tokens at most; one more takes the place of that with the least.
    """
    credits: dict[int, dict[int, float]] = step.memory.setdefault("credits", {})
    raised = {}
    for position in step.masked:
        own = credits.setdefault(position, {})
        for token in own:
            own[token] *= step.options["credit_beta"]
        likeliest = step.likeliest(position)
        if likeliest not in own and len(own) == 8:
            del own[min(own, key=lambda token: own[token])]
        own[likeliest] = (
            own.get(likeliest, 0.0) + step.probabilities(position)[likeliest] ** step.options["credit_gamma"]
        )
        raised[position] = [
            logit + step.options["credit_alpha"] * math.log1p(own.get(token, 0.0))
            for token, logit in enumerate(step.logits[position])
        ]
    mask = {step.block.mask}
    is_drawn = step.block.temperature > 0
    tokens = {p: step.drawn(p, raised[p]) if is_drawn else argmax(without(raised[p], mask)) for p in step.masked}
    confidence = {p: softmax(raised[p], mask)[tokens[p]] for p in step.masked}
    canvas = list(step.canvas)
    for position in at_least(step, step.masked, confidence, step.options["threshold"]):
        canvas[position] = tokens[position]
    return canvas
