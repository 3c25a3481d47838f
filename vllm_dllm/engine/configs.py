"""vLLM's configuration classes where they say something else of our models.

vLLM makes the configurations itself and then calls the hook of the model (`config_hook`), which turns those of our
models into these by `become`. Configurations of other models stay what they are. They are pickled for other processes,
so that what is parsed here is parsed once for all of them.
"""

import functools
import json
from dataclasses import dataclass, replace
from pkgutil import resolve_name
from typing import Any

from vllm import envs
from vllm.config import ModelConfig, SchedulerConfig, VllmConfig
from vllm.config.vllm import OptimizationLevel

from vllm_dllm.additional_config import settings_in
from vllm_dllm.config import DllmConfig, parse_server_settings
from vllm_dllm.draft.calibrated import GraphDrafter
from vllm_dllm.draft.drafter import Drafter
from vllm_dllm.draft.graph_schema import ModelShape
from vllm_dllm.draft.look_ahead import smallest_budget
from vllm_dllm.draft.windows import WindowDrafter
from vllm_dllm.engine.cpu.gate import is_needed
from vllm_dllm.engine.edit_tokens import check_server
from vllm_dllm.engine.generation_defaults import SAMPLING_NAMES, family_defaults, read_generation_config
from vllm_dllm.engine.patches import become
from vllm_dllm.models.interface import ModelFamily, family_of
from vllm_dllm.names import AttentionName
from vllm_dllm.spiffy_config import METHOD, Exactness, SpiffySettings, spiffy_settings
from vllm_dllm.unmask.registry import load_user_policies
from vllm_dllm.unmask.schedule import UnmaskRules, unmask_rules


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a configuration says of diffusion."""

    settings: DllmConfig  # of the server; what is not given is as the model publishes it
    rules: UnmaskRules  # what the family fixes of unmasking
    spiffy: SpiffySettings | None  # None without speculation

    def with_attention(self, name: AttentionName) -> "Parsed":
        """Return the same with the implementation of attention that was chosen."""
        return replace(self, settings=self.settings.model_copy(update={"attention": name}))


def parse(config: VllmConfig) -> Parsed:
    """Parse what `additional_config` holds, where `spiffy_arguments.take_spiffy` put speculation, too.

    Raises: ConfigError for settings that cannot work, for a draft graph or a KV policy that does not fit, and for a
        policy of a user that cannot be loaded.
    """
    load_user_policies()  # a request that is the first to name an option of one must not find that it is broken
    model_config, additional = config.model_config, config.additional_config
    family, hf_config = served_family(model_config), model_config.hf_config
    published = family.settings(getattr(hf_config, "block_size", None), getattr(hf_config, "edit_ids", None))
    settings = parse_server_settings(settings_in(additional), defaults=published)
    check_server(settings, hf_config)
    spiffy = None
    if isinstance(additional, dict) and METHOD in additional:
        shape = ModelShape.of(hf_config.to_dict())
        spiffy = spiffy_settings(
            json.dumps(additional[METHOD]), settings, model_config.model, hf_config.model_type, shape
        )
    ends = (getattr(hf_config, f"{name}_token_id", None) for name in ("eos", "eot"))
    eos_id, eot_id = (-1 if token is None else token for token in ends)
    rules = replace(unmask_rules(family, settings), eos_id=eos_id, eot_id=eot_id)
    return Parsed(settings, rules, spiffy)


class DllmModelConfig(ModelConfig):
    """Of a model of ours."""

    def try_get_generation_config(self) -> dict[str, Any]:
        """Read a generation config only from a file that transformers can read. Raises: ConfigError."""
        return read_generation_config(self, super().try_get_generation_config)

    def get_diff_sampling_param(self) -> dict[str, Any]:
        """Return sampling parameters of requests that name none: behind what vLLM finds, the family's.

        vLLM warns of those that a checkpoint's file has, and would say the same of others that are put beside them.
        """
        defaults = {SAMPLING_NAMES[name]: value for name, value in family_defaults(self).items()}
        return {**defaults, **super().get_diff_sampling_param()}

    @property
    def is_chunked_prefill_supported(self) -> bool:
        """Never: a diffusion model takes its whole prompt at once."""
        return False

    @property
    def is_prefix_caching_supported(self) -> bool:
        """Where K/V do not depend on what follows."""
        return served_family(self).is_block_causal


class DllmSchedulerConfig(SchedulerConfig):
    """Of an engine with a model of ours."""

    def get_scheduler_cls(self) -> Any:
        """Find our scheduler without the warning for users that it may not fit this vLLM: it does."""
        assert isinstance(self.scheduler_cls, str), "step_sizes sets the name"
        return resolve_name(self.scheduler_cls)


def compile_nothing(config: VllmConfig) -> None:
    """Have nothing compiled, without vLLM's warning that the user wanted it so: level 0 sets the mode after that."""
    config.optimization_level = OptimizationLevel.O0
    config.compilation_config.mode = None


class DllmVllmConfig(VllmConfig):
    """Of an engine with a model of ours."""

    def __post_init__(self) -> None:
        """Complete the configuration once more, as processes of an engine do."""
        compile_nothing(self)
        super().__post_init__()

    @functools.cached_property
    def dllm(self) -> Parsed:
        """Parsed once. Raises: as `parse`."""
        return parse(self)

    @property
    def use_v2_model_runner(self) -> bool:
        """Whether vLLM's V2 runner serves: without Triton too, unless the user forbids it."""
        is_forbidden = envs.VLLM_USE_V2_MODEL_RUNNER is False
        return (is_needed() and not is_forbidden) or super().use_v2_model_runner

    def _validate_v2_model_runner(self) -> None:
        """Check everything that vLLM does, but for Triton where it is not needed."""
        if not is_needed():
            super()._validate_v2_model_runner()
            return
        unsupported = self._get_v2_model_runner_unsupported_features()
        if unsupported:
            raise ValueError(f"Model Runner V2 does not yet support: {', '.join(unsupported)}")

    def __str__(self) -> str:
        """Say what vLLM does; it knows of no `speculative_config` where Spiffy is on."""
        text, spiffy = super().__str__(), self.dllm.spiffy
        if spiffy is None:
            return text
        # With a fixed budget, max_nodes decides nothing more.
        most = {"budget": "auto", "max_nodes": spiffy.max_nodes} if spiffy.budget is None else {"budget": spiffy.budget}
        ranker = {} if spiffy.ranker is None else {"ranker": spiffy.ranker.source}
        graph = {} if spiffy.is_chain else {"draft_graph": spiffy.source}
        said = {"method": METHOD, **graph, **ranker, **most}
        return text.replace("speculative_config=None", f"speculative_config={said}", 1)


def become_dllm(config: VllmConfig) -> DllmVllmConfig:
    """Turn a configuration that vLLM is about to complete into ours."""
    become(config, DllmVllmConfig)
    become(config.scheduler_config, DllmSchedulerConfig)
    assert isinstance(config, DllmVllmConfig)
    return config


def is_ours(model_config: ModelConfig) -> bool:
    """Tell whether a model is served by this plugin."""
    return family_of(model_config.architectures) is not None


def served_family(model_config: ModelConfig) -> ModelFamily:
    """Return the family of a model of ours."""
    family = family_of(model_config.architectures)
    assert family is not None, "asked of our models only"
    return family


def _parsed(vllm_config: VllmConfig) -> Parsed:
    if isinstance(vllm_config, VllmConfig):
        become(vllm_config, DllmVllmConfig)  # vLLM calls the hook once for a model, and may make another configuration
    parsed: Parsed = vllm_config.dllm
    return parsed


def settings_of(vllm_config: VllmConfig) -> DllmConfig:
    """Return the server's settings, of `additional_config["dllm"]`; what is not given is as the model publishes it."""
    return _parsed(vllm_config).settings


def rules_of(vllm_config: VllmConfig) -> UnmaskRules:
    """Return what the family fixes of unmasking."""
    return _parsed(vllm_config).rules


def spiffy_of(vllm_config: VllmConfig) -> SpiffySettings | None:
    """Return what `spiffy_arguments.take_spiffy` put into `additional_config`, parsed; None without speculation."""
    return _parsed(vllm_config).spiffy


def exactness_of(vllm_config: VllmConfig) -> Exactness | None:
    """Return how exact the tokens of drafts are, Spiffy's or self-speculation's; None: nobody drafts."""
    if settings_of(vllm_config).mode == "self_speculation":
        return "exact"
    spiffy = spiffy_of(vllm_config)
    return None if spiffy is None else spiffy.exactness


def make_drafter(vllm_config: VllmConfig) -> Drafter | None:
    """Make who drafts, for the scheduler's process or a worker's; None without speculation."""
    spiffy = spiffy_of(vllm_config)
    if spiffy is None:
        return None
    if settings_of(vllm_config).has_windows:
        return WindowDrafter(spiffy.max_nodes)
    is_async = bool(vllm_config.scheduler_config.async_scheduling)
    stores_alone = served_family(vllm_config.model_config).stores_alone
    look_ahead_from = smallest_budget(settings_of(vllm_config), is_async=is_async, stores_alone=stores_alone)
    return GraphDrafter(spiffy.graph, look_ahead_from, ranker=None if spiffy.ranker is None else spiffy.ranker.weights)
