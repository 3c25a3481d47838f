"""Rules that ask a small net which positions to unmask: Learn2PD's filter, and the learned unmasking policy."""

import math

import torch

from tests.statements.step import Step, best

Matrix = list[list[float]]


def linear(net: dict, name: str, vector: list[float]) -> list[float]:
    return (net[f"{name}.weight"] @ torch.tensor(vector, dtype=torch.float64) + net[f"{name}.bias"]).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def learn2pd(step: Step, accept: str = "learn2pd_accept") -> list[int]:
    """What the net takes for final, and the surest."""
    surest = best(step.masked, {p: step.confidence(p) for p in step.masked}, 1)
    return step.unmask(sorted(set(accepted(step, step.options[accept])) | set(surest)))


def accepted(step: Step, bound: float) -> list[int]:
    """Masked positions of which the filter, Linear, ReLU, Linear, says more than the bound.

    It sees the probability of the likeliest token at each position of the block, known ones too; 0 behind a cut.
    """
    net, end = step.options["net"], step.memory.get("end", step.block.length)
    seen = [step.sureness(p) if p < end else 0.0 for p in range(step.block.length)]
    says = linear(net, "linear2", [max(x, 0.0) for x in linear(net, "linear1", seen)])
    return [p for p in step.masked if sigmoid(says[p]) > bound]


def dit_confidence(step: Step) -> list[int]:
    """Draws each masked position with the probability that the net says; where none is drawn, the likeliest to be
    goes.
    """
    says = dit(step)
    temperature = step.options["dit_confidence_temperature"]
    drawn = [p for p in step.masked if step.uniform(p, step.number) < sigmoid(says[p] / temperature)]
    return step.unmask(drawn or best(step.masked, dict(enumerate(says)), 1))


def dit(step: Step) -> list[float]:
    """A transformer of one block over the likeliest tokens' probabilities, conditioned by what is masked and by
    the time.
    """
    net = step.options["net"]
    width = len(net["final_norm.weight"])
    time = dit_time(net, (step.block.decided + step.number) / step.block.reply)
    x = [linear(net, "confidence_proj", [step.sureness(p)]) for p in range(step.block.length)]
    condition = [
        [a + b for a, b in zip(net["mask_embedding.weight"][int(step.is_masked(p))].tolist(), time, strict=True)]
        for p in range(step.block.length)
    ]
    block = "transformer_blocks.0"
    change = [linear(net, f"{block}.ada_conditioning", row) for row in condition]
    part = lambda row, index: row[index * width : (index + 1) * width]  # noqa: E731
    inner = [
        scaled(normed(net, f"{block}.norm1", row), part(c, 0), part(c, 1)) for row, c in zip(x, change, strict=True)
    ]
    x = [
        added(row, out, part(c, 2))
        for row, out, c in zip(x, attention(net, block, inner, step.options["heads"]), change, strict=True)
    ]
    inner = [
        scaled(normed(net, f"{block}.norm2", row), part(c, 3), part(c, 4)) for row, c in zip(x, change, strict=True)
    ]
    out = [linear(net, f"{block}.linear2", [gelu(h) for h in linear(net, f"{block}.linear1", row)]) for row in inner]
    x = [added(row, o, part(c, 5)) for row, o, c in zip(x, out, change, strict=True)]
    return [linear(net, "output_proj", normed(net, "final_norm", row))[0] for row in x]


def dit_time(net: dict, time: float) -> list[float]:
    """The time's cosine and sine, each as often as half the embedding is wide (a period of 1), rounded to bfloat16."""
    half = net["time_mlp.0.weight"].shape[1] // 2
    waves = [float(torch.tensor(wave(time)).to(torch.bfloat16)) for wave in (math.cos, math.sin)]
    hidden = linear(net, "time_mlp.0", [waves[0]] * half + [waves[1]] * half)
    return linear(net, "time_mlp.2", [h * sigmoid(h) for h in hidden])


def attention(net: dict, block: str, rows: Matrix, heads: int) -> Matrix:
    size = len(rows[0]) // heads
    q, k, v = ([linear(net, f"{block}.{name}_proj", row) for row in rows] for name in "qkv")
    outputs: Matrix = [[] for _ in rows]
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        queries, keys = ([turned(row[part], position) for position, row in enumerate(side)] for side in (q, k))
        keys, values = (torch.tensor(side, dtype=torch.float64) for side in (keys, [row[part] for row in v]))
        for position, query in enumerate(queries):
            scores = (keys @ torch.tensor(query, dtype=torch.float64) / math.sqrt(size)).tolist()
            weights = [math.exp(score - max(scores)) for score in scores]
            total = math.fsum(weights)
            outputs[position] += (torch.tensor([w / total for w in weights], dtype=torch.float64) @ values).tolist()
    return [linear(net, f"{block}.out_proj", row) for row in outputs]


def turned(vector: list[float], position: int) -> list[float]:
    """Rotary positions: pairs of neighbours are read, halves are written."""
    angles = [position / 10000 ** (2 * i / len(vector)) for i in range(len(vector) // 2)]
    pairs = list(zip(vector[::2], vector[1::2], angles, strict=True))
    return [a * math.cos(t) - b * math.sin(t) for a, b, t in pairs] + [
        a * math.sin(t) + b * math.cos(t) for a, b, t in pairs
    ]


def normed(net: dict, name: str, row: list[float]) -> list[float]:
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in row) / len(row) + 1e-5)
    return [
        (x - mean) / deviation * w + b
        for x, w, b in zip(row, net[f"{name}.weight"].tolist(), net[f"{name}.bias"].tolist(), strict=True)
    ]


def scaled(row: list[float], scale: list[float], shift: list[float]) -> list[float]:
    return [x * (1 + s) + b for x, s, b in zip(row, scale, shift, strict=True)]


def added(row: list[float], change: list[float], scale: list[float]) -> list[float]:
    return [x + y * (1 + s) for x, y, s in zip(row, change, scale, strict=True)]


def gelu(x: float) -> float:
    return x * (1 + math.erf(x / math.sqrt(2))) / 2
