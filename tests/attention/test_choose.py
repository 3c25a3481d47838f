"""The choice of an implementation: decided by declared support, told with its reason, refused with a remedy."""

from dataclasses import replace

import pytest
import torch

from vllm_dllm.attention import choose
from vllm_dllm.attention.choose import IMPLEMENTATIONS, ORDER, Measure, choose_attention
from vllm_dllm.attention.interface import Setting
from vllm_dllm.errors import ConfigError, KernelUnavailable
from vllm_dllm.names import AttentionName
from vllm_dllm.self_test.check import Check

CPU = Setting("cpu", None, torch.float32, torch.float32, 64, None)
GPU = Setting("cuda", (9, 0), torch.bfloat16, torch.bfloat16, 128, 16)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What is installed, for a test to change; the real answers are poison."""
    names: set[str] = {"csrc", "vllm", "flashinfer", "xformers", "torch"}
    for name, implementation in IMPLEMENTATIONS.items():
        answer = staticmethod(lambda _, name=name: None if name in names else f"{name} is not built; build it: `make`")
        monkeypatch.setattr(implementation, "unavailable", answer)
    monkeypatch.setattr(choose, "_label", lambda name, _: f"{name} (label)")
    return names


@pytest.mark.parametrize(
    ("setting", "missing", "name", "reason"),
    [
        (CPU, set(), "csrc", "the first of csrc, torch"),
        (CPU, {"csrc"}, "torch", "csrc: csrc is not built; build it: `make`"),
        (replace(CPU, kv_dtype=torch.bfloat16), set(), "torch", "kv_cache_dtype bfloat16 is not the model's float32"),
        (replace(CPU, head_dim=20), set(), "torch", "it does not take heads of 20"),
        (replace(CPU, page_size=8), set(), "torch", "it does not take pages of 8 positions (--block-size)"),
        (GPU, set(), "csrc", "the first of csrc, vllm, flashinfer, xformers"),
        (GPU, {"csrc"}, "vllm", "csrc: csrc is not built"),
        (GPU, {"csrc", "vllm"}, "flashinfer", "vllm: vllm is not built"),
        (GPU, {"csrc", "vllm", "flashinfer"}, "xformers", "flashinfer: flashinfer is not built"),
        (replace(GPU, head_dim=80), {"csrc", "vllm"}, "xformers", "flashinfer: it does not take heads of 80"),
        (replace(GPU, page_size=24), {"csrc"}, "flashinfer", "vllm: it does not take pages of 24 positions"),
    ],
)
def test_auto_takes_the_first_that_works(
    setting: Setting, missing: set[str], name: str, reason: str, installed: set[str]
) -> None:
    installed -= missing
    choice = choose_attention("auto", setting)
    assert (choice.name, choice.label) == (name, f"{name} (label)")
    assert reason in choice.reason


def test_auto_on_a_gpu_does_not_fall_back_to_torch(installed: set[str]) -> None:
    installed -= {"csrc", "vllm", "flashinfer", "xformers"}
    none = r"none of csrc, vllm, flashinfer, xformers works here: csrc: .*`make`"
    with pytest.raises(KernelUnavailable, match=none) as no:
        choose_attention("auto", GPU)
    assert "or set it to 'torch'" in str(no.value)
    assert choose_attention("torch", GPU).name == "torch"


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_named_one_is_taken_and_no_other_asked(name: AttentionName, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = CPU if name == "torch" else GPU
    for other, implementation in IMPLEMENTATIONS.items():
        if other != name:
            poison = staticmethod(lambda _, other=other: pytest.fail(f"asked for {other}"))
            monkeypatch.setattr(implementation, "unavailable", poison)
    choice = choose_attention(name, setting)
    assert (choice.name, choice.reason) == (name, "as set")


@pytest.mark.parametrize("name", ["csrc", "vllm", "flashinfer", "xformers"])
def test_a_named_one_that_is_missing_raises_with_the_remedy(name: AttentionName, installed: set[str]) -> None:
    installed.remove(name)
    message = f"additional_config.dllm.attention is '{name}', but {name} is not built; build it: `make`"
    with pytest.raises(KernelUnavailable) as missing:
        choose_attention(name, GPU)
    assert str(missing.value) == message


@pytest.mark.parametrize(
    ("name", "setting", "clause"),
    [
        ("vllm", CPU, "it does not run on cpu"),
        ("vllm", replace(GPU, capability=(7, 5)), "it needs a GPU of compute capability 8.0, this one has 7.5"),
        ("flashinfer", CPU, "it does not run on cpu"),
        ("xformers", CPU, "it does not run on cpu"),
        ("csrc", replace(CPU, kv_dtype=torch.bfloat16), "kv_cache_dtype bfloat16 is not the model's float32"),
        ("csrc", replace(CPU, head_dim=36), "it does not take heads of 36"),
        ("csrc", replace(CPU, head_dim=264), "it does not take heads of 264"),
        ("csrc", replace(CPU, page_size=512), "it does not take pages of 512 positions (--block-size)"),
        ("csrc", replace(GPU, capability=(7, 5)), "it needs a GPU of compute capability 8.0, this one has 7.5"),
        ("flashinfer", replace(GPU, dtype=torch.float32, kv_dtype=torch.float32), "it does not take float32 (--dtype)"),
        ("xformers", replace(GPU, dtype=torch.float32, kv_dtype=torch.float32), "it does not take float32 (--dtype)"),
        ("flashinfer", replace(GPU, head_dim=80), "it does not take heads of 80"),
    ],
)
def test_a_named_one_that_cannot_serve_raises(name: AttentionName, setting: Setting, clause: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_attention(name, setting)
    assert f"attention is {name!r}, but {clause}; change that or choose 'auto'" in str(refused.value)


def measured(*wrong: AttentionName) -> tuple[list[str], Measure]:
    """Return who was compared, and a comparison in which some are wrong."""
    asked: list[str] = []

    def measure(name: AttentionName) -> list[Check]:
        asked.append(name)
        return [Check(f"attention {name}", "a case", 0.003, 0.01), Check(name, "on 2", 0.5 * (name in wrong), 0.01)]

    return asked, measure


def test_auto_takes_the_first_that_agrees(installed: set[str]) -> None:
    installed.remove("flashinfer")
    asked, measure = measured("csrc")
    choice = choose_attention("auto", GPU, measure)
    first = next(name for name in ORDER["cuda"] if name in installed and name != "csrc")
    assert (choice.name, asked) == (first, [name for name in ORDER["cuda"] if name in asked])
    assert "csrc: it disagrees with plain torch on this device (csrc, on 2: error 0.5, allowed 0.01)" in choice.reason
    assert choice.reason.endswith(f"; against plain torch: attention {first}, a case: error 0.003, allowed 0.01")
    asked, measure = measured()
    assert choose_attention("auto", GPU, measure).name == "csrc"
    assert asked == ["csrc"]


def test_auto_takes_none_that_disagrees(installed: set[str]) -> None:
    _, measure = measured(*ORDER["cuda"])
    with pytest.raises(KernelUnavailable, match=r"works here: csrc: it disagrees .* error 0.5, allowed 0.01"):
        choose_attention("auto", GPU, measure)


def test_a_named_one_that_disagrees_raises_with_the_figures(installed: set[str]) -> None:
    asked, measure = measured("csrc")
    with pytest.raises(KernelUnavailable) as wrong:
        choose_attention("csrc", GPU, measure)
    assert str(wrong.value) == (
        "additional_config.dllm.attention is 'csrc', but it disagrees with plain torch on this device (csrc, on 2: "
        "error 0.5, allowed 0.01); choose 'auto' or another one, and report it with what "
        "`vllm-dllm doctor --self-test` prints"
    )
    assert choose_attention("torch", GPU, measure).reason.startswith("as set; against plain torch: ")
    assert asked == ["csrc", "torch"]
