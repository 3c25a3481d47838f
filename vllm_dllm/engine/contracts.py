"""What the plugin relies on in vLLM, checked before anything of vLLM's is changed.

Contracts are read from vLLM's source files: importing the modules would cost every process seconds, and some may not be
imported before others. So they can be checked against the sources of another version, too (`tests/engine/`).
"""

import ast
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from vllm_dllm.errors import UnsupportedVllmError


@dataclass(frozen=True, slots=True)
class Contract:
    """A name of vLLM's that must be there.

    Attributes:
        owner: "module" or "module:Class".
        attribute: a method, function, field or global of it.
        parameters: that it must have, in any order and among others; None where it is no function.
        since: the version from which on it must be there.
        most: what our override takes, where vLLM may pass all its parameters; empty where that does not matter.
    """

    owner: str
    attribute: str
    parameters: tuple[str, ...] | None
    since: str = "0"
    most: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The class, or the module's last name, and the attribute."""
        return f"{re.split('[.:]', self.owner)[-1]}.{self.attribute}"


_V1 = "vllm.v1"
_GPU = "vllm.v1.worker.gpu"


def _fields(owner: str, names: str) -> tuple[Contract, ...]:
    return tuple(Contract(owner, name, None) for name in names.split())


def _methods(owner: str, methods: dict[str, str]) -> tuple[Contract, ...]:
    return tuple(Contract(owner, name, tuple(parameters.split())) for name, parameters in methods.items())


def _override(owner: str, name: str, parameters: str, others: str = "") -> Contract:
    return Contract(owner, name, tuple(parameters.split()), most=(*parameters.split(), *others.split()))


CONTRACTS = (
    # The report's way from the worker.
    *_fields(f"{_V1}.outputs:ModelRunnerOutput", "aux_output_connector_output"),
    *_fields(f"{_V1}.core.sched.output:SchedulerOutput", "aux_output_connector_metadata"),
    *_fields(f"{_GPU}.model_runner:GPUModelRunner", "aux_output_connector output_copy_stream main_stream"),
    *_fields("vllm.distributed.aux_output_connector.connector:AuxRequestOutput", "token_start rows"),
    *_methods(
        f"{_GPU}.async_utils:AsyncOutput",
        {
            "__init__": "model_runner_output sampler_output num_sampled_tokens main_stream copy_stream check_ep_fault "
            "pending_aux_output"
        },
    ),
    *_fields(f"{_GPU}.sample.output:SamplerOutput", "sampled_token_ids num_sampled num_rejected"),
    # To the front end.
    *_fields(f"{_V1}.metrics.stats:SchedulerStats", "spec_decoding_stats"),
    *_fields(f"{_V1}.spec_decode.metrics:SpecDecodingStats", "num_accepted_tokens_per_pos"),
    *_fields(f"{_V1}.engine:EngineCoreOutput", "kv_transfer_params"),
    # What our subclasses override or call.
    *_fields("vllm.config.parallel:ParallelConfig", "worker_cls"),
    *_fields("vllm.config.scheduler:SchedulerConfig", "scheduler_cls max_num_queued_reqs"),
    *_fields("vllm.config.vllm:VllmConfig", "use_v2_model_runner additional_config"),
    *_methods(
        "vllm.config.vllm:VllmConfig",
        {"_validate_v2_model_runner": "self", "_get_v2_model_runner_unsupported_features": "self", "__str__": "self"},
    ),
    *_methods("vllm.config.scheduler:SchedulerConfig", {"get_scheduler_cls": "self"}),
    *_methods(
        "vllm.config.model:ModelConfig",
        {
            "try_get_generation_config": "self",
            "get_diff_sampling_param": "self",
            "is_chunked_prefill_supported": "self",
            "is_prefix_caching_supported": "self",
        },
    ),
    *_methods(f"{_V1}.worker.gpu_worker:Worker", {"compile_or_warm_up_model": "self"}),
    *_methods(f"{_V1}.worker.gpu_worker:Worker", {"initialize_from_config": "self kv_cache_config"}),
    *_methods(f"{_V1}.worker.cpu_worker:CPUWorker", {"compile_or_warm_up_model": "self"}),
    *_methods(
        f"{_V1}.core.kv_cache_manager:KVCacheManager",
        {
            "allocate_slots": "self request num_new_tokens num_new_computed_tokens num_lookahead_tokens "
            "delay_cache_blocks",
            "cache_blocks": "self request num_computed_tokens",
        },
    ),
    *_methods(
        f"{_V1}.core.sched.scheduler:Scheduler",
        {
            "schedule": "self",
            "update_from_output": "self scheduler_output model_runner_output",
            "make_stats": "self spec_decoding_stats",
            "make_spec_decoding_stats": "self num_draft_tokens num_accepted_tokens request_id",
            "_free_request": "self request",
            "_preempt_request": "self request",
        },
    ),
    *_methods(f"{_V1}.engine.input_processor:InputProcessor", {"process_inputs": "self request_id prompt params"}),
    _override(
        f"{_GPU}.block_table:BlockTables",
        "gather_block_tables",
        "self idx_mapping num_reqs_padded out",
        "out_ptrs num_computed_tokens",
    ),
    _override(
        f"{_GPU}.block_table:BlockTables",
        "compute_slot_mappings",
        "self idx_mapping query_start_loc positions num_tokens_padded out",
    ),
    *_fields(f"{_GPU}.states:RequestState", "req_id_to_index free_indices all_token_ids num_computed_tokens"),
    *_fields(f"{_GPU}.input_batch:InputBatch", "req_ids idx_mapping idx_mapping_np num_draft_tokens_per_req num_reqs"),
    *_methods("vllm.entrypoints.launchers.app", {"build_app": "args supported_tasks model_config"}),
    *_fields("vllm.model_executor.layers.logits_processor:LogitsProcessor", "head_dtype"),
    # Experts.
    *_methods("vllm.model_executor.models.qwen3_moe:Qwen3MoeSparseMoeBlock", {"__init__": "self vllm_config prefix"}),
    *_methods(
        "vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts",
        {"apply": "self topk_weights topk_ids expert_map"},
    ),
    # Registries.
    *_fields("vllm.envs", "environment_variables"),
    *_fields("vllm.model_executor.models.config", "MODELS_CONFIG_MAP"),
    *_fields("vllm.transformers_utils.config", "_CONFIG_REGISTRY"),
    *_fields("vllm.model_executor.models.registry:_ModelRegistry", "models"),
    *_fields("vllm.model_executor.models.registry:_LazyRegisteredModel", "module_name class_name"),
    *_fields("vllm.model_executor.models.registry:_RegisteredModel", "model_cls"),
    *_fields("vllm.engine.arg_utils:EngineArgs", "diffusion_config"),
    *_methods("vllm.model_executor.models.registry:_ModelRegistry", {"register_model": "self model_arch model_cls"}),
)
"""Besides those of `patches.PATCHES`."""

LORA_CONTRACTS = (
    *_methods(f"{_GPU}.lora_utils:LoraState", {"make_lora_inputs": "self req_ids idx_mapping num_scheduled_tokens"}),
    *_methods(
        f"{_V1}.worker.lora_model_runner_mixin:LoRAModelRunnerMixin",
        {"maybe_dummy_run_with_lora": "self lora_config num_scheduled_tokens num_sampled_tokens num_active_loras"},
    ),
    *_fields("vllm.lora.worker_manager:WorkerLoRAManager", "_adapter_manager"),
    *_fields("vllm.lora.model_manager:LoRAModelManager", "punica_wrapper_mapping"),
    *_methods(
        "vllm.lora.punica_wrapper.punica_cpu:PunicaWrapperCPU",
        {
            "_shrink_prefill": "self y x w_t_all scale",
            "_expand_slice_prefill": "self y x w_t_all y_offset y_slice_size add_inputs",
        },
    ),
    *_methods("vllm.lora.punica_wrapper.punica_base:PunicaWrapperBase", {"prefill_metadata": "self"}),
)
"""Checked when an engine with adapters starts: without them all else is served."""


def check_contracts(contracts: tuple[Contract, ...], supported: str, root: Path | None = None) -> None:
    """Check contracts with vLLM's sources.

    Args:
        contracts: all that must hold.
        supported: versions, for the message.
        root: folder of another vLLM than the installed one.

    Raises: UnsupportedVllmError naming all that do not hold.
    """
    broken = [finding for contract in contracts if (finding := _finding(contract, root))]
    if broken:
        raise UnsupportedVllmError(
            f"the installed vLLM {_version(root)} is not as vllm-dllm needs it: {'; '.join(broken)}; supported are the "
            f"releases {supported}; install one of these or another version of vllm-dllm"
        )


def _version(root: Path | None) -> str:
    return version("vllm") if root is None else f"in {root.name}"


def _finding(contract: Contract, root: Path | None) -> str | None:
    """Return what is wrong, in a few words."""
    if root is None and Version(Version(version("vllm")).base_version) < Version(contract.since):
        return None
    text = read_owner(contract.owner, root)
    if text is None:
        return f"there is no {contract.owner}"
    if contract.parameters is None:
        return None if _is_in(text, contract.attribute) else f"{contract.name} is gone"
    found = parameters_in(text, contract.attribute)
    if found is None:
        return f"{contract.name} is gone"
    missing = [name for name in contract.parameters if name not in found]
    more = [name for name in found if contract.most and name not in contract.most]
    if missing or more:
        too = f", and not {', '.join(missing)}" if missing else f"; our override has no {', '.join(more)}"
        return f"{contract.name} takes ({', '.join(found)}){too}"
    return None


def _is_in(text: str, name: str) -> bool:
    """Tell whether a source defines a name, assigns it or imports it."""
    is_defined = re.search(rf"^\s*(self\.|def |class )?{name}\b\s*[:=(,]", text, re.MULTILINE)
    return bool(is_defined or re.search(rf"^(from|import) .*\b{name}\b", text, re.MULTILINE))


@cache
def _source(module: str, root: Path | None) -> str | None:
    """Return the source of a module, which is not imported; nor are the packages that it is in."""
    package, *parts = module.split(".")
    if root is None or package != "vllm":
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            return None
        root = Path(spec.origin).parent
    path = root.joinpath(*parts)
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return file.read_text() if file.is_file() else None


@cache
def read_owner(owner: str, root: Path | None = None) -> str | None:
    """Return the source of a module or of a class in it; None where it is not there."""
    module, _, name = owner.partition(":")
    text = _source(module, root)
    if text is None or not name:
        return text
    begin = re.search(rf"^class {name}\b", text, re.MULTILINE)
    if begin is None:
        source = re.search(rf"^from (\.?[\w.]+) import .*\b{name}\b", text, re.MULTILINE)
        return source and read_owner(f"{module * source[1].startswith('.')}{source[1]}:{name}", root)
    end = re.search(r"^[A-Za-z@]", text[begin.end() :], re.MULTILINE)
    return text[begin.start() : begin.end() + end.start()] if end else text[begin.start() :]


def parameters_in(text: str, function: str) -> tuple[str, ...] | None:
    """Return the parameters of a function or a method of a source, the last of that name; None where it has none."""
    found = None
    for begin in re.finditer(rf"^[ \t]*(async )?def {function}\(", text, re.MULTILINE):
        found = _parameters_of(text[begin.start() :].lstrip().splitlines()) or found
    return found


def _parameters_of(lines: list[str]) -> tuple[str, ...] | None:
    """Return the parameters of the function whose source the lines begin with."""
    for end, line in enumerate(lines, 1):
        if not line.rstrip().endswith((":", "...")):
            continue
        try:
            tree = ast.parse("\n".join(lines[:end]) + (" pass" if line.rstrip().endswith(":") else ""))
        except SyntaxError:  # inside of the signature
            continue
        node = tree.body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        arguments = node.args
        return tuple(each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    return None
