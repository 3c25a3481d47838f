"""Run lm-eval's tasks against a server of LLaDA, Dream or LLaDA-MoE, those with likelihoods too.

    vllm serve CHECKPOINT --served-model-name llada
    python examples/lm_eval_dllm.py run --model dllm-completions --tasks arc_easy,gsm8k --model_args \\
        model=llada,tokenizer=CHECKPOINT,base_url=http://localhost:8000/v1/completions,samples=128,num_concurrent=4

`generate_until` is lm-eval's own `local-completions`. What that sends for a likelihood (`echo` with `logprobs`, the
context and the continuation as one prompt) does not say where the continuation begins, and a model that unmasks in any
order has no log-probability of a token by what is before it. So likelihoods are asked for by the server's own route.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import requests
from lm_eval.api.registry import register_model
from lm_eval.models.openai_completions import LocalCompletionsAPI

ROUTE = "dllm/loglikelihood"
Pair = tuple[tuple[int, ...], list[int]]
"""Token ids of a context and of a continuation."""


@register_model("dllm-completions")
class DllmCompletions(LocalCompletionsAPI):
    """lm-eval's `local-completions` with Monte-Carlo likelihoods.

    Args:
        base_url: ends with /v1/completions.
        samples: of an estimate; LLaDA's evaluation takes 128.
        options: of `local-completions`.
    """

    def __init__(self, base_url: str, samples: int = 128, **options: object) -> None:
        super().__init__(base_url=base_url, **options)
        self._url, self._samples = base_url.removesuffix("completions") + ROUTE, int(samples)

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        """Return log-likelihoods; whether greedy decoding would give the continuation is not looked at: False."""
        pairs = [(tuple(context), continuation) for _key, context, continuation in requests]
        choices = [list(group) for _, group in groupby(pairs, key=lambda pair: pair[0])]
        with ThreadPoolExecutor(max(1, self._concurrent)) as pool:
            answers = list(pool.map(self._ask, choices))
        return [(value, False) for values in answers for value in values]

    def loglikelihood_rolling(self, requests: object, **_: object) -> list[float]:
        """Raises: NotImplementedError, as LLaDA's own evaluation: a text without a context has no such estimate."""
        raise NotImplementedError(
            "diffusion models have no rolling log-likelihood; leave out the tasks that ask for it"
        )

    def _ask(self, pairs: list[Pair]) -> list[float]:
        body = {
            "model": self.model,
            "context": list(pairs[0][0]),
            "continuations": [continuation for _, continuation in pairs],
            "samples": self._samples,
            "seed": self._seed,
        }
        reply = requests.post(self._url, json=body, headers=self.header, timeout=self.timeout)
        if not reply.ok:
            raise RuntimeError(f"{self._url} says {reply.status_code}: {reply.text}")
        return [choice["loglikelihood"] for choice in reply.json()["choices"]]


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
