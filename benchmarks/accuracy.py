"""How many replies are right under each policy, beside the forwards they take, without drafts and with Spiffy."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.parallel_tasks import right as right_in_task
from vllm_dllm.errors import ConfigError, did_you_mean
from vllm_dllm.measure.report import Row, Section
from vllm_dllm.measure.workload import EngineSpec, UnequalTokensError, Workload
from vllm_dllm.policy_options import POLICY_ALIASES, policy_names
from vllm_dllm.unmask.registry import file_option, needs_file

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput

Line = Mapping[str, Any]
ALL = "all"


def read_lines(path: Path, skip: int, count: int) -> list[Line]:
    """Read the questions of a file behind the first ones; raises ConfigError for one that nothing judges."""
    lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()][skip : skip + count]
    read: list[Line] = [json.loads(line) for line in lines]
    for number, line in enumerate(read, start=skip + 1):
        if not ("answer" in line or {"task", "given"} <= line.keys()):
            raise ConfigError(
                f"{path}, question {number} has {sorted(line)}; allowed are lines with answer, and those of "
                "`python -m benchmarks.parallel_tasks`; give such a file"
            )
    return read


def is_right(line: Line, reply: str) -> bool:
    """Judge a reply: as the line's task says, by the last number where the answer ends in `#### N`, else as a whole."""
    if "task" in line and "given" in line:
        return right_in_task(line, reply)
    _, sign, number = str(line["answer"]).rpartition("####")
    if not sign:
        return reply.strip() == str(line["answer"]).strip()
    found = re.findall(r"-?\d+(?:\.\d+)?", reply.replace(",", ""))
    return bool(found) and float(found[-1]) == float(number.strip().replace(",", ""))


def likeness(line: Line, reply: str) -> float | None:
    """Return how like its answer's text a reply is, from 0 to 1 (difflib's ratio); None where there is no such text.

    It tells replies of a model apart that is hardly ever right.
    """
    answer = line.get("answer")
    if answer is None:
        return None
    return SequenceMatcher(None, str(answer).strip(), reply.strip(), autojunk=False).ratio()


def chosen_policies(names: str, settings: Mapping[str, object]) -> tuple[list[str], list[str]]:
    """Return the policies of a list like `static,threshold`, and those that `all` leaves out.

    These are the ones whose net is not given, or whose tokens that delete and insert the model does not have.

    Args:
        names: the list, or `all`.
        settings: of the server, with what its model publishes.

    Raises: ConfigError for a name of none.
    """
    if names == ALL:
        known = [name for name in policy_names() if name not in POLICY_ALIASES]
        out = [
            name
            for name in known
            if (needs_file(name) and file_option(name) not in settings)
            or (name == "indel" and "indel_delete" not in settings)
        ]
        return [name for name in known if name not in out], out
    for name in names.split(","):
        if name not in policy_names():
            todo = did_you_mean(name, policy_names(), f"give some of {', '.join(policy_names())}, or {ALL!r}")
            raise ConfigError(f"--policy has {name!r}; {todo}")
    return names.split(","), []


@dataclass(frozen=True, slots=True)
class Judged:
    """What a policy did with all questions."""

    right: list[bool]  # of each question
    alike: float | None  # `likeness`, mean; None: no line has an answer's text
    nfe: float  # forwards of a reply, mean
    drafted: float | None  # the same with drafts; None: without them
    accepted: int
    num_tokens: float  # of a reply, mean


def judge(
    workload: Workload,
    lines: Sequence[Line],
    policies: Sequence[str],
    settings: Mapping[str, object],
    speculative_config: dict[str, Any] | None,
) -> dict[str, Judged]:
    """Answer all questions under each policy with one engine.

    Args:
        workload: its prompts are those of the lines.
        lines: judge the replies.
        policies: names.
        settings: of the server.
        speculative_config: None: without drafts.

    Raises: UnequalTokensError where drafts change a token.
    """
    from vllm_dllm.engine.measuring import start_engine

    llm = start_engine(EngineSpec(workload, dict(settings), speculative_config, most_drafts=8))
    found = {}
    for policy in policies:
        plain = _answers(llm, workload, {"dllm_policy": policy, "dllm_speculation": False})
        drafted = _answers(llm, workload, {"dllm_policy": policy}) if speculative_config else None
        if drafted is not None and _tokens(drafted) != _tokens(plain):
            raise UnequalTokensError(f"policy {policy}: tokens with drafts differ from those without")
        replies = [(line, output.outputs[0].text) for line, output in zip(lines, plain, strict=True)]
        alike = [its for its in (likeness(*reply) for reply in replies) if its is not None]
        found[policy] = Judged(
            [is_right(*reply) for reply in replies],
            mean(alike) if alike else None,
            mean(_took(plain, "nfe")),
            None if drafted is None else mean(_took(drafted, "nfe")),
            sum(_took(drafted or plain, "accepted")),
            mean(map(len, _tokens(plain))),
        )
    llm.llm_engine.engine_core.shutdown()
    return found


def _answers(llm: "LLM", workload: Workload, options: dict[str, Any]) -> "list[RequestOutput]":
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=workload.temperature, seed=workload.seed, max_tokens=workload.gen_length, extra_args=options
    )
    return llm.generate([{"prompt_token_ids": list(ids)} for ids in workload.prompts], params, use_tqdm=False)


def _tokens(outputs: "Sequence[RequestOutput]") -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def _took(outputs: "Sequence[RequestOutput]", what: str) -> list[int]:
    return [output.kv_transfer_params["dllm"][what] for output in outputs]


def sections(found: Mapping[str, Judged], lines: Sequence[Line]) -> list[Section]:
    """Make the tables: accuracy beside forwards, and accuracy by task where there are several."""
    summary: list[Row] = [
        {
            "policy": policy,
            "right": f"{100 * mean(its.right):.0f} %",
            **({} if its.alike is None else {"alike": f"{100 * its.alike:.0f} %"}),
            "tokens": its.num_tokens,
            "forwards": its.nfe,
            "with Spiffy": "" if its.drafted is None else its.drafted,
            "accepted": its.accepted,
        }
        for policy, its in found.items()
    ]
    title = (
        f"{len(lines)} questions: right replies, their likeness to the answers; tokens and forwards of a reply, mean"
    )
    tables = [Section(title, summary)]
    tasks = list(dict.fromkeys(str(line["task"]) for line in lines if "task" in line))
    if len(tasks) > 1:
        by_task: list[Row] = [
            {
                "policy": policy,
                **{task: f"{100 * mean(_of_task(its, lines, task)):.0f} %" for task in tasks},
            }
            for policy, its in found.items()
        ]
        tables.append(Section("right replies by task", by_task))
    return tables


def _of_task(its: Judged, lines: Sequence[Line], task: str) -> list[bool]:
    return [is_so for is_so, line in zip(its.right, lines, strict=True) if line.get("task") == task]
