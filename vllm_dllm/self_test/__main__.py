"""`python -m vllm_dllm.self_test`: what `vllm-dllm doctor --self-test` compares, where its libraries are missing."""

import sys

from vllm_dllm.self_test.isolated import run_isolated, serve, usual_requests


def main() -> int:
    """Print a line for each check; returns the exit status."""
    all_agree = True
    for request in usual_requests():
        for check in run_isolated(request):
            all_agree &= check.agrees
            sys.stdout.write(f"{'ok   ' if check.agrees else 'WRONG'} {check}\n")
        sys.stdout.flush()  # a log that is cut short has what ended
    return int(not all_agree)


if __name__ == "__main__":
    if "--serve" in sys.argv:
        serve()
    else:
        sys.exit(main())
