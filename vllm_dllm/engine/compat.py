"""Methods of vLLM that are wrapped on every device, one function each; `cpu/` has what only a CPU needs, `costs` and
`stat_logger` wrap one method each beside what they do.

All were read in 0.32.0 and 0.33.0; only 0.32.0 was run. Wrapping checks the parameters that are relied on, so that a
vLLM that changed them is told at start, in a sentence.
"""

import functools
import inspect
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pkgutil import resolve_name
from types import ModuleType
from typing import Any, get_args

from pydantic import ValidationError
from vllm.config import ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.config.vllm import logger as vllm_config_logger
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.utils import CoreEngineProcManager

from vllm_dllm.errors import ConfigError, UnsupportedVllmError, nearest

logger = init_logger("vllm.dllm")

SPECULATIVE_METHODS: tuple[str, ...] = get_args(SpeculativeMethod)
"""Those of vLLM."""

_MARK = "__vllm_dllm_wrapped__"


def wrap(
    owner: type | ModuleType, name: str, parameters: tuple[str, ...], make: Callable[[Any], Callable[..., Any]]
) -> None:
    """Replace a method, or a function of a module, by `make(original)`, once.

    Raises: UnsupportedVllmError when the method lacks one of the parameters that the wrapper relies on.
    """
    original = getattr(owner, name, None)
    if getattr(original, _MARK, False):
        return
    found = tuple(inspect.signature(original).parameters) if callable(original) else ()
    missing = [parameter for parameter in parameters if parameter not in found]
    if missing:
        raise UnsupportedVllmError(
            f"{owner.__name__}.{name} of the installed vLLM has the parameters {found}, vllm-dllm needs "
            f"{', '.join(missing)}; install vLLM 0.32 or 0.33"
        )
    wrapper = functools.wraps(original)(make(original))  # type: ignore[arg-type]  # callable, or `missing` would say so
    setattr(wrapper, _MARK, True)
    is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapper) if is_static else wrapper)


def explain_start_errors(explain: Callable[[EngineArgs, Exception], ConfigError | None]) -> None:
    """Let a ConfigError that is raised inside of vLLM's configuration classes reach the user as it is.

    They are pydantic's, which puts a ValueError between two lines of its own, with all arguments in them. What else is
    raised there, `explain(args, error)` may know how to say.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
            try:
                return original(self, *args, **kwargs)
            except (ValidationError, AttributeError, LookupError, TypeError) as error:
                findings = error.errors() if isinstance(error, ValidationError) else []
                causes = [finding.get("ctx", {}).get("error") for finding in findings]
                ours = [cause for cause in causes if isinstance(cause, ConfigError)]
                found = ours[0] if ours else explain(self, error)
                if found is None:
                    raise
            raise found

        return wrapper

    wrap(EngineArgs, "create_engine_config", ("self",), make)


def around_argument_defaults(
    check: Callable[[EngineArgs, ModelConfig], None], finish: Callable[[EngineArgs, ModelConfig], None]
) -> None:
    """Call `check` while `EngineArgs` still tells what the user set, and `finish` when vLLM filled in the rest."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: EngineArgs, model_config: ModelConfig) -> None:
            check(self, model_config)
            original(self, model_config)
            finish(self, model_config)

        return wrapper

    wrap(EngineArgs, "_set_default_chunked_prefill_and_prefix_caching_args", ("self", "model_config"), make)


def extend_speculative_arguments(read: Callable[[str], object], method: str) -> None:
    """Let `--speculative-config` take what `read` reads where it is not JSON, and `--spec-method` one more method."""

    def extend(parser: ArgumentParser) -> None:
        config = parser._option_string_actions.get("--speculative-config")
        name: Any = parser._option_string_actions.get("--spec-method")
        if config is None or name is None or name.choices is None:  # the parser belongs to all models
            logger.error("--speculative-config of this vLLM is unknown to vllm-dllm: it takes no path and no 'spiffy'")
            return
        read_json: Any = config.type

        def read_any(text: str) -> object:
            try:
                return read_json(text)
            except ArgumentTypeError:
                if text.lstrip().startswith("{"):
                    raise
            try:
                return read(text)
            except ConfigError as error:
                raise ArgumentTypeError(str(error)) from None

        config.type = read_any
        name.choices = [*name.choices, method]
        name.type = _method_reader(method)

    def make(original: Callable[..., ArgumentParser]) -> Callable[..., ArgumentParser]:
        def wrapper(parser: ArgumentParser) -> ArgumentParser:
            extended = original(parser)
            extend(extended)
            return extended

        return wrapper

    wrap(EngineArgs, "add_cli_args", ("parser",), make)


def _method_reader(method: str) -> Callable[[str], str]:
    """Make what reads `--spec-method`: a typo of our method is told before argparse lists all that are allowed."""

    def read_method(text: str) -> str:
        if text != method and nearest(text, [*SPECULATIVE_METHODS, method]) == method:
            raise ArgumentTypeError(f"{text!r} is not known; did you mean {method!r}?")
        return text

    return read_method


def before_speculative_config(take: Callable[[EngineArgs, ModelConfig], bool]) -> None:
    """Let `take(args, model_config)` see `speculative_config` before vLLM; where it returns True, vLLM sees none."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(
            self: EngineArgs, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
        ) -> SpeculativeConfig | None:
            if take(self, target_model_config):
                return None
            return original(self, target_model_config, target_parallel_config)

        return wrapper

    wrap(EngineArgs, "create_speculative_config", ("self", "target_model_config", "target_parallel_config"), make)


def replace_diffusion_check(is_ours: Callable[[ModelConfig], bool], check: Callable[[SamplingParams], None]) -> None:
    """Check sampling parameters by `check` for our models, by vLLM's rules for others."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: SamplingParams, model_config: ModelConfig) -> None:
            if is_ours(model_config):
                check(self)
            else:
                original(self, model_config)

        return wrapper

    wrap(SamplingParams, "_validate_diffusion", ("self", "model_config"), make)


def around_admission(
    check: Callable[[InputProcessor, Any], None], finish: Callable[[InputProcessor, Any], None]
) -> None:
    """Call `check(processor, params)` on each request's parameters before vLLM reads them, and `finish(processor,
    request)` on each request that it admits; what either raises refuses the request.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        names = inspect.signature(original)

        def wrapper(self: InputProcessor, *args: Any, **kwargs: Any) -> Any:
            check(self, names.bind(self, *args, **kwargs).arguments["params"])
            request = original(self, *args, **kwargs)
            finish(self, request)
            return request

        return wrapper

    wrap(InputProcessor, "process_inputs", ("self", "request_id", "prompt", "params"), make)


def around_tokenization(guard: Callable[[BaseRenderer, Any, Any], AbstractContextManager[tuple[Any, Any]]]) -> None:
    """Tokenize each prompt inside `guard(renderer, prompt, params)`, as the prompt and by the parameters it yields."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: BaseRenderer, prompt: Any, params: Any) -> Any:
            with guard(self, prompt, params) as (guarded, by):
                return original(self, guarded, by)

        return wrapper

    def make_async(original: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapper(self: BaseRenderer, prompt: Any, params: Any) -> Any:
            with guard(self, prompt, params) as (guarded, by):
                return await original(self, guarded, by)

        return wrapper

    wrap(BaseRenderer, "_tokenize_singleton_prompt", ("self", "prompt", "params"), make)
    wrap(BaseRenderer, "_tokenize_singleton_prompt_async", ("self", "prompt", "params"), make_async)


def before_serving(is_ours: Callable[[ModelConfig], bool], prepare: Callable[[], None]) -> None:
    """Call `prepare` when a process makes an asynchronous engine of one of our models.

    Others are spared the imports of vLLM's server, and a server of another model is as it was.
    """

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: InputProcessor, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if "vllm.v1.engine.async_llm" in sys.modules and is_ours(self.model_config):
                prepare()

        return wrapper

    wrap(InputProcessor, "__init__", ("self", "vllm_config"), make)


def before_engine_processes(check: Callable[[VllmConfig], None]) -> None:
    """Call `check(vllm_config)` in the process that is about to start an engine's; what it raises ends the start."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        names = inspect.signature(original)

        def wrapper(self: CoreEngineProcManager, *args: Any, **kwargs: Any) -> None:
            check(names.bind(self, *args, **kwargs).arguments["vllm_config"])
            original(self, *args, **kwargs)

        return wrapper

    wrap(CoreEngineProcManager, "__init__", ("self", "vllm_config"), make)


def choose_scheduler(ours: Collection[str]) -> None:
    """Find our schedulers by name, without the warning for users that a scheduler may not fit this vLLM: ours does."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: SchedulerConfig) -> Any:
            name = self.scheduler_cls
            return resolve_name(name) if isinstance(name, str) and name in ours else original(self)

        return wrapper

    wrap(SchedulerConfig, "get_scheduler_cls", ("self",), make)


def describe_config(is_ours: Callable[[ModelConfig], bool], speculation: Callable[[VllmConfig], object]) -> None:
    """Have vLLM say of our models' configuration what is true of it.

    That nothing is compiled is no setting of the user's, of which vLLM warns; and it knows of no `speculative_config`
    where there is `speculation`.
    """

    def make_quiet(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: VllmConfig) -> None:
            of_us = self.model_config is not None and is_ours(self.model_config)
            with _without_warning(vllm_config_logger, "Inductor compilation was disabled") if of_us else nullcontext():
                original(self)

        return wrapper

    def make_true(original: Callable[..., str]) -> Callable[..., str]:
        def wrapper(self: VllmConfig) -> str:
            text = original(self)
            found = speculation(self) if is_ours(self.model_config) else None
            return text.replace("speculative_config=None", f"speculative_config={found}", 1) if found else text

        return wrapper

    wrap(VllmConfig, "__post_init__", ("self",), make_quiet)
    wrap(VllmConfig, "__str__", ("self",), make_true)


@contextmanager
def _without_warning(logger: Any, beginning: str) -> Iterator[None]:
    """Let a logger of vLLM's leave out one warning, and not count it as given, so that another model's is."""
    warn_once = logger.warning_once

    def others(message: str, *args: Any, **kwargs: Any) -> None:
        if not message.startswith(beginning):
            warn_once(message, *args, **kwargs)

    logger.warning_once = others
    try:
        yield
    finally:
        logger.warning_once = warn_once


def around_generation_config(read: Callable[[ModelConfig, Callable[[], dict[str, Any]]], dict[str, Any]]) -> None:
    """Have `read(model_config, original)` read a model's generation config."""

    def make(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def wrapper(self: ModelConfig) -> dict[str, Any]:
            return read(self, functools.partial(original, self))

        return wrapper

    wrap(ModelConfig, "try_get_generation_config", ("self",), make)


def add_sampling_defaults(more: Callable[[ModelConfig], Mapping[str, Any]]) -> None:
    """Add `more(model_config)` to the sampling parameters of requests that name none; what vLLM finds comes first.

    vLLM warns of those that a checkpoint's file has, and would say the same of others that are put beside them.
    """

    def make(original: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
        def wrapper(self: ModelConfig) -> dict[str, Any]:
            return {**more(self), **original(self)}

        return wrapper

    wrap(ModelConfig, "get_diff_sampling_param", ("self",), make)
