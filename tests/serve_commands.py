"""Reads commands `vllm serve` as vLLM does, and checks what of their arguments is ours; nothing is started."""

import json
from typing import Any

from vllm_dllm import plugin
from vllm_dllm.config import parse_server_settings
from vllm_dllm.spiffy_config import parse_spiffy


def parse_serve(words: list[str]) -> Any:
    """Read the words behind `vllm serve`.

    Raises: SystemExit for an option that vLLM does not have, ConfigError for a setting of ours that is wrong.
    """
    plugin.register()
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    found = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(words)
    if "dllm" in (found.additional_config or {}) and found.additional_config["dllm"].get("mode") != "ar":
        parse_server_settings(found.additional_config["dllm"])
    config = found.speculative_config
    if isinstance(config, str):
        config = json.loads(config)
    if config is None and found.spec_method is not None:
        config = {"method": found.spec_method}
    if config is not None:
        parse_spiffy(config)
    return found
