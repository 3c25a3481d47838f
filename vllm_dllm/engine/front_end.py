"""What a front end of one of our models does with its requests, beside vLLM."""

import inspect
import sys
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import make_async
from vllm.v1.engine.input_processor import InputProcessor

from vllm_dllm.engine import serving, structured
from vllm_dllm.engine.configs import is_ours
from vllm_dllm.engine.parameter_types import check_types
from vllm_dllm.engine.patches import become
from vllm_dllm.engine.refusals import check_logprobs
from vllm_dllm.engine.request import finish_admission

_NAMES = inspect.signature(InputProcessor.process_inputs)


class DllmInputProcessor(InputProcessor):
    """vLLM's, of a front end of one of our models."""

    def process_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """Admit a request. Raises: RequestError for one that is refused."""
        bound = _NAMES.bind(self, *args, **kwargs)
        params, asked, is_open_ended = bound.arguments["params"], None, False
        check_types(self, params)
        if isinstance(params, SamplingParams):
            check_logprobs(params)
            bound.arguments["params"], asked = structured.take_out(params)
            is_open_ended = params.max_tokens is None
        request = super().process_inputs(*bound.args[1:], **bound.kwargs)
        finish_admission(self, request, asked, is_open_ended=is_open_ended)
        return request


def take_over(processor: InputProcessor) -> None:
    """Take what a front end made to admit its requests.

    An asynchronous engine may be a server's; others are spared the imports of vLLM's, and a server of another model is
    as it was.
    """
    if not is_ours(processor.model_config):
        return
    become(processor, DllmInputProcessor)
    if hasattr(processor, "process_inputs_async"):  # of raw prompts, made of the method that the class had
        processor.process_inputs_async = make_async(processor.process_inputs, executor=processor.renderer._executor)
    if "vllm.v1.engine.async_llm" in sys.modules:
        serving.install()
