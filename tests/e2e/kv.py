"""The reference's KV policy of a server's settings."""

from typing import Any

from vllm_dllm.reference.decode import KvPolicy


def kv_policy(settings: dict[str, Any]) -> KvPolicy:
    """Return what the reference has of them."""
    changes = {name: settings[name] for name in ("prefix_look", "after_look", "warmup_steps") if name in settings}
    return KvPolicy(settings.get("kv_policy", "dual"), settings.get("refresh_every"), **changes)
