"""Every place where vLLM's own code is replaced at run time, each with its reason, and the only functions that do so.

What a subclass, a registry, a configuration field or a hook of vLLM can do is done there; docs/patches.md says what,
and has the same table for readers.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from vllm_dllm.engine.contracts import Contract

_MARK = "__vllm_dllm_wrapped__"


@dataclass(frozen=True, slots=True)
class Patch:
    """A method or a name of vLLM that is replaced, and why nothing else will do."""

    contract: Contract
    reason: str

    @property
    def name(self) -> str:
        """As messages and the table name it: the class, or the module's last name, and what is replaced."""
        return self.contract.name


def _method(owner: str, name: str, parameters: str, reason: str) -> Patch:
    return Patch(Contract(owner, name, tuple(parameters.split())), reason)


_CONFIG = "vllm.engine.arg_utils:EngineArgs"
_SERVE = "vllm.entrypoints"

PATCHES = {
    patch.name: patch
    for patch in (
        _method(
            _CONFIG,
            "create_engine_config",
            "self",
            "pydantic puts an error of a model's hook between lines of its own; and a config.json that holds no object "
            "ends vLLM before it knows the model, without a sentence",
        ),
        _method(
            _CONFIG,
            "create_model_config",
            "self",
            "What the user gave can be told from vLLM's defaults here alone; the model's hook is called with both. In "
            "mode `ar` it is made again, with the architecture of vLLM's model",
        ),
        _method(
            _CONFIG,
            "create_speculative_config",
            "self target_model_config target_parallel_config",
            "vLLM's class of speculative configurations knows its own methods alone, and has no registry",
        ),
        _method(
            _CONFIG,
            "add_cli_args",
            "parser",
            "`--speculative-config` takes JSON alone and `--spec-method` vLLM's methods; parsers have no hook",
        ),
        _method(
            "vllm.transformers_utils.config:HFConfigParser",
            "parse",
            "self model trust_remote_code revision code_revision",
            "Classes of configurations are found by `model_type` alone, which families share with each other and with "
            "stock models; parsers are registered for all models, with a warning",
        ),
        _method(
            "vllm.sampling_params:SamplingParams",
            "_validate_diffusion",
            "self model_config",
            "vLLM refuses for every diffusion model what one of its own cannot do",
        ),
        _method(
            "vllm.v1.engine.input_processor:InputProcessor",
            "__init__",
            "self vllm_config renderer",
            "Front ends make it themselves: one of our models becomes `DllmInputProcessor`, and a server's own part is "
            "set up",
        ),
        _method(
            "vllm.renderers.base:BaseRenderer",
            "_tokenize_singleton_prompt",
            "self prompt params",
            "Prompts are cut to, or refused by, what vLLM takes for the room of a reply; ours need a block of it",
        ),
        _method(
            "vllm.renderers.base:BaseRenderer",
            "_tokenize_singleton_prompt_async",
            "self prompt params",
            "The same for servers",
        ),
        _method(
            "vllm.v1.engine.utils:CoreEngineProcManager",
            "__init__",
            "self vllm_config",
            "What would end an engine's processes is told before they are started; their messages lie deep in the log",
        ),
        _method(
            "vllm.v1.metrics.loggers:StatLoggerManager",
            "__init__",
            "self vllm_config enable_default_loggers client_count",
            "vLLM's entry point for loggers would add ours to every model, and turn on statistics that are off",
        ),
        Patch(
            Contract(f"{_SERVE}.launchers.api_server.entry", "build_app", None),
            "Fields that vLLM's request classes drop can be refused in the body alone: the app of one of our models "
            "checks it, and answers in the form of its API",
        ),
        _method(
            f"{_SERVE}.launchers.run_batch",
            "run_batch",
            "engine_client args",
            "It reads bodies without an app; one that is wrong would end the whole batch",
        ),
        _method(
            f"{_SERVE}.anthropic.serving:AnthropicServingMessages",
            "create_messages",
            "self request raw_request",
            "It logs what refuses a request with a traceback",
        ),
        _method(
            f"{_SERVE}.anthropic.serving:AnthropicServingMessages",
            "count_tokens",
            "self request raw_request",
            "It counts tokens by making a request, which may be longer than one that is served",
        ),
        _method(
            "vllm.v1.engine.async_llm:AsyncLLM",
            "generate",
            "self prompt sampling_params request_id data_parallel_rank",
            "It is a generator: a stream's HTTP status is sent before a request is admitted",
        ),
        _method(
            "vllm.v1.engine.async_llm:AsyncLLM",
            "shutdown",
            "self timeout",
            "It cancels the task that tells requests in flight of their end before it has told them; and a server "
            "whose engine died ends with status 0",
        ),
        _method(
            f"{_SERVE}.openai.chat_completion.serving:OpenAIServingChat",
            "chat_completion_stream_generator",
            "self request result_generator request_id",
            "Its chunks have neither what a request took nor outputs without tokens, which show a canvas under way",
        ),
        _method(
            f"{_SERVE}.openai.completion.serving:OpenAIServingCompletion",
            "completion_stream_generator",
            "self request engine_inputs result_generator request_id",
            "The same of the completions API",
        ),
        _method(
            f"{_SERVE}.openai.responses.serving:OpenAIServingResponses",
            "_generate_with_builtin_tools",
            "self request_id engine_input sampling_params",
            "It calls `AsyncLLM.generate` inside of a generator of its own",
        ),
        _method(
            f"{_SERVE}.openai.chat_completion.serving:OpenAIServingChat",
            "render_chat_request",
            "self request",
            "A request waits there before it is admitted: what its answer has to meet is compiled meanwhile",
        ),
        _method(
            f"{_SERVE}.openai.chat_completion.batch_serving:OpenAIServingChatBatch",
            "render_batch_chat_request",
            "self request",
            "The same of its batches, each request of one",
        ),
        _method(
            f"{_SERVE}.openai.completion.serving:OpenAIServingCompletion",
            "render_completion_request",
            "self request",
            "The same of the completions API, for its constraints",
        ),
        _method(
            f"{_SERVE}.openai.responses.serving:OpenAIServingResponses",
            "_render_resolved_response_inputs",
            "self request",
            "The same of the Responses API",
        ),
        Patch(
            Contract("vllm.triton_utils", "triton", None),
            "On a CPU without Triton: host code of the V2 runner calls `next_power_of_2`, which vLLM's stand-in for "
            "the module lacks; it is added",
        ),
        Patch(
            Contract("vllm.v1.worker.gpu_worker", "HAS_TRITON", None, since="0.33"),
            "On a CPU without Triton: while 0.33 constructs our worker, which it refuses the V2 runner otherwise",
        ),
    )
}


def wrap(name: str, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Replace a method by `make(original)`, once; its contract was checked when the plugin was registered."""
    contract = PATCHES[name].contract
    owner = resolve_name(contract.owner)
    original = getattr(owner, contract.attribute)
    if getattr(original, _MARK, False):
        return
    wrapper = functools.wraps(original)(make(original))
    setattr(wrapper, _MARK, True)
    is_static = isinstance(inspect.getattr_static(owner, contract.attribute), staticmethod)
    setattr(owner, contract.attribute, staticmethod(wrapper) if is_static else wrapper)


def add_to_module(name: str, attribute: str, value: object) -> None:
    """Give a module of vLLM's something that it lacks."""
    contract = PATCHES[name].contract
    setattr(resolve_name(f"{contract.owner}:{contract.attribute}"), attribute, value)


@contextmanager
def replaced_while(name: str, value: object) -> Iterator[None]:
    """Replace a module's name for a while; nothing is done where this vLLM has no such name."""
    contract = PATCHES[name].contract
    module = resolve_name(contract.owner)
    if not hasattr(module, contract.attribute):
        yield
        return
    before = getattr(module, contract.attribute)
    setattr(module, contract.attribute, value)
    try:
        yield
    finally:
        setattr(module, contract.attribute, before)


def become(instance: Any, cls: type) -> None:
    """Turn an instance of one of vLLM's classes, which vLLM itself makes, into one of a subclass of ours."""
    if isinstance(instance, cls):
        return
    if not isinstance(instance, cls.__base__ or object):
        raise TypeError(f"{instance!r} is no {cls.__base__}")
    instance.__class__ = cls
