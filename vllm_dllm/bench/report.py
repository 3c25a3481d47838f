"""Tables in Markdown."""

from collections.abc import Mapping, Sequence


def table(rows: Sequence[Mapping[str, str | int | float]]) -> str:
    """Format rows of the same keys; floats get two decimals."""

    def cell(value: str | float) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    header = list(rows[0])
    lines = [header, ["---"] * len(header), *([cell(row[key]) for key in header] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
