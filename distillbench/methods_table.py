"""methods/README.md from the methods' own cards: `python -m distillbench.methods_table > methods/README.md`."""

from __future__ import annotations

from .discovery import discover


def table() -> str:
    """The table of methods in Markdown."""
    lines = [
        "# Methods", "",
        "Written by `make methods-table` from the `info` of each method; do not edit.",
        "Claims are the papers'; which of them hold here is decided in [mixture2d](../leaderboards/mixture2d/claims.md), "
        "[digits](../leaderboards/digits/claims.md) and the report.", "",
        "| id | paper | year | family | needs | data | steps | trains |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    infos = [found.info for found in discover().values()]
    for info in infos:
        steps = ", ".join(map(str, info.steps))
        lines.append(
            f"| `{info.id}` | {info.title} ({info.paper}) | {info.year} | {info.family} | {', '.join(info.needs) or '-'} "
            f"| {info.data_access} | {steps} | {info.trains} |"
        )
    for info in infos:
        lines += ["", f"## {info.id}", "", "Deviations from the paper, and what it does not settle:", ""]
        lines += [f"- {text}" for text in info.deviations] or ["- none"]
        lines += ["", "Tuned by the common protocol: " + ", ".join(f"`{search.knob}`" for search in info.tunes) + ".", "", "Claims:", ""]
        lines += [f"- {c.text} (`{c.better}` over `{c.worse}` on {c.metric}, {c.track}, {c.steps} steps)" for c in info.claims] or [
            "- none"
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
