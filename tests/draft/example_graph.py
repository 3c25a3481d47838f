"""A draft graph with everything that a file can hold."""

import datetime

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.draft.graph_file import GraphFile
from vllm_dllm.draft.graph_schema import PromptsFile, Provenance, Versions

PROVENANCE = Provenance(
    model="models/llada-tiny",
    family="llada",
    settings=DllmConfig(block_length=16, policy="threshold", threshold=0.8),
    temperature=0.0,
    prompts=(PromptsFile(file="train.jsonl", sha256="0" * 64, num_prompts=50),),
    acceptance_by_depth=(0.9, 0.75, 0.5),
    predicted_nfe={0: 32.0, 3: 14.5, 10: 9.25},
    seed=7,
    versions=Versions(vllm_dllm="0.2.0", vllm="0.33.0", torch="2.13.0"),
    date=datetime.date(2026, 1, 31),
)
GRAPH = DraftGraph((((0, 0),), ((1, 0),), ((0, 0), (1, 0)), ((0, 1),)), 1, (80, 40, 30, 5), 100)
FILE = GraphFile(GRAPH, PROVENANCE)
