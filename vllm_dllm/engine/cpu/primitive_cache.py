"""oneDNN keeps the code that it compiled for a matrix product, by its shape: bound what that takes."""

import os
from functools import cache

import torch
from vllm import _custom_ops as custom_ops
from vllm.logger import init_logger

logger = init_logger("vllm.dllm")

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
CAPACITY = 256
"""Products of a weight's shape and a number of rows; oneDNN's own default is 1,024. One takes about 0.3 MB, a forward
uses four or five, and vLLM's layers keep those of the 32 latest numbers of rows besides.
"""


@cache
def bound_primitive_cache(capacity: int = CAPACITY) -> None:
    """Bound oneDNN's cache in this process; the first call does it, before the process has used oneDNN.

    Prompts have any number of rows, and each number adds products: a worker grows by hundreds of MB, until the cache
    is full. A value in the environment is left alone.

    Args:
        capacity: products that are kept.
    """
    if VARIABLE in os.environ or not custom_ops._supports_onednn:
        return
    os.environ[VARIABLE] = str(capacity)
    try:
        custom_ops.create_onednn_mm(torch.zeros(64, 64), 1)  # oneDNN reads the variable at its first use
    finally:
        del os.environ[VARIABLE]  # a later process may serve another model
    logger.info("oneDNN keeps %d compiled products; %s in the environment sets another number.", capacity, VARIABLE)
