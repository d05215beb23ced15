"""Markdown tables on stdout, a row as soon as it is known."""


def row(*cells: object) -> None:
    print("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |", flush=True)


def table(*names: str) -> None:
    print()
    row(*names)
    row(*["---"] * len(names))
