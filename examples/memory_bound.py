"""Measure speculation where a forward is bound by memory, as a large model's is on a GPU.

The model is the small LLaDA of this checkout, padded with zeros to a width of 2048: it computes the same function, so
its answers and the accepted drafts are those of a trained model, but a step takes the time that 250 million
weights take to travel from memory, and some more rows cost little.

    .venv/bin/python examples/memory_bound.py --out build/memory_bound
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from safetensors.torch import load_file, save_file

from vllm_dllm.cli.bench import decode
from vllm_dllm.draft.graph_file import GraphFile, load_graph, save_graph
from vllm_dllm.reference.model import LLaDA, LLaDAConfig

TINY = Path(__file__).parent / "tiny_llada"
WIDTH, HIDDEN = 2048, 4096
BLOCK_LENGTH = 8
GEN_LENGTH = 32


def make_checkpoint(path: Path) -> None:
    """Write the padded model.

    A weight is a corner of a matrix of zeros, new heads and channels are zero. A norm divides by the root of a mean
    over `WIDTH` channels instead of the old ones, which its scale and its epsilon make up for.
    """
    shutil.copytree(TINY / "checkpoint", path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    padding = WIDTH // config["d_model"]
    config["n_heads"] *= padding
    config["n_kv_heads"] = config["n_heads"]
    config["rms_norm_eps"] /= padding
    config |= {"d_model": WIDTH, "mlp_hidden_size": HIDDEN}
    (path / "config.json").write_text(json.dumps(config))
    wide = LLaDA(LLaDAConfig.from_json(path / "config.json")).bfloat16().state_dict()
    for name, weight in load_file(TINY / "checkpoint" / "model.safetensors").items():
        corner = tuple(slice(size) for size in weight.shape)
        wide[name].zero_()[corner] = weight * padding**-0.5 if weight.dim() == 1 else weight
    save_file(wide, path / "model.safetensors", metadata={"format": "pt"})


def save_fitting_graph(path: Path) -> None:
    """Write the small model's draft graph, less the nodes that name positions a block has not."""
    file = load_graph(TINY / "graph.json")
    nodes = enumerate(file.graph.formulas, start=1)
    fitting = [node for node, formula in nodes if formula[-1][0] < BLOCK_LENGTH]
    save_graph(GraphFile(file.graph.only(fitting)), path)


def main() -> None:
    """Build the model, measure, and remove it."""
    parser = argparse.ArgumentParser(description="Measure speculation where a forward is bound by memory.")
    parser.add_argument("--out", type=Path, default=Path("build/memory_bound"), help="folder of the report")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", help="of the weights as they are computed with")
    args = parser.parse_args()
    print(f"the small model, padded with zeros to a width of {WIDTH}: its own answers, a wide model's times\n")
    with tempfile.TemporaryDirectory() as folder:
        wide, graph = Path(folder) / "wide", Path(folder) / "graph.json"
        make_checkpoint(wide)
        save_fitting_graph(graph)
        decode(
            model=wide,
            prompts=TINY / "questions.jsonl",
            num_prompts=args.num_prompts,
            gen_length=GEN_LENGTH,
            block_length=BLOCK_LENGTH,
            concurrency="1",
            graph=str(graph),
            budgets="1,2,3",
            chain="",
            repeats=args.repeats,
            dtype=args.dtype,
            out=args.out,
        )


if __name__ == "__main__":
    main()
