"""What the methods of vLLM's that are wrapped on every device do then, one function each (`engine.patches`).

`stat_logger` and `serving` wrap some more, beside what these do.
"""

import inspect
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, get_args

from huggingface_hub.constants import HF_HUB_OFFLINE
from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError
from transformers import PretrainedConfig
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig, VllmConfig
from vllm.config.speculative import SpeculativeMethod
from vllm.engine.arg_utils import EngineArgs
from vllm.logger import init_logger
from vllm.renderers.base import BaseRenderer
from vllm.sampling_params import SamplingParams
from vllm.transformers_utils.config import HFConfigParser
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.utils import CoreEngineProcManager

from vllm_dllm.engine.patches import wrap
from vllm_dllm.errors import ConfigError, nearest

logger = init_logger("vllm.dllm")

SPECULATIVE_METHODS: tuple[str, ...] = get_args(SpeculativeMethod)
"""Those of vLLM."""


def explain_start_errors(explain: Callable[[EngineArgs, Exception], ConfigError | None]) -> None:
    """Let `explain(args, error)` say what is raised inside of vLLM's configuration classes, where it knows how.

    They are pydantic's, which puts a ValueError between two lines of its own, with all arguments in them.
    """

    def make(original: Callable[..., VllmConfig]) -> Callable[..., VllmConfig]:
        def wrapper(self: EngineArgs, *args: Any, **kwargs: Any) -> VllmConfig:
            try:
                return original(self, *args, **kwargs)
            except (ValidationError, StrictDataclassError, AttributeError, LookupError, TypeError) as error:
                found = explain(self, error)
                if found is None:
                    raise
            raise found

        return wrapper

    wrap("EngineArgs.create_engine_config", make)


def before_config_class(read: Callable[[Mapping[str, Any], object], PretrainedConfig | None]) -> None:
    """Let `read(content, hf_overrides)` make the configuration of a config.json; where it is None, vLLM makes it."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(self: HFConfigParser, model: str | Path, trust_remote_code: bool, **given: Any) -> Any:
            content = _content(model, given)
            config = read(content, given.get("hf_overrides"))
            return original(self, model, trust_remote_code, **given) if config is None else (content, config)

        return wrapper

    wrap("HFConfigParser.parse", make)


def _content(model: str | Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says, by what vLLM reads it with; nothing where vLLM will say why it cannot be read."""
    options = {name: value for name, value in given.items() if name not in ("hf_overrides", "trust_remote_code")}
    try:
        content, _ = PretrainedConfig.get_config_dict(model, local_files_only=HF_HUB_OFFLINE, **options)
    except Exception:  # noqa: BLE001 - of any model: vLLM reads it again, and says what is wrong
        return {}
    return content if isinstance(content, dict) else {}


def after_model_config(
    overrides: Callable[[EngineArgs, ModelConfig], dict[str, Any] | None],
    check: Callable[[EngineArgs, ModelConfig], None],
) -> None:
    """Call `check` while `EngineArgs` still tells what the user set.

    Where `overrides` returns fields of config.json, which the user's may be none of, the configuration is made again
    with them.
    """

    def make(original: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
        def wrapper(self: EngineArgs) -> ModelConfig:
            model_config = original(self)
            given, more = self.hf_overrides, overrides(self, model_config)
            if more is not None:
                try:
                    self.hf_overrides = {**(given or {}), **more}
                    model_config = original(self)
                finally:
                    self.hf_overrides = given
            check(self, model_config)
            return model_config

        return wrapper

    wrap("EngineArgs.create_model_config", make)


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

    wrap("EngineArgs.add_cli_args", make)


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

    wrap("EngineArgs.create_speculative_config", make)


def replace_diffusion_check(is_ours: Callable[[ModelConfig], bool], check: Callable[[SamplingParams], None]) -> None:
    """Check sampling parameters by `check` for our models, by vLLM's rules for others."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: SamplingParams, model_config: ModelConfig) -> None:
            if is_ours(model_config):
                check(self)
            else:
                original(self, model_config)

        return wrapper

    wrap("SamplingParams._validate_diffusion", make)


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

    wrap("BaseRenderer._tokenize_singleton_prompt", make)
    wrap("BaseRenderer._tokenize_singleton_prompt_async", make_async)


def after_front_end(take: Callable[[InputProcessor], None]) -> None:
    """Call `take(processor)` on what each front end makes to admit its requests."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: InputProcessor, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            take(self)

        return wrapper

    wrap("InputProcessor.__init__", make)


def before_engine_processes(check: Callable[[VllmConfig], None]) -> None:
    """Call `check(vllm_config)` in the process that is about to start an engine's; what it raises ends the start."""

    def make(original: Callable[..., None]) -> Callable[..., None]:
        names = inspect.signature(original)

        def wrapper(self: CoreEngineProcManager, *args: Any, **kwargs: Any) -> None:
            check(names.bind(self, *args, **kwargs).arguments["vllm_config"])
            original(self, *args, **kwargs)

        return wrapper

    wrap("CoreEngineProcManager.__init__", make)
